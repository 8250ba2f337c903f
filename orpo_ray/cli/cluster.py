"""`orpo-ray cluster`: a Ray cluster on your own servers, or on Kubernetes."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orpo_ray.cli.options import ConfigFile, Json, Overrides
from orpo_ray.cli.rendering import (
    CpusPerNode,
    GpusPerNode,
    MemoryPerNode,
    NodeCount,
    Out,
    write_files,
)

if TYPE_CHECKING:
    from orpo_ray.jobs.bare_metal import Server
    from orpo_ray.jobs.hosts import HostsConfig
    from orpo_ray.jobs.ssh import Ssh

app = typer.Typer(
    add_completion=False, help="A Ray cluster on your own servers, over SSH, or on Kubernetes."
)

Hosts = Annotated[Path, typer.Argument(metavar="HOSTS.yaml")]


@app.command("render")
def render(
    hosts: Hosts,
    out: Out = Path(),
    json: Json = False,
) -> dict[str, Any]:
    """Write the launcher's YAML and the firewall's script for the servers that HOSTS.yaml names."""
    from orpo_ray.jobs.hosts import load_hosts
    from orpo_ray.jobs.render import bare_metal

    return write_files(bare_metal(load_hosts(hosts)), out, json)


@app.command("kuberay")
def kuberay(
    config: ConfigFile,
    image: Annotated[str, typer.Option(help="Made with cluster/docker/Dockerfile.")],
    overrides: Overrides = None,
    claim: Annotated[
        str | None, typer.Option(help="Volume claim that all pods mount as the storage's folder.")
    ] = None,
    nodes: NodeCount = 1,
    gpus_per_node: GpusPerNode = None,
    cpus_per_node: CpusPerNode = 8,
    memory_per_node: MemoryPerNode = 64,
    out: Out = Path(),
    json: Json = False,
) -> dict[str, Any]:
    """Write manifests for KubeRay: a RayJob that trains CONFIG, and a RayCluster that stays."""
    from orpo_ray.config import load_config
    from orpo_ray.config.extends import standalone
    from orpo_ray.jobs.kuberay import Pods, manifests
    from orpo_ray.jobs.nodes import nodes_for
    from orpo_ray.storage import file_at

    file = file_at(config)
    settings = load_config(file, overrides or ())
    asked = nodes_for(settings.scale, nodes, gpus_per_node, cpus_per_node, memory_per_node)
    pods = Pods(asked, image, claim)
    return write_files(manifests(settings, standalone(file), overrides or (), pods), out, json)


@app.command("up")
def up(
    hosts: Hosts,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done, and connect to nothing.")
    ] = False,
    json: Json = False,
) -> dict[str, Any]:
    """Start Ray on every server, with a token that every client needs.

    The first server is the head.
    """
    from orpo_ray.cli.console import announce, full_log, open_log
    from orpo_ray.jobs import bare_metal

    cluster, shell = _reach(hosts)
    if dry_run:
        steps = bare_metal.plan(cluster)
        if not json:
            print("\n".join(f"{address}: {'; '.join(todo)}" for address, todo in steps.items()))
        announce("nothing was started; servers that have joined already would be left alone")
        return {"servers": [{"address": address, "steps": todo} for address, todo in steps.items()]}
    open_log()
    log = full_log()
    assert log is not None, "it was opened just now"
    return _show(bare_metal.up(cluster, shell, bare_metal.RayLauncher(Path(log)), announce), json)


@app.command("status")
def status(hosts: Hosts, json: Json = False) -> dict[str, Any]:
    """Which servers have joined, and what they bring."""
    from orpo_ray.cli.console import announce
    from orpo_ray.jobs import bare_metal

    return _show(bare_metal.status(*_reach(hosts), announce), json)


@app.command("down")
def down(hosts: Hosts, json: Json = False) -> dict[str, Any]:
    """Stop Ray on every server."""
    from orpo_ray.cli.console import announce
    from orpo_ray.errors import ResourceError
    from orpo_ray.jobs import bare_metal

    cluster, shell = _reach(hosts)
    if missed := bare_metal.down(cluster, shell, announce):
        others = (
            "the other servers have stopped"
            if len(missed) < len(cluster.addresses)
            else "none was reached"
        )
        raise ResourceError(f"Ray may still run on {', '.join(missed)}; {others}")
    return {"stopped": cluster.addresses}


def _reach(path: Path) -> "tuple[HostsConfig, Ssh]":
    from orpo_ray.jobs.hosts import load_hosts
    from orpo_ray.jobs.ssh import ssh_to

    hosts = load_hosts(path)
    return hosts, ssh_to(hosts)


def _show(servers: "list[Server]", json: bool) -> dict[str, Any]:
    from dataclasses import asdict

    if not json:
        for server in servers:
            has = f"{server.cpus:g} CPU, {server.gpus:g} GPU" if server.joined else "has not joined"
            print(f"{server.address}: {has}")
    return {"servers": [asdict(server) for server in servers]}
