"""Submits a job and follows it to its end, over a connection that may break."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from orpo_ray.errors import ResourceError, SetupError, StoppedError
from orpo_ray.jobs.job import (
    Job,
    Jobs,
    NameTakenError,
    Submission,
    UnreachableError,
    decide,
    last_line,
)

Result = TypeVar("Result")

_PATIENCE_S, _PAUSE_S = 600.0, 2.0
_END_S = 180.0
_STARTS = 5
"""How often a command is started that the cluster fails to start.

It fails in the cluster's first seconds, and just after a job of the same name.
"""


@dataclass
class Patience:
    """Repeats a question while the cluster does not answer, and announces it.

    Raises ResourceError after ten minutes.
    """

    announce: Callable[[str], None]
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    _since: float | None = field(default=None, init=False)

    def ask(self, question: Callable[[], Result]) -> Result:
        """The answer to a question that may be asked several times."""
        while True:
            try:
                answer = question()
            except UnreachableError as error:
                self.wait(error)
            else:
                self.answered()
                return answer

    def wait(self, error: UnreachableError) -> None:
        """Pause after a question without an answer. Raises ResourceError after ten minutes."""
        if self._since is None:
            self._since = self.clock()
            self.announce(f"{error}; asking again until it answers")
        elif self.clock() - self._since > _PATIENCE_S:
            raise SetupError(f"{error}; gave up after {_PATIENCE_S / 60:.0f} minutes") from error
        self.sleep(_PAUSE_S)

    def answered(self) -> None:
        """Note that the cluster answers."""
        if self._since is not None:
            self.announce("the cluster answers again")
        self._since = None


def submit(jobs: Jobs, submission: Submission, patience: Patience) -> bool:
    """Start a run on the cluster, unless it is at work there; returns whether it was started.

    Raises ConfigError if another job has the run's name.
    """
    run = submission.run
    for _ in range(_STARTS):
        job = patience.ask(lambda: jobs.find(run))
        decision = decide(job, submission.metadata)
        if decision == "attach":
            patience.announce(f"run {run} is at work on the cluster already; nothing was submitted")
            return False
        try:
            if job is not None:
                patience.announce(
                    f"run {run} was submitted before ({job.state}); submitting it again"
                )
                patience.ask(lambda: jobs.delete(run))
            patience.ask(lambda: jobs.submit(submission))
        except NameTakenError:
            # Another submission came first. Or ours did, and its answer was lost.
            continue
        patience.announce(f"submitted run {run}")
        return True
    raise ResourceError(
        f"run {run} is submitted and ended again and again by others; wait for them"
    )


def follow(jobs: Jobs, run: str, show: Callable[[str], None], patience: Patience) -> Job:
    """Show what a job prints, each line once, until it is over.

    Raises StoppedError if the cluster does not know the job any more.
    """
    shown = 0
    while True:
        try:
            for line in jobs.lines(run, after=shown):
                patience.answered()
                shown += 1
                show(line)
            job = jobs.find(run)
            patience.answered()
        except UnreachableError as error:
            patience.wait(error)
            continue
        if job is None:
            raise StoppedError(
                f"the cluster was started anew and has no job {run}; "
                "submit the run again to resume it"
            )
        if job.is_over:
            return job
        patience.sleep(_PAUSE_S)


def submit_and_follow(
    jobs: Jobs,
    submission: Submission,
    show: Callable[[str], None],
    patience: Patience,
    at_work: Callable[[], None] = lambda: None,
) -> Job:
    """Submit a run and follow it to its end.

    If the cluster fails to start it, it is submitted again a few times. `at_work` is called when
    the cluster has the run.
    """
    for _ in range(_STARTS):
        submit(jobs, submission, patience)
        at_work()
        job = follow(jobs, submission.run, show, patience)
        if not job.never_started:
            return job
        patience.announce(f"the cluster could not start run {job.run}: {last_line(job.message)}")
        patience.sleep(_PAUSE_S)
    raise ResourceError(f"the cluster could not start run {submission.run} in {_STARTS} attempts")


def stop(jobs: Jobs, run: str, patience: Patience) -> Job | None:
    """Ask a run to end, and wait until it has; None if the cluster has no job of it."""
    job = patience.ask(lambda: jobs.find(run))
    if job is None or job.is_over:
        return job
    patience.ask(lambda: jobs.stop(run))
    patience.announce(f"asked run {run} to end, with a checkpoint if it trains")
    asked = patience.clock()
    while job is not None and not job.is_over:
        if patience.clock() - asked > _END_S:
            raise ResourceError(
                f"run {run} has not ended after {_END_S / 60:.0f} minutes; "
                "look at it with `orpo-ray status`"
            )
        patience.sleep(_PAUSE_S)
        job = patience.ask(lambda: jobs.find(run))
    return job
