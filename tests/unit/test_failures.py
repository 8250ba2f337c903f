"""What ended a worker, and what follows: errors that Ray, torch and gloo were seen to raise."""

import pytest
import torch
import torch.distributed as dist
from ray.core.generated.common_pb2 import ActorDiedErrorContext
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    NodeDiedError,
    OutOfMemoryError,
    WorkerCrashedError,
)
from ray.train.v2._internal.exceptions import (
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)

from orpo_ray.distributed.failures import GiveUp, Kind, Retry, decide, kind_of
from orpo_ray.errors import (
    ConfigError,
    NonFiniteError,
    OrpoRayError,
    ResourceError,
    RunError,
    StoppedError,
)

GLOO = (
    "[../third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer "
    "[127.0.0.1]:27287"
)
GLOO_RESET = (
    "[.../gloo/transport/tcp/pair.cc:547] Read error [127.0.0.1]:18262: Connection reset by peer"
)
NCCL = (
    "NCCL error in: ProcessGroupNCCL.cpp:2356, remote process exited or there was a network error"
)
EXIT_DETAIL = (
    "Worker exit type: {kind} Worker exit detail: Worker unexpectedly exits with a connection "
    "error code 2. End of "
    "file. Some common causes include: (1) the process was killed by the OOM killer due to high "
    "memory usage, (2) ray "
    "stop --force was called, or (3) the worker crashed unexpectedly due to SIGSEGV or another "
    "unexpected error."
)
KILLED_FOR_MEMORY = (
    "Memory on the node (IP: 10.0.0.2) was 120.1GB / 125.0GB (0.96), which exceeds the memory "
    "usage threshold of 0.95. "
    "Ray killed this worker because the node is running low on memory."
)


def died(text: str) -> ActorDiedError:
    """As Ray raises it when an actor's process is gone."""
    return ActorDiedError(ActorDiedErrorContext(error_message=text, actor_id=b"0" * 16))


def unhealthy(cause: Exception) -> WorkerHealthCheckFailedError:
    """As Ray Train reports a worker that does not answer."""
    return WorkerHealthCheckFailedError(
        "A worker health check failed.\nWorker info: Worker(...)", cause
    )


NON_FINITE = NonFiniteError("the loss of step 3 is not finite")
UNKNOWN_TARGET = ConfigError("adapter.targets: nope_proj")
KILLED = unhealthy(died(EXIT_DETAIL.format(kind="SYSTEM_ERROR")))
PEER_GONE = RuntimeError(GLOO)
BUG = ValueError("shapes [3] and [4]")

KINDS: dict[str, tuple[BaseException, Kind]] = {
    "a user's error": (UNKNOWN_TARGET, "ours"),
    "an error of ours that talks of gloo": (RunError("gloo: connection closed"), "ours"),
    "non-finite": (NON_FINITE, "ours"),
    "stopped": (StoppedError("stopped at step 3"), "ours"),
    "memory of a GPU": (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        "memory",
    ),
    "memory of the machine": (MemoryError(), "memory"),
    "killed by Ray's memory monitor": (unhealthy(OutOfMemoryError(KILLED_FOR_MEMORY)), "memory"),
    "exit type of Ray's memory monitor": (
        unhealthy(died(EXIT_DETAIL.format(kind="NODE_OUT_OF_MEMORY"))),
        "memory",
    ),
    "memory, told by the actor itself": (OutOfMemoryError(KILLED_FOR_MEMORY), "memory"),
    "killed; Ray guesses at the OOM killer": (KILLED, "lost"),
    "killed, told by the actor itself": (died(EXIT_DETAIL.format(kind="SYSTEM_ERROR")), "lost"),
    "node gone": (unhealthy(NodeDiedError("node 10.0.0.3 is dead")), "lost"),
    "unreachable": (ActorUnavailableError("RpcError", None), "lost"),
    "does not answer": (
        WorkerHealthCheckTimeoutError("A worker health check has been hanging for 600 s"),
        "lost",
    ),
    "crashed": (WorkerCrashedError(), "lost"),
    "gloo, peer closed": (PEER_GONE, "peer"),
    "gloo, peer reset": (RuntimeError(GLOO_RESET), "peer"),
    "nccl": (RuntimeError(NCCL), "peer"),
    "torch says so itself": (dist.DistNetworkError("Broken pipe"), "peer"),
    "torch's backend": (dist.DistBackendError("NCCL timed out"), "peer"),
    "a bug": (BUG, "unexpected"),
    "NCCL without memory": (RuntimeError("NCCL error: Cuda failure 2 'out of memory'"), "memory"),
    "two workers on one GPU": (
        RuntimeError("ncclInvalidUsage: Duplicate GPU detected"),
        "unexpected",
    ),
    "a bug in torch": (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), "unexpected"),
    "a bug that mentions NCCL but is no failure of it": (KeyError("nccl"), "unexpected"),
    "disk": (OSError(28, "No space left on device"), "unexpected"),
}


@pytest.mark.parametrize("name", KINDS)
def test_what_ended_a_worker(name: str) -> None:
    error, kind = KINDS[name]
    assert kind_of(error) == kind


RETRIED: dict[str, tuple[dict[int, BaseException], str]] = {
    "the only one": ({0: KILLED}, "lost worker 0"),
    "one, the other noticed": ({0: PEER_GONE, 1: KILLED}, "lost worker 1"),
    "one, before the other noticed": ({1: KILLED}, "lost worker 1"),
    "two of four": ({3: KILLED, 0: PEER_GONE, 1: KILLED, 2: PEER_GONE}, "lost worker 1, 3"),
    "only what the others saw": ({1: PEER_GONE}, "a worker was lost"),
    "a follow-up that nobody foresaw": ({0: BUG, 1: KILLED}, "lost worker 1"),
}


@pytest.mark.parametrize("name", RETRIED)
@pytest.mark.parametrize("left", [1, 3])
def test_a_lost_worker_is_excused(name: str, left: int) -> None:
    failures, reason = RETRIED[name]
    assert decide(failures, left) == Retry(reason)


@pytest.mark.parametrize("name", RETRIED)
def test_no_more_often_than_was_allowed(name: str) -> None:
    failures, reason = RETRIED[name]
    decision = decide(failures, 0)
    assert isinstance(decision, GiveUp)
    assert type(decision.error) is RunError
    assert str(decision.error).startswith(f"{reason}; no retry is left (scale.max_failures)")


def test_the_last_word_tells_what_the_workers_heard_where_none_of_them_is_gone() -> None:
    decision = decide({1: PEER_GONE}, 0)
    assert isinstance(decision, GiveUp)
    assert f"(worker 1: {PEER_GONE}; servers with several network interfaces need" in str(
        decision.error
    )
    decision = decide({0: PEER_GONE, 1: KILLED}, 0)
    assert isinstance(decision, GiveUp)
    assert str(decision.error).endswith("the same command resumes the run")


MEMORY = "ran out of memory; lower training.tokens_per_microbatch"
FINAL: dict[str, tuple[dict[int, BaseException], type[OrpoRayError], str]] = {
    "non-finite on every rank": (
        {0: NON_FINITE, 1: NON_FINITE},
        NonFiniteError,
        "the loss of step 3",
    ),
    "non-finite, and a peer that is gone": (
        {0: PEER_GONE, 1: NON_FINITE},
        NonFiniteError,
        "the loss of step 3",
    ),
    "a user's error": (
        {0: UNKNOWN_TARGET, 1: UNKNOWN_TARGET},
        ConfigError,
        "adapter.targets: nope_proj",
    ),
    "a user's error of one rank": (
        {0: PEER_GONE, 1: UNKNOWN_TARGET},
        ConfigError,
        "adapter.targets: nope_proj",
    ),
    "what is lacking": ({0: ResourceError("no bfloat16")}, ResourceError, "no bfloat16"),
    "stopped": (
        {0: StoppedError("stopped at step 3"), 1: StoppedError("stopped")},
        StoppedError,
        "stopped at step 3",
    ),
    "memory": ({1: torch.OutOfMemoryError("CUDA out of memory")}, RunError, f"worker 1 {MEMORY}"),
    "memory, others noticed": (
        {0: PEER_GONE, 1: MemoryError(), 2: PEER_GONE},
        RunError,
        f"worker 1 {MEMORY}",
    ),
    "memory of the node": (
        {0: PEER_GONE, 1: unhealthy(OutOfMemoryError(KILLED_FOR_MEMORY))},
        RunError,
        MEMORY,
    ),
    "a bug, to which others lose the connection": (
        {0: BUG, 1: PEER_GONE},
        RunError,
        "worker 0: ValueError: shapes [3] and [4]",
    ),
    "a bug": ({0: BUG, 1: BUG}, RunError, "worker 0: ValueError: shapes [3] and [4]"),
    "the first rank's": ({2: BUG, 1: KeyError("late")}, RunError, "worker 1: KeyError: 'late'"),
    "ours rather than a death": ({0: KILLED, 1: UNKNOWN_TARGET}, ConfigError, "adapter.targets"),
}


@pytest.mark.parametrize("name", FINAL)
@pytest.mark.parametrize("left", [0, 3])
def test_what_would_only_happen_again_ends_the_run(name: str, left: int) -> None:
    failures, kind, message = FINAL[name]
    decision = decide(failures, left)
    assert isinstance(decision, GiveUp)
    assert type(decision.error) is kind
    assert message in str(decision.error)


def test_exit_codes_follow_from_what_went_wrong() -> None:
    codes = {name: decide(FINAL[name][0], 3).error.exit_code for name in FINAL}  # type: ignore[union-attr]
    assert [codes[name] for name in ("a user's error", "what is lacking", "stopped")] == [2, 3, 4]
    assert {codes[name] for name in ("non-finite on every rank", "memory", "a bug")} == {1}
