"""The course of a search: which trial is next, and what follows from an evaluation.

This module does not use Ray.
"""

from collections.abc import Mapping
from typing import Any

from orpo_ray.config import RunConfig
from orpo_ray.errors import ConfigError
from orpo_ray.runs.console import Console
from orpo_ray.runs.files import METRICS_FILE, RESULT_FILE, read_json
from orpo_ray.runs.metrics import evaluations, metric_by_step
from orpo_ray.runs.search import Search, Trial
from orpo_ray.runs.search_run import SearchRun
from orpo_ray.search.space import Space, trial_config
from orpo_ray.search.study import Study


class Course:
    """The trials of a search, from those on record to the last one.

    Every change is written to the record and shown on the console.
    """

    def __init__(
        self, run: SearchRun, space: Space, search: Search, study: Study, console: Console
    ) -> None:
        self._run = run
        self._space = space
        self._search = search
        self._study = study
        self._console = console
        self._interrupted = [trial for trial in search.trials if trial.state == "running"]

    @property
    def is_over(self) -> bool:
        """Whether every trial has been begun and none is left to resume."""
        return not self._interrupted and len(self._search.trials) >= self._search.trial_count

    def next(self) -> tuple[Trial, RunConfig] | None:
        """The next trial and its config: an interrupted one first, then a new one.

        A trial whose values make no valid run is recorded as failed, and the next one is taken.
        Returns None if no trial is left.
        """
        while not self.is_over:
            trial = self._interrupted.pop(0) if self._interrupted else self._draw()
            try:
                return trial, trial_config(self._run.config, self._space, trial.values, trial.run)
            except ConfigError as error:
                self.failed(trial, str(error))
        return None

    def _draw(self) -> Trial:
        number = len(self._search.trials)
        trial = Trial(
            number=number,
            run=f"{self._run.name}/trials/{number:03d}",
            values=self._study.draw(self._search.trials),
        )
        self._search.trials.append(trial)
        self._keep()
        return trial

    def evaluated(
        self, trial: Trial, step: int, total_steps: int, evaluation: Mapping[str, float]
    ) -> bool:
        """Record an evaluation. Returns whether the trial is given up."""
        if not trial.note(step, total_steps, evaluation):
            return False
        given_up = self._study.judge(trial)
        if given_up:
            self._end(trial, "stopped")
        else:
            self._keep()
        return given_up

    def finished(self, trial: Trial) -> None:
        """Record that a trial was trained to its end.

        It may have ended while no process listened. So its files are read first.
        """
        _catch_up(self._run, trial)
        if trial.last.get("step") == trial.total_steps:
            self._end(trial, "finished")
        else:
            self.failed(
                trial, f"{METRICS_FILE} in {trial.run} lacks the evaluation of its last step"
            )

    def failed(self, trial: Trial, error: str, may_pass: bool = False) -> None:
        """Record that a trial ended with an error. The search continues without it.

        `may_pass`: the same trial may succeed another time.
        """
        trial.error, trial.may_pass = error, may_pass
        self._end(trial, "failed")

    def _end(self, trial: Trial, state: Any) -> None:
        trial.state = state
        self._keep()

    def _keep(self) -> None:
        self._run.keep(self._search)
        self._console.watch_search(self._search)


def take_up(run: SearchRun, search: Search) -> None:
    """Prepare the trials of an earlier process to be resumed.

    A failed trial is tried again if its error may be temporary. Evaluations that the earlier
    process did not read are read now.
    """
    for trial in search.trials:
        if trial.state == "failed" and trial.may_pass:
            trial.state, trial.error, trial.may_pass = "running", None, False
        if trial.state == "running":
            _catch_up(run, trial)


def _catch_up(run: SearchRun, trial: Trial) -> None:
    """Record the evaluations that a trial made while no process listened.

    They are read from its files. A resumed trial does not repeat the steps before its checkpoint.
    """
    trial_run = run.trial_run(trial)
    trial_run.fetch(METRICS_FILE)
    result = read_json(trial_run.fetch(RESULT_FILE)) or {}
    if total_steps := trial.total_steps or result.get("steps", 0):
        for evaluation in evaluations(trial_run.folder):
            trial.note(int(evaluation.pop("step")), total_steps, evaluation)


def count_steps(run: SearchRun, search: Search) -> None:
    """Count the steps of each trial, also those after its last evaluation."""
    for trial in search.trials:
        trial_run = run.trial_run(trial)
        trial_run.fetch(METRICS_FILE)
        trial.steps = max(metric_by_step(trial_run.folder, "train/loss"), default=trial.steps)
