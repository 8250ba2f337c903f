"""Runs the trials of a course under Ray Tune.

The course decides. Tune starts, ends and restarts the processes of trials. Tune's snapshots hold
pickles. So they are never read, and are deleted when the search ends.
"""

import logging
import os
import shutil
import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any, Protocol

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from ray import tune
    from ray.tune.schedulers import FIFOScheduler, TrialScheduler
    from ray.tune.search import Searcher

from orpo_ray.config import RunConfig, dump
from orpo_ray.distributed.launch import (
    free_what_controllers_held,
    free_what_dead_controllers_hold,
)
from orpo_ray.distributed.ray_thread import RayThread
from orpo_ray.errors import RunError, StoppedError, on_one_line
from orpo_ray.runs.console import Console
from orpo_ray.runs.run import RunFolder
from orpo_ray.runs.search import State
from orpo_ray.search.trial import TrialRoom, run_trial

_log = logging.getLogger(__name__)

_FOLDER = "tune"
_POLL_S = 1.0
# A trial's process computes nothing, and its workers reserve what they need. Tune accepts no empty
# reservation, so the process reserves one byte of memory.
_NOTHING: dict[str, int | float] = {"memory": 1}

_SETTINGS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    # Relative paths in the config start in the folder that the command was given in.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}


class Trained(Protocol):
    """One run of a course: a trial, or a method with a seed."""

    number: int
    state: State


class Course(Protocol):
    """Decides which run is next, and what follows from what a run tells."""

    def next(self) -> tuple[Any, RunConfig] | None:
        """The next run and its config; None if there is none."""

    def evaluated(
        self, trial: Any, step: int, total_steps: int, evaluation: Mapping[str, float]
    ) -> bool:
        """Take note of an evaluation. Returns whether the run is given up."""

    def finished(self, trial: Any) -> None:
        """Take note that a run has ended."""

    def failed(self, trial: Any, error: str, may_pass: bool = False) -> None:
        """Take note that a run has failed, and whether it may succeed another time."""


def run_course(
    run: RunFolder[Any], course: Course, room: TrialRoom, at_once: int, console: Console
) -> None:
    """Run the trials of a course, `at_once` at a time. Raises StoppedError on request."""
    os.environ |= {name: os.environ.get(name, value) for name, value in _SETTINGS.items()}
    # Tune would print failed trials on the terminal once more.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    folder = run.path(_FOLDER)
    shutil.rmtree(folder, ignore_errors=True)
    trials: dict[str, Trained] = {}
    tuner = tune.Tuner(
        tune.with_resources(partial(run_trial, room=room), tune.PlacementGroupFactory([_NOTHING])),
        tune_config=tune.TuneConfig(
            search_alg=_Searcher(course, trials),
            scheduler=_Scheduler(course, trials),
            max_concurrent_trials=at_once,
            num_samples=-1,
            reuse_actors=True,  # a trial begins in a process that has its imports already
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(
            name=_FOLDER,
            storage_path=str(run.folder),
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=run.config.scale.max_failures),
            stop=_Stopper(console),
            callbacks=[_Losses(course, trials)],
        ),
    )
    fitting = RayThread(tuner.fit)
    fitting.start()
    try:
        while fitting.is_alive():
            fitting.join(_POLL_S)
            # The controller of a trial reserves resources. If the trial is given up, the controller
            # dies, and Ray keeps its resources reserved.
            free_what_dead_controllers_hold()
    finally:
        fitting.leave()
        free_what_controllers_held()  # this process may need the resources next
    shutil.rmtree(folder, ignore_errors=True)
    if console.stop_requested():
        raise StoppedError("stopped; the same command keeps finished trials and resumes the others")
    if fitting.error is not None:
        reason = on_one_line(fitting.error)[:300]
        raise RunError(f"Ray Tune failed: {reason}; the same command resumes") from fitting.error


class _NotKept:
    """Keeps a course, which cannot be pickled, out of the snapshots that Tune writes."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _Searcher(_NotKept, Searcher):
    """Gives Tune the next trial of a course."""

    def __init__(self, course: Course, trials: dict[str, Trained]) -> None:
        super().__init__()
        self._course = course
        self._trials = trials

    def suggest(self, trial_id: str) -> Any:
        """The settings of the next trial, or FINISHED if there is none."""
        found = self._course.next()
        if found is None:
            return Searcher.FINISHED
        self._trials[trial_id], config = found
        return {"config": dump(config)}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Do nothing: `_Scheduler` records the end of a trial."""

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: a search is resumed from its own record."""

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing: a search is resumed from its own record."""


class _Scheduler(_NotKept, FIFOScheduler):
    """Passes reports of trials to the course, and returns the course's decision to Tune."""

    def __init__(self, course: Course, trials: dict[str, Trained]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._course = course
        self._trials = trials

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Handle an evaluation, the end of a run, or its error."""
        ours = self._trials[trial.trial_id]
        if ours.state != "running":
            return str(TrialScheduler.STOP)
        if "error" in result:
            self._course.failed(ours, result["error"], result["may_pass"])
        elif "finished" in result:
            self._course.finished(ours)
        elif "step" in result:
            evaluation = {name: value for name, value in result.items() if name.startswith("eval/")}
            if self._course.evaluated(ours, result["step"], result["total_steps"], evaluation):
                return str(TrialScheduler.STOP)
        return str(TrialScheduler.CONTINUE)


class _Losses(_NotKept, tune.Callback):
    """Records trials whose process was lost too often.

    A scheduler cannot do this: Tune calls it after every loss, even if Tune starts the trial again.
    """

    def __init__(self, course: Course, trials: dict[str, Trained]) -> None:
        self._course = course
        self._trials = trials

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Record a trial as failed. Tune does not start it again."""
        ours = self._trials[trial.trial_id]
        _log.error("the process of trial %d was lost", ours.number, exc_info=trial.get_error())
        if ours.state == "running":
            self._course.failed(
                ours,
                "its process was lost before training began, or it was lost more than "
                "scale.max_failures times",
                may_pass=True,
            )


class _Stopper(_NotKept, tune.Stopper):
    """Ends all trials on request. A later command resumes them from their checkpoints."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Never stop a single trial."""
        return False

    def stop_all(self) -> bool:
        """Whether the user asked to stop."""
        return self._console.stop_requested()
