"""The filled-in files of `cluster/`: stable, valid for their programs, and safe for a shell."""

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray.autoscaler
import yaml
from stand_ins import stand_in

from orpo_ray.errors import ConfigError
from orpo_ray.jobs import ports
from orpo_ray.jobs.hosts import HostsConfig, load_hosts
from orpo_ray.jobs.render import bare_metal

ROOT = Path(__file__).resolve().parents[2]
RENDERED = Path(__file__).with_name("rendered")
TRIO = HostsConfig(name="trio", head="10.0.0.1", workers=("10.0.0.2", "10.0.0.3"))  # type: ignore[arg-type]
HOSTS = "name: trio\nhead: 10.0.0.1\nworkers: [10.0.0.2, 10.0.0.3]\n"
SETTINGS = (
    "address",
    "interface",
    "RAY_AUTH_MODE",
    "RAY_AUTH_TOKEN_PATH",
    "GLOO_SOCKET_IFNAME",
    "NCCL_SOCKET_IFNAME",
)


@pytest.fixture
def launcher() -> dict[str, Any]:
    """What Ray's launcher reads."""
    found: dict[str, Any] = yaml.safe_load(bare_metal(TRIO)["trio.launcher.yaml"])
    return found


@pytest.mark.parametrize("name", ["trio.launcher.yaml", "trio.firewall.nft"])
def test_a_change_of_a_rendered_file_is_seen(name: str) -> None:
    assert bare_metal(TRIO)[name] == (RENDERED / name).read_text(encoding="utf-8")


def test_the_launcher_is_valid_by_rays_own_schema(launcher: dict[str, Any]) -> None:
    schema = json.loads(
        (Path(ray.autoscaler.__file__).with_name("ray-schema.json")).read_text(encoding="utf-8")
    )
    jsonschema.validate(launcher, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**launcher, "head_ip": "10.0.0.1"}, schema)


@pytest.mark.parametrize("name", ["123", "null", "true", "1.5", "2026-01-01"])
def test_a_name_stays_text(name: str) -> None:
    hosts = HostsConfig(name=name, head="10.0.0.1")  # type: ignore[arg-type]
    assert yaml.safe_load(bare_metal(hosts)[f"{name}.launcher.yaml"])["cluster_name"] == name


def test_a_cluster_of_one_server_has_no_workers() -> None:
    alone = yaml.safe_load(
        bare_metal(HostsConfig(name="one", head="10.0.0.1"))["one.launcher.yaml"]
    )  # type: ignore[arg-type]
    assert (alone["provider"]["worker_ips"], alone["max_workers"]) == ([], 0)


@pytest.mark.parametrize("commands", ["head_start_ray_commands", "worker_start_ray_commands"])
@pytest.mark.parametrize("address", ["10.0.0.1", "10.0.0.3"])
def test_ray_is_started_on_the_interface_that_joins_the_servers(
    launcher: dict[str, Any], commands: str, address: str, tmp_path: Path
) -> None:
    told = start_on_a_server(launcher[commands][-1], address, tmp_path)
    assert told["arguments"][0] == "start" and f"--node-ip-address={address}" in told["arguments"]
    assert ("--head" in told["arguments"]) == commands.startswith("head")
    assert (
        "--dashboard-host=127.0.0.1" in told["arguments"]
        or "--address=10.0.0.1:6379" in told["arguments"]
    )
    assert told["environment"] == {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": f"{tmp_path}/.ray/orpo-ray.token",
        "GLOO_SOCKET_IFNAME": "eth1",
        "NCCL_SOCKET_IFNAME": "eth1",
    }
    assert told["umask"] == 0o077


def start_on_a_server(command: str, address: str, folder: Path) -> dict[str, Any]:
    """What `ray` is called with, on a server whose first network is not the cluster's.

    `ip` and `ray` are stand-ins.
    """
    stand_in(
        folder / "ip",
        "shown = {'eth0': '192.168.7.5/24', 'eth1': '" + address + "/24'}\n"
        "for number, (name, address) in enumerate(shown.items(), start=2):\n"
        "    if 'to' not in sys.argv or address.startswith(sys.argv[-1]):\n"
        "        print(f'{number}: {name}    inet {address} brd 10.0.0.255 scope global {name}')",
    )
    stand_in(
        folder / "ray",
        "kept = {name: value for name, value in os.environ.items() if name.startswith(('RAY_', "
        "'GLOO_', 'NCCL_'))}\n"
        "print(json.dumps({'arguments': sys.argv[1:], 'environment': kept, 'umask': os.umask(0)}))",
    )
    here = command.replace("/opt/orpo-ray/bin/ray", str(folder / "ray"))
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", "HOME": str(folder)}
    done = subprocess.run(
        ["bash", "-c", here], env=environment, capture_output=True, text=True, check=True
    )
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def test_no_two_ports_are_one_and_all_are_shut_to_strangers(launcher: dict[str, Any]) -> None:
    single = [ports.GCS, ports.CLIENT, ports.DASHBOARD, *ports.OF_EACH_SERVER.values()]
    assert len(set(single)) == len(single)
    assert not any(ports.WORKERS[0] <= port <= ports.WORKERS[1] for port in single)
    command = " ".join(launcher["head_start_ray_commands"])
    told = {int(port) for port in re.findall(r"-port=(\d+)", command)}
    firewall = bare_metal(TRIO)["trio.firewall.nft"]
    (closed,) = re.findall(r"th dport \{ (.*) \} drop", firewall)
    assert told == {*single, *ports.WORKERS}
    assert closed.split(", ") == [*map(str, sorted(single)), "20000-20999"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("workers: [10.0.0.2, 10.0.0.2]", "workers: 10.0.0.2 is named twice"),
        ("workers: [10.0.0.1]", "workers: 10.0.0.1 is named twice"),
        ("head: gpu-1", "head: must be an IPv4 address, not 'gpu-1'"),
        ("head: 167772161", "head: must be an IPv4 address, not 167772161"),
        ("workers: [167772162]", "workers.0: must be an IPv4 address, not 167772162"),
        ('token: ""', "token: must be the path of a file, not ''"),
        ("wokers: [10.0.0.2]", "wokers: unknown key; did you mean workers?"),
        ("name: a b; rm", "name: must be letters, digits and . _ -"),
        ("environment: venv", "environment: must be an absolute path of letters"),
        ("environment: /opt/$(reboot)", "environment: must be an absolute path of letters"),
        ("ssh: {port: 22}", "ssh.port: unknown key; known here: key, user"),
    ],
)
def test_a_mistake_in_hosts_yaml_is_one_line(tmp_path: Path, change: str, says: str) -> None:
    path, key = tmp_path / "hosts.yaml", change.partition(":")[0]
    kept = [line for line in HOSTS.splitlines() if not line.startswith(f"{key}:")]
    path.write_text("\n".join([*kept, change]) + "\n", encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_hosts(path)
    assert str(caught.value).startswith(f"{path}:{len(kept) + 1}: {says}")


def test_an_empty_file_is_told_what_hosts_yaml_is(tmp_path: Path) -> None:
    (tmp_path / "hosts.yaml").touch()
    with pytest.raises(
        ConfigError,
        match=r"hosts\.yaml:1: the servers are a YAML mapping with name, head and workers",
    ):
        load_hosts(tmp_path / "hosts.yaml")


def test_the_home_of_nobody_is_told_with_its_setting() -> None:
    lost = {"ssh": {"key": "~nosuchuser/id"}, "token": "~nosuchuser/token"}
    hosts = HostsConfig.model_validate({"name": "trio", "head": "10.0.0.1", **lost})
    with pytest.raises(
        ConfigError, match=r"^ssh\.key: ~nosuchuser/id: no user of this server has that name"
    ):
        print(hosts.ssh.key_file)
    with pytest.raises(
        ConfigError, match=r"^token: ~nosuchuser/token: no user of this server has that name"
    ):
        print(hosts.known_hosts_file)
