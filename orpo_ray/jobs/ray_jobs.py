"""A cluster's jobs through Ray's Jobs API: its answers as ours, its failures as one line."""

import asyncio
import itertools
import logging
import os
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import requests
from ray import __version__ as ray_version
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from orpo_ray.errors import ConfigError, ResourceError, on_one_line
from orpo_ray.jobs.job import Job, NameTakenError, State, Submission, UnreachableError

_TIMEOUT_S = (5.0, 60.0)
"""To connect, and between two pieces of an answer."""
_QUIET_S = 10.0
"""How long a job may print nothing before it is asked whether the connection still stands."""
# They tell of every upload and every closed connection.
_CHATTY = ("ray", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk")
_BUSY = (502, 503, 504)
_STATES: dict[JobStatus, State] = {
    JobStatus.PENDING: "pending",
    JobStatus.RUNNING: "running",
    JobStatus.STOPPED: "stopped",
    JobStatus.SUCCEEDED: "succeeded",
    JobStatus.FAILED: "failed",
}
_STARTS_BEFORE = "starts_before"
"""Ray appends to the log of an earlier job of the same id; so many starts in it are not this job's."""


class RayJobs:
    """The jobs of a cluster whose dashboard listens at `address`.

    `connect` is called before each request, to mend a way there that has broken. `needs_no_token`: take a cluster
    that answers everybody. Raises ConfigError for such a cluster otherwise, for a token that it does not take, and
    for another version of Ray; UnreachableError where nobody answers.
    """

    def __init__(
        self, address: str, token: str, connect: Callable[[], None] = lambda: None, *, needs_no_token: bool = False
    ) -> None:
        self._address, self._connect = address, connect
        for chatty in _CHATTY:
            logging.getLogger(chatty).setLevel(logging.ERROR)
        self._starts: dict[str, int] = {}
        connect()
        is_open = _answers_everybody(address)
        if is_open and not needs_no_token:
            raise ConfigError(
                f"{address}: this cluster answers without a token, so anyone who reaches it may run code there; "
                "turn token authentication on (orpo-ray cluster up does), or add --anyone-may-run-code"
            )
        # Ray's client lets these two override the address that it is given.
        os.environ["RAY_API_SERVER_ADDRESS"] = address
        headers = {} if is_open else {"Authorization": f"Bearer {token}"}
        try:
            self._client = _Client(address, headers=headers)
        except ConfigError:
            raise
        except (KeyError, ValueError, RuntimeError, requests.HTTPError) as error:
            raise ConfigError(f"{address}: answers, but not as Ray's dashboard does: {on_one_line(error)}") from error
        if self._client.version != ray_version:
            raise ConfigError(
                f"the cluster has Ray {self._client.version}, but here is {ray_version}; use the same on both"
            )

    def find(self, run: str) -> Job | None:
        """The job of a run, if the cluster knows of one."""
        self._connect()
        try:
            return _job(self._client.get_job_info(_job_id(run)))
        except RuntimeError as error:
            if " 404" in str(error):
                return None
            raise _failure(error) from error

    def all(self) -> list[Job]:
        """Every job that was submitted, the latest first."""
        self._connect()
        found = [_job(details) for details in self._client.list_jobs() if details.submission_id]
        return sorted(found, key=lambda job: -job.submitted_at)

    def submit(self, submission: Submission) -> None:
        """Start a job. Raises NameTakenError where the run has one."""
        self._connect()
        try:
            self._client.submit_job(
                entrypoint=submission.entrypoint,
                runtime_env=dict(submission.environment),
                metadata={**submission.metadata, _STARTS_BEFORE: str(self._starts.get(submission.run, 0))},
                submission_id=_job_id(submission.run),
            )
        except RuntimeError as error:
            if "already exists" in str(error):
                raise NameTakenError(f"run {submission.run} has a job on the cluster") from error
            raise _failure(error) from error

    def delete(self, run: str) -> None:
        """Forget a job that is over, so that its run may be submitted again."""
        self._connect()
        self._starts[run] = self._log(run).count(_marker(run))
        try:
            self._client.delete_job(_job_id(run))
        except RuntimeError as error:
            if " 404" not in str(error):  # forgotten already, by another submission
                raise _failure(error) from error

    def stop(self, run: str) -> None:
        """Ask a job to end with a checkpoint."""
        self._connect()
        try:
            self._client.stop_job(_job_id(run))
        except RuntimeError as error:
            raise _failure(error) from error

    def printed(self, run: str) -> list[str]:
        """What the job's command has printed so far."""
        return list(self._since_its_start(run, iter(self._log(run).splitlines())))

    def lines(self, run: str, after: int) -> Iterator[str]:
        """What the job's command prints, without the first `after` lines, until the job is over."""
        return itertools.islice(self._since_its_start(run, self._tail(run)), after, None)

    def _since_its_start(self, run: str, lines: Iterator[str]) -> Iterator[str]:
        job = self.find(run)
        if job is None:
            return
        starts, marker = int(job.metadata.get(_STARTS_BEFORE, 0)) + 1, _marker(run)
        for line in lines:
            if line.startswith(marker):
                starts -= 1
            elif starts <= 0:
                yield line

    def _log(self, run: str) -> str:
        """The log of a run's last job; empty where there is none."""
        try:
            return str(self._client.get_job_logs(_job_id(run)))
        except RuntimeError:
            return ""

    def _tail(self, run: str) -> Iterator[str]:
        rest = ""
        try:
            with asyncio.Runner() as runner:
                stream = self._client.tail_job_logs(_job_id(run))
                while (chunk := runner.run(self._next(stream))) is not None:
                    *lines, rest = (rest + chunk).split("\n")
                    yield from lines
            if rest:
                yield rest
        except (aiohttp.ClientError, OSError, RuntimeError) as error:
            raise UnreachableError(f"{self._address}: the connection is lost") from error

    async def _next(self, stream: AsyncIterator[str]) -> str | None:
        """The next piece of a log, or None at its end; while nothing comes, the connection is tried."""
        piece = asyncio.ensure_future(anext(stream, None))
        while not (await asyncio.wait({piece}, timeout=_QUIET_S))[0]:
            await asyncio.to_thread(_answers_everybody, self._address)
        return piece.result()


class _Client(JobSubmissionClient):  # type: ignore[misc]
    """Ray's client, which would wait for ever where a link is cut."""

    @property
    def version(self) -> str:
        """Of Ray on the cluster."""
        return str(self._server_ray_version)

    def _do_request(self, method: str, endpoint: str, **options: Any) -> requests.Response:
        try:
            response = super()._do_request(method, endpoint, timeout=_TIMEOUT_S, **options)
        except AuthenticationError as error:
            raise ConfigError(
                f"{self._address}: the cluster does not take this token; is it the right file?"
            ) from error
        except (requests.ConnectionError, requests.Timeout) as error:
            raise UnreachableError(f"{self._address}: no answer") from error
        if response.status_code in _BUSY:
            raise UnreachableError(f"{self._address}: not ready (HTTP {response.status_code})")
        return response


def _answers_everybody(address: str) -> bool:
    """Whether a cluster answers a request that carries no token. Raises UnreachableError where nobody answers."""
    try:
        return requests.get(f"{address}/api/version", timeout=_TIMEOUT_S[0]).ok
    except (requests.ConnectionError, requests.Timeout) as error:
        raise UnreachableError(f"{address}: no answer") from error
    except (requests.RequestException, ValueError) as error:
        raise ConfigError(f"--address {address}: {on_one_line(error)}") from error


def check_address(address: str) -> str:
    """The URL of a dashboard, without what may follow host and port. Raises ConfigError where it is none."""
    try:
        url = urlsplit(address)
        port = url.port
    except ValueError as error:
        raise ConfigError(f"--address {address}: {error}") from error
    if url.scheme not in ("http", "https") or not url.hostname or url.password or url.query:
        raise ConfigError(f"--address {address}: must be the dashboard's URL, such as http://127.0.0.1:8265")
    host = f"[{url.hostname}]" if ":" in url.hostname else url.hostname
    return f"{url.scheme}://{host}" + (f":{port}" if port else "")


def _job(details: JobDetails) -> Job:
    return Job(
        run=str(details.submission_id).replace(":", "/"),
        state=_STATES[JobStatus(details.status)],
        metadata=details.metadata or {},
        exit_code=details.driver_exit_code,
        message=details.message or "",
        submitted_at=(details.start_time or 0) / 1000,
    )


def _job_id(run: str) -> str:
    """A run's name as Ray's URLs take it; no name of a run has a colon."""
    return run.replace("/", ":")


def _marker(run: str) -> str:
    """How Ray begins the part of a log that is one start's."""
    return f"Running entrypoint for job {_job_id(run)}: "


def _failure(error: RuntimeError) -> ResourceError:
    """What Ray's Jobs API could not do; it may be able to in a moment, when its agents have started."""
    said = on_one_line(error)
    if "No available agent" in said:
        return UnreachableError("the cluster has no agent yet to run a job")
    return ResourceError(f"the cluster could not do it: {said[:300]}")
