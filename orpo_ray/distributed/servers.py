"""Checks that every server of a cluster is fit for a run, before pairs are prepared.

The check holds no CPU or GPU.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psutil

from orpo_ray.config.storage import local_path
from orpo_ray.distributed.marker import leave_marker, remove_marker
from orpo_ray.errors import ConfigError, OrpoRayError, SetupError, on_one_line
from orpo_ray.runs.console import Announce
from orpo_ray.runs.run import Run
from orpo_ray.runs.versions import versions
from orpo_ray.storage import storage_at

_ANSWER_S = 60.0
_LEAST_FREE_BYTES = 2**30
"""With less there is no room for a first checkpoint and what Ray writes beside it."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a server says about itself."""

    address: str
    versions: Mapping[str, str]
    sees_storage: bool
    free_bytes: int
    """On the disk where Ray keeps its files on that server."""
    interface: str | None
    """The network interface that has the address; None if no interface of the server has it."""


def check_servers(run: Run, announce: Announce) -> None:
    """Ask every server of the cluster, unless there is only one.

    Raises ConfigError if versions differ or the storage is not shared. Raises SetupError if a
    server does not answer or its disk is full.
    """
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) < 2:
        return
    with _marker(run) as marker:
        reports = _ask(nodes, marker)
    refuse_unfit(reports, versions(), run.config.storage)
    announce(describe_network(reports))


def refuse_unfit(reports: Sequence[Report], ours: Mapping[str, str], storage: str) -> None:
    """Raise for the first server that a run would fail on. Pure."""
    for report in reports:
        for package in sorted(ours.keys() | report.versions.keys()):
            here, there = ours.get(package, "none"), report.versions.get(package, "none")
            if here != there:
                raise ConfigError(
                    f"server {report.address} has {package} {there}, but the run's driver has "
                    f"{here}; install the same on every server"
                )
    if unseen := [report.address for report in reports if not report.sees_storage]:
        raise ConfigError(
            f"storage: {storage} is not seen on {', '.join(unseen)}; use s3://bucket/folder, or a "
            "folder that every server shares"
        )
    for report in reports:
        if report.free_bytes < _LEAST_FREE_BYTES:
            raise SetupError(
                f"server {report.address} has {report.free_bytes / 2**20:.0f} MB free on Ray's "
                f"disk; make room for {_LEAST_FREE_BYTES / 2**20:.0f} MB"
            )


def describe_network(reports: Sequence[Report]) -> str:
    """One line that names the interface of each server. Pure."""
    found = [
        f"{report.interface or 'an unknown interface'} on {report.address}" for report in reports
    ]
    return (
        f"{len(reports)} servers agree in versions and see the storage; gloo and NCCL use "
        f"{', '.join(found)}"
    )


def interface_of(address: str, interfaces: Mapping[str, Sequence[str]]) -> str | None:
    """The network interface that has an address, given the addresses of each. Pure."""
    return next((name for name, addresses in interfaces.items() if address in addresses), None)


def own_interfaces() -> dict[str, list[str]]:
    """The addresses of each of this server's interfaces."""
    return {
        name: [entry.address for entry in entries]
        for name, entries in psutil.net_if_addrs().items()
    }


@contextmanager
def _marker(run: Run) -> Iterator[str]:
    """The place of a file in the storage; a server that can read it shares the storage."""
    try:
        marker = leave_marker(run.storage, run.root)
    except OSError as error:
        raise ConfigError(
            f"storage: {run.config.storage} cannot be written: {error.strerror}"
        ) from error
    try:
        yield run.storage.place_of(marker)
    finally:
        remove_marker(run.storage, marker)


def _ask(nodes: Sequence[Mapping[str, Any]], marker: str) -> list[Report]:
    asked = _on_each(nodes, _report, marker)
    _wait(asked, _ANSWER_S)
    return [_answer(address, reference, _ANSWER_S) for address, reference in asked.items()]


def ask_each_server(
    function: Callable[..., Any], *arguments: Any, seconds: float
) -> dict[str, Any]:
    """What a function returns on every living server, by the server's address.

    In place of an answer that does not come stands the error that says why.
    """
    import ray

    asked = _on_each([node for node in ray.nodes() if node["Alive"]], function, *arguments)
    _wait(asked, seconds)
    answers: dict[str, Any] = {}
    for address, reference in asked.items():
        try:
            answers[address] = _answer(address, reference, seconds)
        except OrpoRayError as error:
            answers[address] = error
    return answers


def own_address() -> str:
    """The address that Ray gives to the server on which this function runs."""
    import ray

    return str(ray.util.get_node_ip_address())


def rays_folder() -> str:
    """Where Ray keeps its files on the server on which this function runs."""
    import ray

    node = ray._private.worker._global_node
    assert node is not None, "it runs on a server of the cluster"
    return str(node.get_session_dir_path())


def _on_each(
    nodes: Sequence[Mapping[str, Any]], function: Callable[..., Any], *arguments: Any
) -> dict[str, Any]:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return {
        node["NodeManagerAddress"]: ray.remote(function)
        .options(
            num_cpus=0,
            max_retries=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
        )
        .remote(*arguments)
        for node in nodes
    }


def _wait(asked: Mapping[str, Any], seconds: float) -> None:
    import ray

    ray.wait(list(asked.values()), num_returns=len(asked), timeout=seconds)


def _answer(address: str, reference: Any, seconds: float) -> Any:
    import ray

    try:
        return ray.get(reference, timeout=0)
    except ray.exceptions.GetTimeoutError as error:
        raise SetupError(f"server {address} did not answer within {seconds:.0f} s") from error
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, OrpoRayError):
            raise type(error.cause)(f"server {address}: {error.cause}") from error
        raise ConfigError(
            f"server {address} cannot load orpo_ray: {on_one_line(error.cause)[:200]}"
        ) from error
    except ray.exceptions.RayError as error:
        raise SetupError(
            f"server {address} was lost while it was asked: {on_one_line(error)[:200]}"
        ) from error


def _report(marker: str) -> Report:
    """The report of the server on which this function runs."""
    address = own_address()
    return Report(
        address=address,
        versions=versions(),
        sees_storage=storage_at(marker).holds(local_path(marker)),
        free_bytes=shutil.disk_usage(rays_folder()).free,
        interface=interface_of(address, own_interfaces()),
    )
