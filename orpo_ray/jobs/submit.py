"""A job from its submission to its end, over connections that come and go."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from orpo_ray.errors import ResourceError, StoppedError
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
"""How often the cluster may fail to start a command: it does in its first seconds, and just after a
job of the name.
"""


@dataclass
class Patience:
    """Asks a cluster again while it does not answer, and says that it does so.

    Raises ResourceError in the end.
    """

    announce: Callable[[str], None]
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    _since: float | None = field(default=None, init=False)

    def ask(self, question: Callable[[], Result]) -> Result:
        """The answer, however long the cluster takes to give one."""
        while True:
            try:
                answer = question()
            except UnreachableError as error:
                self.wait(error)
            else:
                self.answered()
                return answer

    def wait(self, error: UnreachableError) -> None:
        """Pause after a question that was not answered."""
        if self._since is None:
            self._since = self.clock()
            self.announce(f"{error}; asking again until it answers")
        elif self.clock() - self._since > _PATIENCE_S:
            raise ResourceError(f"{error}; gave up after {_PATIENCE_S / 60:.0f} minutes") from error
        self.sleep(_PAUSE_S)

    def answered(self) -> None:
        """The cluster is there."""
        if self._since is not None:
            self.announce("the cluster answers again")
        self._since = None


def submit(jobs: Jobs, submission: Submission, patience: Patience) -> bool:
    """Start a run on the cluster, or find it at work there, and say which; whether it was started.

    Raises ConfigError where something else has its name.
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
            # The other of two submissions came first; or ours did, and its answer was lost.
            continue
        patience.announce(f"submitted run {run}")
        return True
    raise ResourceError(
        f"run {run} is submitted and ended again and again by others; wait for them"
    )


def follow(jobs: Jobs, run: str, show: Callable[[str], None], patience: Patience) -> Job:
    """Show what a job prints, each line once, until it is over.

    Raises StoppedError where the cluster forgot it.
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
                f"the cluster was started anew and has no job {run}; submit it again, and it goes "
                "on"
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
    """Submit a run and follow it to its end; what the cluster fails to start is submitted again, a
    few times.

    `at_work` is called once the cluster has the run.
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
    """Ask a run to end, and wait until it has; None where the cluster knows of no such run."""
    job = patience.ask(lambda: jobs.find(run))
    if job is None or job.is_over:
        return job
    patience.ask(lambda: jobs.stop(run))
    patience.announce(f"asked run {run} to end, with a checkpoint if it trains")
    asked = patience.clock()
    while job is not None and not job.is_over:
        if patience.clock() - asked > _END_S:
            raise ResourceError(
                f"run {run} has not ended after {_END_S / 60:.0f} minutes; `orpo-ray status` shows "
                "it"
            )
        patience.sleep(_PAUSE_S)
        job = patience.ask(lambda: jobs.find(run))
    return job
