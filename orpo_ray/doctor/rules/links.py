"""How GPUs and servers talk with one another: P2P, InfiniBand, and the network interface."""

import re
from collections.abc import Iterator

from packaging.version import InvalidVersion, Version

from orpo_ray.distributed.servers import interface_of
from orpo_ray.doctor.facts import Asked, Cards, System, Torch
from orpo_ray.doctor.findings import Finding, ok, stops, warning

P2P, NETWORK = "P2P", "network"

_GEFORCE = re.compile(r"GeForce RTX (40|50)\d\d")
_HONEST_DRIVER = Version("550.40.07")
"""Older drivers say that an RTX 40 has P2P. accelerate refuses several of them with such a driver,
unless both variables are set (accelerate 1.15, utils/environment.py)."""
_ACCELERATE_WANTS = ("NCCL_P2P_DISABLE", "NCCL_IB_DISABLE")
_LOOPBACK = "lo"
_NOT_FOR_PEERS = ("docker", "br-", "virbr", "veth", "cni", "flannel", "cali", "tun", "tap", "ifb")
"""How the interfaces of containers and tunnels begin."""


def judge_p2p(asked: Asked, cards: Cards | None, torch: Torch, system: System) -> Iterator[Finding]:
    """Whether the GPUs of a server read each other's memory, and what NCCL must be told if not."""
    if torch.peers is None:
        return
    geforce = next((each.name for each in torch.devices if _GEFORCE.search(each.name)), None)
    unset = [name for name in _ACCELERATE_WANTS if name not in system.variables]
    driver = cards.driver if cards else ""
    if geforce is None or system.variables.get("NCCL_P2P_DISABLE") == "1":
        yield ok(P2P, "the GPUs read each other's memory" if torch.peers else "NCCL does without")
    elif "RTX 40" in geforce and _is_older(driver, _HONEST_DRIVER) and unset:
        yield stops(
            P2P,
            f"{len(torch.devices)} GPUs such as {geforce} have no P2P, and driver {driver} says "
            "that they have; accelerate refuses to start",
            f"{_export(unset)} where Ray or the run is started; or install driver 550.40.07 or "
            "newer",
        )
    else:
        told = "torch says that they have it" if torch.peers else "torch says so, too"
        variables = unset if not system.has_infiniband else ["NCCL_P2P_DISABLE"]
        yield warning(
            P2P,
            f"{len(torch.devices)} GPUs such as {geforce} have no P2P over PCIe ({told}); NCCL may "
            "hang when it tries",
            f"{_export(variables)} where Ray or the run is started",
        )


def judge_network(asked: Asked, system: System) -> Iterator[Finding]:
    """Which interface gloo and NCCL take."""
    named = {
        name: system.variables[name]
        for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
        if system.variables.get(name)
    }
    absent = {
        name: interface
        for name, interface in named.items()
        if interface.lstrip("^=").split(",")[0] not in system.interfaces
        and not any(each.startswith(interface) for each in system.interfaces)
        and not interface.startswith("^")
    }
    for name, interface in absent.items():
        yield stops(
            NETWORK,
            f"{name}={interface}, but this server has no such interface "
            f"({', '.join(system.interfaces)})",
            f"unset {name} where Ray is started; the run then finds the interface by itself",
        )
    if absent:
        return
    if named:
        yield ok(NETWORK, ", ".join(f"{name}={value}" for name, value in named.items()))
    elif system.address:
        yield from _among_peers(system.address, system)
    else:
        yield ok(NETWORK, f"{', '.join(usable(system))}; a run on one machine needs none")


def _among_peers(address: str, system: System) -> Iterator[Finding]:
    """A run takes the interface that has the address by which the others reach the server."""
    interface = interface_of(address, system.interfaces)
    if interface is not None:
        yield ok(NETWORK, f"gloo and NCCL take {interface} ({address})")
        return
    several = usable(system)
    yield warning(
        NETWORK,
        f"no interface has the address {address}, so gloo and NCCL guess among "
        f"{', '.join(several)}",
        f"export NCCL_SOCKET_IFNAME={several[0]} GLOO_SOCKET_IFNAME={several[0]} where Ray is "
        "started; name the interface that leads to the other servers",
    )


def usable(system: System) -> list[str]:
    """The interfaces that may lead to other servers; all of them if none seems to."""
    found = [
        name
        for name, addresses in system.interfaces.items()
        if name != _LOOPBACK
        and not name.startswith(_NOT_FOR_PEERS)
        and any(re.fullmatch(r"[\d.]+", address) for address in addresses)
    ]
    return found or list(system.interfaces)


def _is_older(version: str, than: Version) -> bool:
    try:
        return Version(version) < than
    except InvalidVersion:
        return False


def _export(variables: list[str]) -> str:
    return "export " + " ".join(f"{name}=1" for name in variables)
