"""Runs as jobs of a cluster: a job has its run's name, and a submission may find it taken."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from orpo_ray.config import RunConfig, dump
from orpo_ray.errors import ConfigError, SetupError

State = Literal["pending", "running", "stopped", "succeeded", "failed"]


class UnreachableError(SetupError):
    """The cluster does not answer at the moment; a later attempt may succeed."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a cluster knows about a submitted run."""

    run: str
    state: State
    metadata: Mapping[str, str]
    exit_code: int | None = None
    message: str = ""
    submitted_at: float = 0.0
    """Seconds since 1970."""
    started: bool = True
    """Whether the cluster found a server for its command."""

    @property
    def is_over(self) -> bool:
        """Whether nothing runs any more."""
        return self.state in ("stopped", "succeeded", "failed")

    @property
    def never_started(self) -> bool:
        """Whether the cluster failed to start the command, as may happen just after its start."""
        return self.state == "failed" and self.exit_code is None and not self.started


@dataclass(frozen=True)
class Submission:
    """A command to run on a cluster, with its files and variables."""

    run: str
    entrypoint: str
    environment: Mapping[str, Any]
    """Ray's runtime environment."""
    metadata: Mapping[str, str]


class Jobs(Protocol):
    """The jobs of one cluster.

    Every method raises UnreachableError while the cluster does not answer.
    """

    def find(self, run: str) -> Job | None:
        """The job of a run, or None."""

    def all(self) -> list[Job]:
        """Every job that was submitted, the latest first."""

    def submit(self, submission: Submission) -> None:
        """Start a job. Raises NameTakenError if the run has a job already."""

    def delete(self, run: str) -> None:
        """Forget a job, so that its run may be submitted again.

        Raises NameTakenError if the job is not over.
        """

    def stop(self, run: str) -> None:
        """Ask a job to end with a checkpoint."""

    def printed(self, run: str) -> list[str]:
        """What the job's command has printed so far."""

    def lines(self, run: str, after: int) -> Iterator[str]:
        """Lines that the command prints, until the job is over; the first `after` are left out."""


class NameTakenError(ConfigError):
    """Another submission of the same run came in between."""


def job_id(run: str) -> str:
    """The id of a run's job: Ray allows no slash in it, and no run has a colon in its name."""
    return run.replace("/", ":")


def describe(command: str, config: RunConfig, others: Sequence[Any]) -> dict[str, str]:
    """Metadata by which a second submission of the same run is recognised.

    `others` is what else was asked for, as plain data.
    """
    content = json.dumps([dump(config), others], sort_keys=True)
    return {"command": command, "config": hashlib.sha256(content.encode()).hexdigest()}


def decide(
    job: Job | None, metadata: Mapping[str, str]
) -> Literal["submit", "attach", "submit again"]:
    """What to do with a submission, given the cluster's job of this run, if any. Pure.

    A run that is over is submitted again: its command resumes it, or finds it finished.
    Raises ConfigError if the name belongs to another command, or to a run with other settings.
    """
    if job is None:
        return "submit"
    command = job.metadata.get("command")
    if command is None:
        raise ConfigError(
            f"the cluster has a job {job.run} that is not a run of orpo-ray; choose another name"
        )
    if job.is_over:
        return "submit again"
    if command != metadata["command"]:
        raise ConfigError(
            f"run {job.run} is at work on the cluster: {command}; wait for it, or stop it"
        )
    if job.metadata.get("config") != metadata["config"]:
        raise ConfigError(
            f"run {job.run} is at work on the cluster with other settings; stop it, or choose "
            "another name"
        )
    return "attach"


def last_line(text: str) -> str:
    """The last line of Ray's message about a failure, in which the cause stands."""
    return (text.strip().splitlines() or ["it does not say why"])[-1].strip()[:300]
