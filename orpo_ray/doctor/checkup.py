"""A checkup: the facts of all servers, and what they mean for a run."""

from collections.abc import Iterator, Sequence
from typing import Any

from orpo_ray.doctor.facts import Asked, Facts, Server, plain
from orpo_ray.doctor.findings import Finding, Level, sorted_by_severity
from orpo_ray.doctor.rules import (
    base,
    failures,
    gpus,
    links,
    places,
    ray_state,
    settings,
    software,
    system,
)
from orpo_ray.doctor.rules import servers as between


def judge_server(asked: Asked, facts: Facts, *, cluster_has_gpus: bool = False) -> list[Finding]:
    """All findings about one server, the worst first.

    A server without a GPU takes no worker that wants one if another of its cluster has some.
    """
    found = [
        *failures.judge(asked, facts),
        *_of_workers(asked, facts, cluster_has_gpus),
        *_by_subject(asked, facts),
    ]
    return sorted_by_severity(found)


def _of_workers(asked: Asked, facts: Facts, cluster_has_gpus: bool) -> Iterator[Finding]:
    if facts.torch is not None:
        yield from gpus.judge(asked, facts.cards, facts.torch, cluster_has_gpus=cluster_has_gpus)
    if facts.settings is not None:
        yield from settings.judge(asked, facts.settings, cluster_has_gpus=cluster_has_gpus)


def _by_subject(asked: Asked, facts: Facts) -> Iterator[Finding]:
    if facts.software is not None:
        yield from software.judge(asked, facts.software)
    if facts.torch is not None:
        yield from gpus.judge_dtype(asked, facts.torch)
    if facts.attention is not None:
        yield from gpus.judge_attention(asked, facts.attention)
    if facts.nf4 is not None:
        yield from gpus.judge_nf4(asked, facts.nf4)
    if facts.torch is not None and facts.system is not None:
        yield from links.judge_p2p(asked, facts.cards, facts.torch, facts.system)
    if facts.system is not None:
        yield from links.judge_network(asked, facts.system)
        yield from system.judge_memory(asked, facts.system)
        yield from system.judge_files(asked, facts.system)
    if facts.ray is not None:
        yield from ray_state.judge(asked, facts.ray)
    if facts.disks is not None:
        yield from places.judge_disks(asked, facts.disks)
    if facts.storage is not None:
        yield from places.judge_storage(asked, facts.storage)
    if facts.hub is not None:
        yield from places.judge_hub(asked, facts.hub)
    if facts.base is not None:
        yield from base.judge(asked, facts.base)


def conclude(
    asked: Asked, servers: Sequence[Server], others: Sequence[Finding] = ()
) -> dict[str, Any]:
    """The checkup as one JSON object. `others` are findings about the way to the servers.

    `findings` at its top are those about the servers together; each server has its own.
    """
    has_gpus = any(server.facts.torch and server.facts.torch.devices for server in servers)
    each = [judge_server(asked, server.facts, cluster_has_gpus=has_gpus) for server in servers]
    together = sorted_by_severity([*others, *between.judge(asked, servers)])
    found = [*together, *(finding for findings in each for finding in findings)]
    return {
        "servers": [
            {
                "name": server.name,
                "facts": plain(server),
                "findings": [finding.plain for finding in findings],
            }
            for server, findings in zip(servers, each, strict=True)
        ],
        "findings": [finding.plain for finding in together],
        "stops": sum(finding.level is Level.STOPS for finding in found),
    }
