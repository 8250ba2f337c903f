"""Runs as jobs of a cluster: one name for both, and what a submission does where the name is
taken.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from orpo_ray.config import RunConfig, dump
from orpo_ray.errors import ConfigError, ResourceError

State = Literal["pending", "running", "stopped", "succeeded", "failed"]


class UnreachableError(ResourceError):
    """The cluster does not answer at the moment; asking again later may help."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a cluster knows of a run that was submitted to it."""

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
        """Whether the cluster itself failed to start the command, as it may when it has only just
        come up.
        """
        return self.state == "failed" and self.exit_code is None and not self.started


@dataclass(frozen=True)
class Submission:
    """A command to run on a cluster, and where it is started."""

    run: str
    entrypoint: str
    environment: Mapping[str, Any]
    """Ray's runtime environment."""
    metadata: Mapping[str, str]


class Jobs(Protocol):
    """The jobs of one cluster.

    Everything raises UnreachableError while the cluster does not answer.
    """

    def find(self, run: str) -> Job | None:
        """The job of a run, if the cluster knows of one."""

    def all(self) -> list[Job]:
        """Every job that was submitted, the latest first."""

    def submit(self, submission: Submission) -> None:
        """Start a job. Raises NameTakenError where the run has one."""

    def delete(self, run: str) -> None:
        """Forget a job, so that its run may be submitted again.

        Raises NameTakenError where it is not over.
        """

    def stop(self, run: str) -> None:
        """Ask a job to end with a checkpoint."""

    def printed(self, run: str) -> list[str]:
        """What the job's command has printed so far."""

    def lines(self, run: str, after: int) -> Iterator[str]:
        """What the job's command prints, without the first `after` lines, until the job is over."""


class NameTakenError(ConfigError):
    """Another submission of the same run came in between."""


def job_id(run: str) -> str:
    """A run's name as Ray's URLs take it; no name of a run has a colon."""
    return run.replace("/", ":")


def describe(command: str, config: RunConfig, others: Sequence[Any]) -> dict[str, str]:
    """What is kept with a job to know its like again; `others`: what else was asked for, as plain
    data.
    """
    content = json.dumps([dump(config), others], sort_keys=True)
    return {"command": command, "config": hashlib.sha256(content.encode()).hexdigest()}


def decide(
    job: Job | None, metadata: Mapping[str, str]
) -> Literal["submit", "attach", "submit again"]:
    """What submitting a run means where the cluster has this job of it, or none. Pure.

    A run that is over is submitted again: its command goes on from the last checkpoint, or finds it
    finished. Raises ConfigError where another command or other settings are at work under the name.
    """
    if job is None:
        return "submit"
    command = job.metadata.get("command")
    if command is None:
        raise ConfigError(
            f"the cluster has a job {job.run} that is no run of orpo-ray; choose another name"
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
    """Of what Ray tells of a failure, which begins with pages of other things."""
    return (text.strip().splitlines() or ["it does not say why"])[-1].strip()[:300]
