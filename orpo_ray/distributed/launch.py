"""The driver's side of a run under Ray Train: starts the workers, shows what they do, and starts
them again.
"""

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
"""The longest that a worker waits for the others; a checkpoint on slow storage is written in that
time.
"""

# What Ray Train keeps in a run's folder, and would go on from; ours are the manifests of the
# checkpoints.
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
"""Ray finds a place that is free within a second or two."""

_STOPPED = "stopped; the same command goes on from the last checkpoint, if there is one"

_SETTINGS = {
    # Nothing here asks for its news.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    # Each checkpoint, and the end, waits for Ray's next look: every 2 s if it is not told
    # otherwise.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # Workers read relative paths of the config from where the command was given.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}


class Group(Protocol):
    """Workers that were started once, as the driver sees them; tests have one without Ray."""

    @property
    def error(self) -> Exception | None:
        """What ended them, if anything did."""

    def is_alive(self) -> bool:
        """Whether they start or train."""

    def join(self, timeout: float) -> None:
        """Wait for their end, so long at most."""

    def collect(self) -> list[Message]:
        """Their news since the last call."""

    def request_stop(self) -> bool:
        """Ask them to end with a checkpoint; whether one of them listens already."""

    def waits_for_room(self) -> bool:
        """Whether no place was found for them yet."""

    def leave(self) -> None:
        """Have nothing more to do with them, whether they have ended or not."""


Start = Callable[[Run, Placement, Task], Group]


class RayGroup:
    """Workers under Ray Train, with the mailbox that they share with this process."""

    def __init__(self, run: Run, placement: Placement, task: Task) -> None:
        """Start them."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        os.environ |= {name: os.environ.get(name, value) for name, value in _SETTINGS.items()}
        # Where the driver is, so that no other server's death can take it along.
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
        """Whether `fit()` is at work."""
        return self._fitting.is_alive()

    def join(self, timeout: float) -> None:
        """Wait for the end of `fit()`."""
        self._fitting.join(timeout)

    def collect(self) -> list[Message]:
        """What the mailbox holds. Raises RayError where it is lost, as it does for a stop."""
        import ray

        news: list[Message] = ray.get(self._mailbox.collect.remote(), timeout=_LOST_MAILBOX_S)
        return news

    def request_stop(self) -> bool:
        """Leave the wish in the mailbox."""
        import ray

        heard: bool = ray.get(self._mailbox.request_stop.remote(), timeout=_LOST_MAILBOX_S)
        return heard

    def waits_for_room(self) -> bool:
        """Whether Ray has not found the place yet that a controller of this job asked for."""
        pending = [group for group in _groups_of_controllers() if group.state == group.PENDING]
        asked_at = [group.placement_group_creation_timestamp_ms / 1000 for group in pending]
        return any(time.time() - since > _BUSY_AFTER_S for since in asked_at)

    def leave(self) -> None:
        """Call Ray no more for them. Those at work end, though this process lives on."""
        import ray

        self._trainer.end()
        self._fitting.join(_ENDING_POLL_S)  # it hears of that end by itself
        self._fitting.leave()
        ray.kill(self._mailbox)


def train(driver: Driver, start: Start = RayGroup) -> None:
    """Train under Ray Train until the run is finished.

    Workers that are lost are started again from the last checkpoint, `scale.max_failures` times, on
    what is left of the cluster. Raises what the first worker to fail raised, StoppedError after a
    stop, ResourceError if the workers cannot be started.
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
            f"{decision.reason}; going on from the last checkpoint ({retries_left} retries left)"
        )
        driver.place_again()


@contextmanager
def _patience(queue_timeout: float) -> Iterator[None]:
    """Have Ray Train wait so long for workers that others, who came at the same moment, leave no
    room for.

    After a loss it must not: what is left of the cluster is looked at again instead.
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
    """Start the workers once, and pass on their news until they end; what Ray Train raised, if
    anything.
    """
    _forget(driver.run)
    group = start(driver.run, driver.placement, driver.task)
    try:
        _attend(group, driver)
    except RayError as error:
        raise RunError(
            f"the connection to Ray is lost: {error}; the same command goes on"
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
    """Give back what controllers of this job had reserved for workers: Ray keeps it until their job
    ends, too.
    """
    import ray
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    for group in _groups_of_controllers():
        if group.creator_actor_dead:
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))


def free_what_controllers_held() -> None:
    """Give back all that controllers of this job had reserved, who are ending: Ray is told a little
    later.
    """
    deadline = time.monotonic() + _ENDING_S
    while _held_groups() and time.monotonic() < deadline:
        free_what_dead_controllers_hold()
        time.sleep(_ENDING_POLL_S)


def _held_groups() -> list[Any]:
    return [group for group in _groups_of_controllers() if group.state != group.REMOVED]


def _groups_of_controllers() -> list[Any]:
    """The places for workers that actors of this job have asked for.

    Ray's public table of placement groups does not tell who made them; its records do.
    """
    import ray
    from ray._private.state import state
    from ray.core.generated import gcs_pb2

    messages: Any = gcs_pb2
    job = ray.get_runtime_context().get_job_id()
    records = state._connect_and_get_accessor().get_placement_group_table()
    groups = map(messages.PlacementGroupTableData.FromString, records)
    # What no actor has made, such as a trial's place under Tune, is not a controller's.
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

    # What it exports is chosen when it is imported: that of V2, though not for type checkers.
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
            # Its folder is the run's own: Ray takes note of checkpoints only where it lies above
            # them.
            name=run.folder.name,
            storage_path=str(run.folder.parent),
            logging_config=train.LoggingConfig(log_level="ERROR"),
            # Whether to start again is decided here, from what went wrong; Ray would retry a user's
            # error too.
            failure_config=train.FailureConfig(
                max_failures=0, controller_failure_limit=0, max_preemption_failures=0
            ),
        ),
    )


def _decide(
    error: Exception, placement: Placement, retries_left: int, is_first: bool
) -> Retry | GiveUp:
    """What follows from what Ray Train raised."""
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
    # A dead server takes Ray a while to notice, so what is left of the cluster is looked at again.
    if isinstance(cause, _MAY_BE_EXCUSED) and not is_deterministic(cause) and retries_left > 0:
        return Retry(
            "a server or Ray Train's controller was lost, or the workers could not be started"
        )
    said = on_one_line(error)
    hint = INTERFACES if "onnect" in said else "the same command goes on"
    return GiveUp(RunError(f"Ray Train failed: {said[:300]}; {hint}"))


def probe_worker(placement: Placement) -> Hardware:
    """What a worker's GPU is, asked where it is: this process may have none, or another kind."""
    import ray

    probe = ray.remote(probe_hardware).options(num_cpus=placement.cpus, num_gpus=placement.gpus)
    try:
        found: Hardware = ray.get(probe.remote(), timeout=ROOM_S)
    except ray.exceptions.GetTimeoutError as error:
        raise ResourceError(f"no GPU of the cluster was free within {ROOM_S} s") from error
    return found
