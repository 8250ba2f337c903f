"""The driver's side of a run under Ray Train: starts workers, passes on news, starts them again."""

import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from ray.exceptions import RayError
from ray.train import PreemptionError
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
)

from orpo_ray.distributed.driver import Driver
from orpo_ray.distributed.entry import train_worker
from orpo_ray.distributed.failures import INTERFACES, GiveUp, Retry, decide, is_deterministic
from orpo_ray.distributed.mailbox import Mailbox, Message
from orpo_ray.distributed.preflight import Placement
from orpo_ray.distributed.ray_thread import RayThread
from orpo_ray.distributed.task import Task
from orpo_ray.errors import OrpoRayError, ResourceError, RunError, StoppedError, on_one_line
from orpo_ray.models.hardware import Hardware, probe_hardware
from orpo_ray.ray_runtime import ROOM_S, joins_cluster
from orpo_ray.runs.console import Console
from orpo_ray.runs.run import Run

_LOST_MAILBOX_S = 60.0
_GROUP_TIMEOUT_S = 1800
"""The longest that a worker waits for the others, who may write a checkpoint to slow storage."""

# Files of Ray Train in a run's folder, from which it would resume. Our runs resume from the
# manifests of their checkpoints instead.
_RAYS_OWN = ("checkpoint_manager_snapshot.json", ".validate_storage_marker")

_NO_ACTOR = b"\xff" * 16
_MAY_BE_EXCUSED = (
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
    PreemptionError,
    RayError,
)

_START_TIMEOUT, _RAYS_START_S = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", 60.0
_ENDING_S, _ENDING_POLL_S = 5.0, 0.1
_BUSY_AFTER_S = 5.0
"""If there is room, Ray finds it within two seconds. After this time the cluster is busy."""

_STOPPED = "stopped; the same command resumes the run from its last checkpoint, if there is one"

_SETTINGS = {
    # Nothing here reads what these two would gather.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    # Each checkpoint, and the end of a run, waits for Ray's next look at the workers. Ray's default
    # is 2 s.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # Relative paths in the config start in the folder where the command was given.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}


class Group(Protocol):
    """Workers from one start, as the driver sees them; tests have a group without Ray."""

    @property
    def error(self) -> Exception | None:
        """The error that ended the workers, or None."""

    def is_alive(self) -> bool:
        """Whether the workers start or train."""

    def join(self, timeout: float) -> None:
        """Wait for the workers' end, at most `timeout` seconds."""

    def collect(self) -> list[Message]:
        """News from the workers since the last call."""

    def request_stop(self) -> bool:
        """Ask the workers to end with a checkpoint; returns whether one of them listens yet."""

    def waits_for_room(self) -> bool:
        """Whether the workers wait for free CPUs or GPUs."""

    def leave(self) -> None:
        """Let go of the workers, whether they have ended or not."""


Start = Callable[[Run, Placement, Task], Group]


class RayGroup:
    """Workers under Ray Train, with the mailbox that they share with this process."""

    def __init__(self, run: Run, placement: Placement, task: Task) -> None:
        """Start the workers."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        os.environ |= {name: os.environ.get(name, value) for name, value in _SETTINGS.items()}
        # The mailbox is on the driver's server, so that it survives the loss of any other server.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        mailbox: Any = ray.remote(Mailbox)
        self._mailbox = mailbox.options(num_cpus=0, scheduling_strategy=here).remote()
        free_what_dead_controllers_hold()
        settings = {"task": task, "mailbox": self._mailbox}
        self._trainer = _trainer(run, placement, settings)
        self._fitting = RayThread(self._trainer.fit)
        self._fitting.start()

    @property
    def error(self) -> Exception | None:
        """What `fit()` raised."""
        return self._fitting.error

    def is_alive(self) -> bool:
        """Whether `fit()` still runs."""
        return self._fitting.is_alive()

    def join(self, timeout: float) -> None:
        """Wait for the end of `fit()`."""
        self._fitting.join(timeout)

    def collect(self) -> list[Message]:
        """All messages in the mailbox. Raises RayError if the mailbox is lost."""
        import ray

        news: list[Message] = ray.get(self._mailbox.collect.remote(), timeout=_LOST_MAILBOX_S)
        return news

    def request_stop(self) -> bool:
        """Leave the request in the mailbox. Raises RayError if the mailbox is lost."""
        import ray

        heard: bool = ray.get(self._mailbox.request_stop.remote(), timeout=_LOST_MAILBOX_S)
        return heard

    def waits_for_room(self) -> bool:
        """Whether a controller of this job still waits for the place that it asked for."""
        pending = [group for group in _groups_of_controllers() if group.state == group.PENDING]
        asked_at = [group.placement_group_creation_timestamp_ms / 1000 for group in pending]
        return any(time.time() - since > _BUSY_AFTER_S for since in asked_at)

    def leave(self) -> None:
        """Call Ray no more for these workers, and end those that still run."""
        import ray

        self._trainer.end()
        self._fitting.join(_ENDING_POLL_S)  # `fit()` usually notices that end by itself
        self._fitting.leave()
        ray.kill(self._mailbox)


def train(driver: Driver, start: Start = RayGroup) -> None:
    """Train under Ray Train until the run is finished.

    After a loss the workers start again from the last checkpoint, on what is left of the cluster.
    This happens `scale.max_failures` times. Raises the error of the failed worker with the lowest
    rank, StoppedError after a stop, ResourceError if the workers cannot be started.
    """
    scale, announce = driver.run.config.scale, driver.console.announce
    retries_left = scale.max_failures
    while True:
        if driver.console.stop_requested():
            raise StoppedError(_STOPPED)
        workers = driver.placement.workers
        announce(f"starting {workers} {'workers' if workers > 1 else 'worker'} under Ray Train")
        is_first = retries_left == scale.max_failures
        with _patience(scale.queue_timeout if is_first and joins_cluster() else 0):
            error = _attempt(driver, start)
        if error is None:
            return
        decision = _decide(error, driver.placement, retries_left, is_first)
        if isinstance(decision, GiveUp):
            raise decision.error from error
        retries_left -= 1
        announce(
            f"{decision.reason}; resuming from the last checkpoint ({retries_left} retries left)"
        )
        driver.place_again()


@contextmanager
def _patience(queue_timeout: float) -> Iterator[None]:
    """Make Ray Train wait so long for room, in case another run took it at the same moment.

    After a loss the timeout is 0, so that the run looks at what is left of the cluster instead.
    """
    if _START_TIMEOUT in os.environ or queue_timeout <= _RAYS_START_S:
        yield
        return
    os.environ[_START_TIMEOUT] = str(queue_timeout)
    try:
        yield
    finally:
        del os.environ[_START_TIMEOUT]


def _attempt(driver: Driver, start: Start) -> Exception | None:
    """Start the workers once and pass on their news; returns what Ray Train raised, or None."""
    _forget(driver.run)
    group = start(driver.run, driver.placement, driver.task)
    try:
        _attend(group, driver)
    except RayError as error:
        raise RunError(
            f"the connection to Ray is lost: {error}; the same command resumes the run"
        ) from error
    finally:
        group.leave()
    _forget(driver.run)
    return group.error


def _attend(group: Group, driver: Driver) -> None:
    """Pass on news until the workers end. Raises StoppedError for a stop before they listen."""
    told_to_stop, silent = False, True
    while group.is_alive():
        if silent and group.waits_for_room():
            silent = False
            driver.console.announce(
                "the cluster is busy; the workers start when others leave them room"
            )
        if driver.console.stop_requested() and not told_to_stop:
            told_to_stop = True
            if not group.request_stop():
                raise StoppedError(_STOPPED)  # workers that are still starting have nothing to save
        group.join(driver.poll_s)
        news = group.collect()
        silent = silent and not news
        _pass_on(news, driver.console)
    _pass_on(group.collect(), driver.console)


def _forget(run: Run) -> None:
    for name in _RAYS_OWN:
        run.path(name).unlink(missing_ok=True)


def free_what_dead_controllers_hold() -> None:
    """Free what dead controllers of this job reserved; Ray would keep it until the job ends."""
    import ray
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    for group in _groups_of_controllers():
        if group.creator_actor_dead:
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))


def free_what_controllers_held() -> None:
    """Free all that controllers of this job reserved.

    The controllers are ending, but Ray notices that a little later, so this waits for it.
    """
    deadline = time.monotonic() + _ENDING_S
    while _held_groups() and time.monotonic() < deadline:
        free_what_dead_controllers_hold()
        time.sleep(_ENDING_POLL_S)


def _held_groups() -> list[Any]:
    return [group for group in _groups_of_controllers() if group.state != group.REMOVED]


def _groups_of_controllers() -> list[Any]:
    """The placement groups that controllers of this job have asked for.

    Ray's public table does not show who made a group, so Ray's own records are read.
    """
    import ray
    from ray._private.state import state
    from ray.core.generated import gcs_pb2

    messages: Any = gcs_pb2
    job = ray.get_runtime_context().get_job_id()
    records = state._connect_and_get_accessor().get_placement_group_table()
    groups = map(messages.PlacementGroupTableData.FromString, records)
    # A group that no actor made, such as a trial's under Tune, does not belong to a controller.
    return [
        group
        for group in groups
        if group.creator_actor_id != _NO_ACTOR and group.creator_job_id.hex() == job
    ]


def _pass_on(messages: list[Message], console: Console) -> None:
    for message in messages:
        if message.kind == "metrics":
            console.watch(*message.content)
        else:
            console.announce(message.content)


def _trainer(run: Run, placement: Placement, settings: dict[str, Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import ray.train

        from orpo_ray.distributed.network import GroupConfig
        from orpo_ray.distributed.trainer import LeanTrainer

    # ray.train exports the names of V2 when it runs, but other names to type checkers.
    train: Any = ray.train
    on_gpu = placement.gpus > 0
    resources = {"CPU": placement.cpus, **({"GPU": placement.gpus} if on_gpu else {})}
    return LeanTrainer(
        train_worker,
        owns_ray=placement.own_ray,
        train_loop_config=settings,
        backend_config=GroupConfig("nccl" if on_gpu else "gloo", _GROUP_TIMEOUT_S),
        scaling_config=train.ScalingConfig(
            num_workers=placement.workers, use_gpu=on_gpu, resources_per_worker=resources
        ),
        run_config=train.RunConfig(
            # Ray's folder is the run's own, since Ray records only checkpoints inside its folder.
            name=run.folder.name,
            storage_path=str(run.folder.parent),
            logging_config=train.LoggingConfig(log_level="ERROR"),
            # `_decide` says whether to start again. Ray would retry after a user's error too.
            failure_config=train.FailureConfig(
                max_failures=0, controller_failure_limit=0, max_preemption_failures=0
            ),
        ),
    )


def _decide(
    error: Exception, placement: Placement, retries_left: int, is_first: bool
) -> Retry | GiveUp:
    """Decide what follows from an error of Ray Train."""
    from ray.train import ControllerError, WorkerGroupError

    if isinstance(error, WorkerGroupError):
        return decide(error.worker_failures, retries_left)
    if isinstance(error, OrpoRayError):
        return GiveUp(error)
    cause = error.controller_failure if isinstance(error, ControllerError) else error
    if isinstance(cause, WorkerGroupStartupTimeoutError) and (is_first or not retries_left):
        busy = (
            f"{placement.workers} workers could not be started in time; is the cluster busy, or "
            "a server down?"
        )
        return GiveUp(ResourceError(busy))
    # Ray needs a while to notice a dead server, so the cluster is looked at again before the retry.
    if isinstance(cause, _MAY_BE_EXCUSED) and not is_deterministic(cause) and retries_left > 0:
        return Retry(
            "a server or Ray Train's controller was lost, or the workers could not be started"
        )
    said = on_one_line(error)
    hint = INTERFACES if "onnect" in said else "the same command resumes the run"
    return GiveUp(RunError(f"Ray Train failed: {said[:300]}; {hint}"))


def probe_worker(placement: Placement) -> Hardware:
    """The hardware that a worker has. This process may have no GPU, or one of another kind."""
    import ray

    probe = ray.remote(probe_hardware).options(num_cpus=placement.cpus, num_gpus=placement.gpus)
    try:
        found: Hardware = ray.get(probe.remote(), timeout=ROOM_S)
    except ray.exceptions.GetTimeoutError as error:
        raise ResourceError(f"no GPU of the cluster was free within {ROOM_S} s") from error
    return found
