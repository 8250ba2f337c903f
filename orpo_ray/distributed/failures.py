"""Decides after a failure whether the workers start again or the run ends."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch.distributed as dist
from ray.exceptions import RayError, RayTaskError, RuntimeEnvSetupError
from ray.train.v2._internal.exceptions import RayTrainError

from orpo_ray.errors import OrpoRayError, RunError, on_one_line
from orpo_ray.training.memory import is_out_of_memory

Kind = Literal["ours", "memory", "peer", "unexpected", "lost"]

# What gloo and NCCL say when the process at the other end is gone. Sometimes both raise a plain
# RuntimeError.
_PEER_GONE = re.compile(
    r"gloo|nccl|connection (closed|reset|refused)|broken pipe|timed out waiting", re.IGNORECASE
)
# What NCCL says if settings or a machine do not fit. Another attempt would fail the same way.
_NEVER_WORKS = re.compile(r"invalid ?usage|duplicate gpu|unhandled cuda error", re.IGNORECASE)
_OUT_OF_MEMORY = (
    "lower training.tokens_per_microbatch or data.max_length, or share out more with "
    "scale.deepspeed.stage"
)
INTERFACES = (
    "servers with several network interfaces need GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME set"
)
_MOST_CHARACTERS = 200
_KILLED_FOR_MEMORY = re.compile(r"NODE_OUT_OF_MEMORY|low on memory")


@dataclass(frozen=True)
class Retry:
    """Start the workers again from the last checkpoint."""

    reason: str


@dataclass(frozen=True)
class GiveUp:
    """End the run with this error."""

    error: OrpoRayError


def kind_of(error: BaseException) -> Kind:
    """What ended a worker.

    `ours`: an error of orpo_ray. `memory`: out of memory. `peer`: another worker is gone. `lost`:
    the process itself is gone. `unexpected`: any other exception.
    """
    if isinstance(error, OrpoRayError):
        return "ours"
    if not isinstance(error, RayTrainError) and is_out_of_memory(error):
        return "memory"
    if is_deterministic(error):
        return "unexpected"
    if isinstance(error, RayError | RayTrainError):
        return "memory" if _KILLED_FOR_MEMORY.search(str(error)) else "lost"
    if isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and _PEER_GONE.search(str(error))
    ):
        return "peer"
    return "unexpected"


def is_deterministic(error: BaseException) -> bool:
    """Whether an error of Ray or torch.distributed means a mistake, and not a loss."""
    if isinstance(error, RayTaskError | RuntimeEnvSetupError):
        return True
    return isinstance(error, RuntimeError) and bool(_NEVER_WORKS.search(str(error)))


def decide(failures: Mapping[int, BaseException], retries_left: int) -> Retry | GiveUp:
    """Decide what follows from the failures of workers, by rank. Pure.

    An error of ours and a lack of memory would come again, so they end the run, whatever the other
    workers say. After the loss of a process or a server the workers start again.

    An unexpected exception ends the run, unless a process died at the same time. Then the exception
    may be a consequence: the other workers lose their connection to the dead one.
    """
    ranks: dict[Kind, list[int]] = {}
    for rank, error in sorted(failures.items()):
        ranks.setdefault(kind_of(error), []).append(rank)
    if "ours" in ranks:
        ours = failures[ranks["ours"][0]]
        assert isinstance(ours, OrpoRayError)
        return GiveUp(ours)
    if "memory" in ranks:
        return GiveUp(RunError(f"worker {ranks['memory'][0]} ran out of memory; {_OUT_OF_MEMORY}"))
    if "unexpected" in ranks and "lost" not in ranks:
        rank = ranks["unexpected"][0]
        return GiveUp(RunError(f"worker {rank}: {type(failures[rank]).__name__}: {failures[rank]}"))
    gone = ranks.get("lost")
    reason = f"lost worker {', '.join(map(str, gone))}" if gone else "a worker was lost"
    if retries_left > 0:
        return Retry(reason)
    hint = ""
    if not gone and (peers := ranks.get("peer")):
        # No process is gone, so the network between the workers may be the cause.
        hint = (
            f" (worker {peers[0]}: {on_one_line(failures[peers[0]])[:_MOST_CHARACTERS]}; "
            f"{INTERFACES})"
        )
    return GiveUp(
        RunError(
            f"{reason}; no retry is left (scale.max_failures); the same command resumes the run"
            f"{hint}"
        )
    )
