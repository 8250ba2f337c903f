"""What differs between the servers of a cluster."""

from collections.abc import Iterator, Sequence

from orpo_ray.config.storage import is_url
from orpo_ray.doctor.facts import Asked, Server
from orpo_ray.doctor.findings import Finding, ok, stops, warning
from orpo_ray.runs.versions import PACKAGES

VERSIONS, CLOCK, GPUS = "versions", "clock", "GPUs"

_SKEW_S = 2.0
"""Logs of several servers cannot be read together beyond that."""
_REFUSED_SKEW_S = 900.0
"""S3 refuses requests of a clock that is further off (RequestTimeTooSkewed)."""


def judge(asked: Asked, servers: Sequence[Server]) -> Iterator[Finding]:
    """Findings about the cluster as a whole."""
    yield from judge_clocks(asked, servers)
    if len(servers) > 1:
        yield from judge_versions(servers)
        yield from judge_gpus(servers)


def judge_versions(servers: Sequence[Server]) -> Iterator[Finding]:
    """A run refuses servers that differ in what changes its numbers."""
    known = {
        server.name: {"python": server.facts.software.python, **server.facts.software.packages}
        for server in servers
        if server.facts.software is not None
    }
    differing = False
    for package in sorted({name for versions in known.values() for name in versions}):
        found = {name: versions.get(package, "none") for name, versions in known.items()}
        if len(set(found.values())) < 2:
            continue
        differing = True
        what = f"{package} differs: {_by_value(found)}"
        fix = f"install the same {package} on every server, with the same constraints.txt"
        counts = package == "python" or package in PACKAGES
        yield stops(VERSIONS, what, fix) if counts else warning(VERSIONS, what, fix)
    if known and not differing:
        yield ok(VERSIONS, f"{len(known)} servers have the same")


def judge_clocks(asked: Asked, servers: Sequence[Server]) -> Iterator[Finding]:
    """How far the clocks are apart, as far as the time of the questions lets it be known."""
    known = [server for server in servers if server.clock_offset is not None]
    if not known:
        return
    ahead = max(known, key=lambda server: server.clock_offset or 0.0)
    behind = min(known, key=lambda server: server.clock_offset or 0.0)
    apart = (ahead.clock_offset or 0.0) - (behind.clock_offset or 0.0)
    unknown = ahead.clock_uncertainty + behind.clock_uncertainty
    if len(known) == 1:
        behind, apart, unknown = ahead, abs(ahead.clock_offset or 0.0), ahead.clock_uncertainty
    who = f"{ahead.name} is ahead of {behind.name}" if len(known) > 1 else f"{ahead.name} differs"
    what = f"{who} by {apart:.1f} s (known to {unknown:.1f} s)"
    fix = "timedatectl set-ntp true on both, then timedatectl timesync-status"
    if apart - unknown > _REFUSED_SKEW_S and is_url(asked.storage):
        yield stops(CLOCK, f"{what}; a bucket refuses such a clock", fix)
    elif apart - unknown > _SKEW_S:
        yield warning(CLOCK, what, fix)
    else:
        yield ok(CLOCK, f"apart by at most {apart + unknown:.1f} s")


def judge_gpus(servers: Sequence[Server]) -> Iterator[Finding]:
    """The slowest GPU sets the speed of all, and the smallest one the micro-batch."""
    found = {
        server.name: ", ".join(device.name for device in server.facts.torch.devices) or "none"
        for server in servers
        if server.facts.torch is not None
    }
    if len(set(found.values())) > 1:
        yield warning(
            GPUS,
            f"servers differ: {_by_value(found)}; all wait for the slowest",
            "leave the slower servers out of the cluster, or give them a run of their own",
        )
    elif found:
        yield ok(GPUS, f"the same on {len(found)} servers: {next(iter(found.values()))}")


def _by_value(found: dict[str, str]) -> str:
    values = dict.fromkeys(found.values())
    return "; ".join(
        f"{value} on {', '.join(name for name, each in found.items() if each == value)}"
        for value in values
    )
