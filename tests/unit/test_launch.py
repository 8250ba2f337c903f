"""What the driver of a run decides, with a fake of Ray's trainer. No Ray starts."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import pytest
from ray.exceptions import ActorDiedError, NodeDiedError
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
)
from support import HANG_S, run_config, wait_until, write_pairs

from orpo_ray.data.store import Artifact
from orpo_ray.distributed import run
from orpo_ray.distributed.driver import Driver
from orpo_ray.distributed.launch import train
from orpo_ray.distributed.mailbox import Mailbox, Message
from orpo_ray.distributed.preflight import Placement
from orpo_ray.distributed.ray_thread import RayThread
from orpo_ray.distributed.task import Task
from orpo_ray.errors import (
    ConfigError,
    NonFiniteError,
    OrpoRayError,
    ResourceError,
    RunError,
    StoppedError,
)
from orpo_ray.models.hardware import CPU
from orpo_ray.runs.console import SILENT, Console
from orpo_ray.runs.run import Run
from orpo_ray.training.decisions import Setup

TWO = Placement(workers=2, cpus=1, gpus=0, nodes=1, uses_ray=True)
ONE = Placement(workers=1, cpus=1, gpus=0, nodes=1, uses_ray=True)
FIRST, AGAIN = (cast(Setup, name) for name in ("first", "again"))
"""What was decided for the run. The tests only pass it on."""
STARTING = "starting 2 workers under Ray Train"
BUSY = "the cluster is busy; the workers start when others leave them room"
STOPPED = "stopped; the same command resumes the run from its last checkpoint, if there is one"
START_TIMEOUT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"


def failed(*failures: Exception) -> WorkerGroupError:
    """What Ray Train raises if workers fail; the errors are in order of rank."""
    return WorkerGroupError("", dict(enumerate(failures)))


def killed() -> Exception:
    """What Ray Train reports for a worker whose process is gone."""
    return WorkerHealthCheckFailedError("A worker health check failed.", ActorDiedError())


class Trainer:
    """A fake of Ray's: `fit()` does its work, then returns, raises, or hangs until it is left."""

    HANGS = object()

    def __init__(self, scene: "Scene", mailbox: Mailbox) -> None:
        self._work, self._ends, self._mailbox = scene.work, scene.ends, mailbox

    def fit(self) -> None:
        self._work(self._mailbox)
        if isinstance(self._ends, Exception):
            raise self._ends
        if self._ends is self.HANGS:
            wait_until(lambda: False, "its being left")


@dataclass
class Scene:
    """What happens at one start of the workers, and what the driver made of it."""

    ends: Exception | object | None = None
    work: Callable[[Mailbox], None] = lambda mailbox: None
    room: Iterator[bool] = field(default_factory=lambda: iter([]))
    """Whether the workers wait for room, at each look of the driver; after the last, no more."""
    last_words: list[Message] = field(default_factory=list)
    """A line that arrives after the driver's last regular look into the mailbox."""
    lost: Exception | None = None
    """What a call of the mailbox raises."""
    placement: Placement | None = None
    setup: Setup | None = None
    start_timeout: str | None = None
    stops_asked: int = 0
    left: bool = False
    thread: RayThread | None = None

    def ends_for_good(self) -> bool:
        """Whether the thread of a group that was left calls Ray no more."""
        assert self.left and self.thread is not None
        self.thread.join(HANG_S)
        return not self.thread.is_alive()


class FakeGroup(RayThread):
    """The group of a scene: the thread and the mailbox are real, the trainer is not."""

    def __init__(self, scene: Scene, placement: Placement, task: Task) -> None:
        self._scene, self._mailbox = scene, Mailbox()
        super().__init__(Trainer(scene, self._mailbox).fit)
        scene.placement, scene.setup = placement, task.setup
        scene.start_timeout, scene.thread = os.environ.get(START_TIMEOUT), self
        self.start()

    def is_alive(self) -> bool:
        alive = super().is_alive()
        if not alive and self._scene.last_words:
            self._mailbox.post(self._scene.last_words.pop())
        return alive

    def collect(self) -> list[Message]:
        if self._scene.lost is not None:
            raise self._scene.lost
        return self._mailbox.collect()

    def request_stop(self) -> bool:
        self._scene.stops_asked += 1
        return self._mailbox.request_stop()

    def waits_for_room(self) -> bool:
        return next(self._scene.room, False)

    def leave(self) -> None:
        super().leave()
        self._scene.left = True


@dataclass
class Stage(Console):
    """A run on two workers whose starts are scenes, played in order; all must be played."""

    run: Run
    artifact: Artifact
    told: list[Any] = field(default_factory=list)
    """News and lines, in the order in which the user sees them."""
    placed_again: int = 0
    stop: bool = False

    def play(self, *scenes: Scene) -> None:
        coming = iter(scenes)

        def start(run: Run, placement: Placement, task: Task) -> FakeGroup:
            return FakeGroup(next(coming), placement, task)

        def look_again() -> tuple[Placement, Setup]:
            self.placed_again += 1
            return ONE, AGAIN

        driver = Driver(
            run=self.run,
            artifact=self.artifact,
            console=self,
            placement=TWO,
            setup=FIRST,
            look_again=look_again,
            poll_s=0.001,
        )
        train(driver, start)
        assert not list(coming), "a start that was expected did not come"

    def announce(self, line: str) -> None:
        self.told.append(line)

    def watch(self, step: int, total_steps: int, metrics: dict[str, float]) -> None:
        self.told.append((step, total_steps, metrics))

    def stop_requested(self) -> bool:
        return self.stop

    def fails(self, kind: type[OrpoRayError], *scenes: Scene) -> str:
        """Play to the error that ends it; its message."""
        with pytest.raises(OrpoRayError) as caught:
            self.play(*scenes)
        assert type(caught.value) is kind
        return str(caught.value)


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv(START_TIMEOUT, raising=False)
    scale = {"workers": 2, "max_failures": 1, "queue_timeout": 300}
    config = run_config(tmp_path, scale=scale)
    config.run_dir.mkdir()
    return Stage(Run(config), write_pairs(tmp_path, [], []))


# --- the end, and news ----------------------------------------------------------------------------


def test_a_run_that_ends_is_started_once(stage: Stage) -> None:
    scene = Scene()
    stage.play(scene)
    assert stage.told == [STARTING]
    assert (scene.placement, scene.setup, scene.left) == (TWO, FIRST, True)


def test_news_is_passed_on_in_order_the_last_of_it_too(stage: Stage) -> None:
    first, last = (1, 2, {"train/loss": 0.5}), (2, 2, {"train/loss": 0.25})

    def work(mailbox: Mailbox) -> None:
        mailbox.post(Message("announce", "loading"))
        mailbox.post(Message("metrics", first))
        wait_until(lambda: first in stage.told, "the driver's look into the mailbox")
        mailbox.exchange(Message("metrics", last))

    stage.play(Scene(work=work, last_words=[Message("announce", "done")]))
    assert stage.told == [STARTING, "loading", first, last, "done"]


def test_what_ray_keeps_in_the_runs_folder_is_gone_before_and_after(stage: Stage) -> None:
    kept = stage.run.config.run_dir / "checkpoint_manager_snapshot.json"
    kept.touch()
    found: list[bool] = []

    def work(mailbox: Mailbox) -> None:
        found.append(kept.exists())
        kept.touch()

    stage.play(Scene(work=work))
    assert found == [False] and not kept.exists()


# --- losses, and what is none ---------------------------------------------------------------------

LOSSES: dict[str, tuple[Exception, str]] = {
    "a worker": (failed(RuntimeError("gloo: connection closed"), killed()), "lost worker 1"),
    "the controller": (ActorDiedError(), "a server or Ray Train's controller was lost"),
    "a server, while workers start": (
        ControllerError(WorkerGroupStartupFailedError("worker 0 could not be started")),
        "a server or Ray Train's controller was lost",
    ),
    "a server, told by the controller": (
        ControllerError(NodeDiedError("node 10.0.0.3 is dead")),
        "a server or Ray Train's controller was lost",
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_after_a_loss_workers_start_again_on_what_is_left(stage: Stage, name: str) -> None:
    error, reason = LOSSES[name]
    lost, again = Scene(error), Scene()
    stage.play(lost, again)
    assert stage.placed_again == 1
    assert (again.placement, again.setup) == (ONE, AGAIN)
    assert lost.left and again.left
    first, told, second = stage.told
    assert told.startswith(reason)
    assert told.endswith("; resuming from the last checkpoint (0 retries left)")
    assert (first, second) == (STARTING, "starting 1 worker under Ray Train")


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_too_many_ends_the_run(stage: Stage, name: str) -> None:
    error, _ = LOSSES[name]
    line = stage.fails(RunError, Scene(failed(killed())), Scene(error))
    assert "no retry is left (scale.max_failures)" in line or line.startswith("Ray Train failed: ")
    assert line.endswith("the same command resumes the run")
    assert stage.placed_again == 1


@pytest.mark.parametrize(
    ("error", "kind", "told"),
    [
        (
            failed(killed(), ConfigError("adapter.targets: nope")),
            ConfigError,
            "adapter.targets: nope",
        ),
        (failed(NonFiniteError("the loss of step 3")), NonFiniteError, "the loss of step 3"),
        (failed(MemoryError()), RunError, "worker 0 ran out of memory"),
        (failed(ValueError("shapes [3]")), RunError, "worker 0: ValueError: shapes [3]"),
        (ConfigError("storage: not seen"), ConfigError, "storage: not seen"),
        (
            ValueError("bad scaling"),
            RunError,
            "Ray Train failed: bad scaling; the same command resumes the run",
        ),
        (ValueError("cannot connect"), RunError, "servers with several network interfaces need"),
    ],
)
def test_what_would_only_happen_again_is_not_retried(
    stage: Stage, error: Exception, kind: type[OrpoRayError], told: str
) -> None:
    scene = Scene(error)
    assert told in stage.fails(kind, scene)
    assert stage.placed_again == 0 and stage.told == [STARTING]
    assert scene.left


# --- room -----------------------------------------------------------------------------------------


def test_a_busy_cluster_is_announced_once(stage: Stage) -> None:
    def work(mailbox: Mailbox) -> None:
        wait_until(lambda: BUSY in stage.told, "the announcement")
        mailbox.post(Message("announce", "loading"))
        wait_until(lambda: "loading" in stage.told, "the news")

    stage.play(Scene(work=work, room=iter([False, True, True, True])))
    assert stage.told == [STARTING, BUSY, "loading"]


def test_workers_that_have_spoken_wait_for_no_room(stage: Stage) -> None:
    """A pending group is then that of another run in the same job, such as a trial."""

    def pending() -> Iterator[bool]:
        while True:
            yield "loading" in stage.told

    def work(mailbox: Mailbox) -> None:
        mailbox.post(Message("announce", "loading"))
        wait_until(lambda: "loading" in stage.told, "the news")
        mailbox.post(Message("announce", "training"))
        wait_until(lambda: "training" in stage.told, "another turn of the driver's")

    stage.play(Scene(work=work, room=pending()))
    assert stage.told == [STARTING, "loading", "training"]


def test_workers_that_find_no_room_in_time_are_lacking_resources(stage: Stage) -> None:
    line = stage.fails(ResourceError, Scene(ControllerError(WorkerGroupStartupTimeoutError(2))))
    assert line == "2 workers could not be started in time; is the cluster busy, or a server down?"
    assert stage.placed_again == 0


def test_after_a_loss_missing_room_is_looked_for_again_while_retries_are_left(stage: Stage) -> None:
    scale = stage.run.config.scale.model_copy(update={"max_failures": 2})
    stage.run.config = stage.run.config.model_copy(update={"scale": scale})
    no_room = ControllerError(WorkerGroupStartupTimeoutError(2))
    stage.play(Scene(failed(killed())), Scene(no_room), Scene())
    assert stage.placed_again == 2
    line = stage.fails(ResourceError, Scene(failed(killed())), Scene(no_room), Scene(no_room))
    assert line.startswith("1 workers could not be started in time")


def test_only_the_first_workers_wait_for_room_that_others_hold(
    stage: Stage,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    first, again = Scene(failed(killed())), Scene()
    stage.play(first, again)
    assert (first.start_timeout, again.start_timeout) == ("300.0", None)
    assert START_TIMEOUT not in os.environ


def test_a_ray_of_ones_own_has_room_at_once(stage: Stage) -> None:
    scene = Scene()
    stage.play(scene)
    assert scene.start_timeout is None


# --- a wish to stop -------------------------------------------------------------------------------


def test_a_stop_before_the_start_starts_nothing(stage: Stage) -> None:
    stage.stop = True
    assert stage.fails(StoppedError) == STOPPED
    assert stage.told == []


def test_a_stop_while_workers_start_does_not_wait_for_them(stage: Stage) -> None:
    def work(mailbox: Mailbox) -> None:
        mailbox.post(Message("announce", "loading"))
        stage.stop = True

    scene = Scene(Trainer.HANGS, work)
    assert stage.fails(StoppedError, scene) == STOPPED
    assert scene.stops_asked == 1
    assert scene.ends_for_good()


def test_workers_that_listen_end_with_their_checkpoint(stage: Stage) -> None:
    def work(mailbox: Mailbox) -> None:
        mailbox.exchange(Message("metrics", (3, 8, {})))
        stage.stop = True
        wait_until(mailbox.exchange, "the driver's word")
        mailbox.post(Message("announce", "saved"))
        wait_until(lambda: "saved" in stage.told, "another turn of the driver's")

    stopped = StoppedError("stopped at step 4 of 8 with a checkpoint")
    scene = Scene(failed(stopped, StoppedError("stopped")), work)
    assert stage.fails(StoppedError, scene) == str(stopped)
    assert (scene.stops_asked, stage.placed_again) == (1, 0), "asked once, and no loss"
    assert stage.told == [STARTING, (3, 8, {}), "saved"]


def test_a_stop_at_a_loss_starts_nothing_again(stage: Stage) -> None:
    def work(mailbox: Mailbox) -> None:
        mailbox.exchange()
        stage.stop = True
        wait_until(mailbox.exchange, "the driver's word")

    assert stage.fails(StoppedError, Scene(failed(killed()), work)) == STOPPED
    assert stage.told[0] == STARTING and len(stage.told) == 2


def test_a_connection_that_is_lost_ends_the_command_and_leaves_the_workers(stage: Stage) -> None:
    scene = Scene(Trainer.HANGS, lost=ActorDiedError())
    line = stage.fails(RunError, scene)
    assert line.startswith("the connection to Ray is lost: ")
    assert line.endswith("the same command resumes the run")
    assert scene.ends_for_good() and stage.placed_again == 0


def test_a_trials_workers_after_a_loss_still_know_whose_ray_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The process of a trial did not start Ray, but its search did."""
    ours = replace(TWO, own_ray=True)
    monkeypatch.setattr(run, "place", lambda scale, announce: ONE)
    monkeypatch.setattr(run, "settle", lambda *_, **__: None)
    ground = run.Ground(cast(Artifact, None), ours, CPU)
    driver = run._driver(ground, Run(run_config(Path("unused"))), SILENT)
    driver.place_again()
    assert driver.placement == replace(ONE, own_ray=True)
