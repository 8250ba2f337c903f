"""One trial: a whole run under Ray Train, driven by a process that Ray Tune starts.

Tune may give the trial up at any evaluation. The process then takes the next trial.
"""

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import tune

from orpo_ray.config import RunConfig, build, stage_configs
from orpo_ray.data.store import MANIFEST, open_artifact
from orpo_ray.distributed.preflight import Placement
from orpo_ray.distributed.run import Ground, train_on
from orpo_ray.errors import OrpoRayError, ResourceError, on_one_line
from orpo_ray.models.hardware import Hardware
from orpo_ray.planner.foretold import foretell, look_back, on_record
from orpo_ray.runs.console import Console, Metrics
from orpo_ray.runs.files import LOG_FILE
from orpo_ray.runs.log import FORMAT, is_kept
from orpo_ray.runs.metrics import plain_record
from orpo_ray.runs.results import TrainResult
from orpo_ray.runs.run import Run
from orpo_ray.runs.stages import conclude_stages
from orpo_ray.storage import fetched_folder

# Short, because workers continue to train until they learn that the trial is given up.
_POLL_S = 0.2

_PREDECESSOR_S = 60.0
"""How long to wait for the lock of a run: processes of a killed driver take time to end."""

_END_TIMEOUT_S = "600"
"""How many seconds Tune waits for the end of a trial that was given up.

The trial then ends its workers and stores its log. After that its process takes the next trial. If
the end took longer, Tune would lose that next trial.
"""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrialRoom:
    """What all trials of a search share.

    `artifact`: the place of the prepared pairs. Each server may have its own path for it.
    `directory`: the folder that the command was given in. Relative paths in the config start there.
    """

    artifact: str
    placement: Placement
    hardware: Hardware
    directory: Path

    def ground(self) -> Ground:
        """The pairs, the placement and the hardware of the run, on this server."""
        artifact = open_artifact(fetched_folder(self.artifact, MANIFEST))
        return Ground(artifact, self.placement, self.hardware)


def run_trial(settings: dict[str, Any], room: TrialRoom) -> None:
    """Train or resume the run whose config is in `settings`, and report each evaluation to Tune.

    The last report says `finished`, or names the `error` that ended the run. `may_pass` says
    whether the error may be temporary. No exception reaches Tune. So Tune counts only a lost
    process as a failure. Tune then starts the trial again.
    """
    try:
        report = _attempt(settings, room)
    except Exception as error:  # noqa: BLE001 - storing the log failed; the search must know it
        report = None if _was_given_up(error) else _error_report(error)
    if report is not None:
        tune.report(report)


def _attempt(settings: dict[str, Any], room: TrialRoom) -> dict[str, Any] | None:
    """Train, and store the log. Returns what to report; None if the trial was given up."""
    run = None
    try:
        run = _open(settings, room)
        _train(run, room)
        return {"finished": True}
    except Exception as error:  # noqa: BLE001 - reported to the search; the traceback is in the log
        _log.error("the trial failed", exc_info=error)
        return None if _was_given_up(error) else _error_report(error)
    finally:
        if run is not None:
            run.store(LOG_FILE)


def _error_report(error: Exception) -> dict[str, Any]:
    if isinstance(error, OrpoRayError):
        return {"error": str(error), "may_pass": isinstance(error, ResourceError)}
    message = f"unexpected {type(error).__name__}: {on_one_line(error)}"
    return {"error": message, "may_pass": isinstance(error, OSError)}


def _was_given_up(error: BaseException) -> bool:
    """Whether the error came while Tune was ending this trial.

    Tune does not take a report of such an error, so the trial would wait for ever.
    """
    cause = error.__context__
    return cause is not None and (isinstance(cause, SystemExit) or _was_given_up(cause))


def _open(settings: dict[str, Any], room: TrialRoom) -> Run:
    """The trial's run as the storage has it, with its log open."""
    os.environ.setdefault("TUNE_FUNCTION_THREAD_TIMEOUT_S", _END_TIMEOUT_S)
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
        format=FORMAT,
        force=True,
    )
    return run


def _train(run: Run, room: TrialRoom) -> None:
    console = _TuneConsole()
    with run.at_work(console, _PREDECESSOR_S) as finished:
        # A finished run has ended while no process listened. Nothing is left to train.
        if finished is not None:
            return
        if not run.config.stages:
            _train_one(run, room, console)
            return
        stages = [Run(stage, is_stage=True) for stage in stage_configs(run.config)]
        conclude_stages(run, stages, [_stage_result(stage, room, console) for stage in stages])


def _stage_result(stage: Run, room: TrialRoom, console: Console) -> TrainResult:
    """The result of a stage, which is trained if no earlier process has."""
    with stage.at_work(console, _PREDECESSOR_S) as finished:
        if finished is None:
            _train_one(stage, room, console)
            finished = stage.result()
    assert finished is not None, "a run that ends without an error has a result"
    return finished


def _train_one(run: Run, room: TrialRoom, console: Console) -> None:
    ground = room.ground()
    foretold = foretell(run, ground.artifact, room.placement, room.hardware, console)
    train_on(ground, run, console, _POLL_S, on_record(foretold))
    look_back(run, foretold, console)


class _TuneConsole(Console):
    """Reports evaluations to Tune; announcements go to the trial's log."""

    def announce(self, line: str) -> None:
        """Log the line."""
        _log.info(line)

    def watch(self, step: int, total_steps: int, metrics: Metrics) -> None:
        """Report an evaluation to Tune.

        Raises SystemExit if Tune gives the trial up. That ends the trial's workers.
        """
        evaluation = {name: value for name, value in metrics.items() if name.startswith("eval/")}
        if evaluation:
            tune.report({"total_steps": total_steps, **plain_record(step, evaluation)})
