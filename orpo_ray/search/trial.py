"""One trial: a whole run under Ray Train, driven from a process that Ray Tune starts.

Tune may give it up at any evaluation; the process goes on with the next trial.
"""

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import tune

from orpo_ray.config import RunConfig, build
from orpo_ray.data.store import MANIFEST, open_artifact
from orpo_ray.distributed.preflight import Placement
from orpo_ray.distributed.run import Ground, train_on
from orpo_ray.errors import OrpoRayError, ResourceError, on_one_line
from orpo_ray.models.hardware import Hardware
from orpo_ray.runs.console import Console, Metrics
from orpo_ray.runs.files import LOG_FILE
from orpo_ray.runs.log import is_kept
from orpo_ray.runs.metrics import plain_record
from orpo_ray.runs.run import Run
from orpo_ray.storage import fetched_folder

# The workers train on while nobody has told them of a verdict.
_POLL_S = 0.2

_PREDECESSOR_S = 60.0
"""Processes of a driver that was killed may take a while to notice."""

_NEXT_TRIAL_WAITS_S = "600"
"""How long Tune waits for a trial that was given up to end its workers and to store its log.

Then its process is the next trial's. Where the wait ends before, that trial is lost to the search.
"""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrialRoom:
    """What all trials of a search share. `directory`: where the command was given; relative paths
    start there.

    `artifact`: the place of the prepared pairs, whose path a trial's server may have of its own.
    """

    artifact: str
    placement: Placement
    hardware: Hardware
    directory: Path

    def ground(self) -> Ground:
        """What the run stands on, on this server."""
        artifact = open_artifact(fetched_folder(self.artifact, MANIFEST))
        return Ground(artifact, self.placement, self.hardware)


def run_trial(settings: dict[str, Any], room: TrialRoom) -> None:
    """Train the run whose config is in `settings`, or go on with it, reporting each evaluation to
    Tune.

    The last report says `finished`, or tells the `error` that ended the run and whether it
    `may_pass` without a change of the config. Tune hears of no exception, so that what it takes for
    a failure is a lost process, after which it starts the trial again.
    """
    try:
        told = _attempt(settings, room)
    except Exception as error:  # noqa: BLE001 - the log could not be kept: told to the search, too
        told = None if _was_given_up(error) else _told(error)
    if told is not None:
        tune.report(told)


def _attempt(settings: dict[str, Any], room: TrialRoom) -> dict[str, Any] | None:
    """Train, and keep the log whatever comes of it; what to report, None if the trial was given
    up.
    """
    run = None
    try:
        run = _open(settings, room)
        _train(run, room)
        return {"finished": True}
    except Exception as error:  # noqa: BLE001 - told to the search; the traceback is in the trial's log
        _log.error("the trial failed", exc_info=error)
        return None if _was_given_up(error) else _told(error)
    finally:
        if run is not None:
            run.store(LOG_FILE)


def _told(error: Exception) -> dict[str, Any]:
    if isinstance(error, OrpoRayError):
        return {"error": str(error), "may_pass": isinstance(error, ResourceError)}
    told = f"unexpected {type(error).__name__}: {on_one_line(error)}"
    return {"error": told, "may_pass": isinstance(error, OSError)}


def _was_given_up(error: BaseException) -> bool:
    """Whether the error came up on the way out of a trial that was given up: Tune waits for no
    report of it.
    """
    cause = error.__context__
    return cause is not None and (isinstance(cause, SystemExit) or _was_given_up(cause))


def _open(settings: dict[str, Any], room: TrialRoom) -> Run:
    """The trial's run as the storage has it, with its log open."""
    os.environ.setdefault("TUNE_FUNCTION_THREAD_TIMEOUT_S", _NEXT_TRIAL_WAITS_S)
    if room.directory.is_dir():
        os.chdir(room.directory)
    run = Run(build(RunConfig, settings["config"], {(): "trial"}))
    run.refresh()
    run.folder.mkdir(parents=True, exist_ok=True)
    log = logging.FileHandler(run.path(LOG_FILE), encoding="utf-8")
    log.addFilter(is_kept)
    logging.basicConfig(
        handlers=[log],
        level=logging.INFO,
        format="%(asctime)s %(name)s %(levelname)s %(message)s",
        force=True,
    )
    return run


def _train(run: Run, room: TrialRoom) -> None:
    console = _Tune()
    with run.at_work(console, _PREDECESSOR_S) as finished:
        if finished is None:  # else it ended when nobody listened
            train_on(room.ground(), run, console, _POLL_S)


class _Tune(Console):
    """Tune, which hears of evaluations; what is announced is in the trial's log."""

    def announce(self, line: str) -> None:
        """Log it."""
        _log.info(line)

    def watch(self, step: int, total_steps: int, metrics: Metrics) -> None:
        """Hand an evaluation to Tune.

        Raises SystemExit where the trial is given up, which ends its workers.
        """
        evaluation = {name: value for name, value in metrics.items() if name.startswith("eval/")}
        if evaluation:
            tune.report({"total_steps": total_steps, **plain_record(step, evaluation)})
