"""A cluster's jobs through Ray's Jobs API, with its answers as Job and its failures as one line."""

import asyncio
import itertools
import logging
import os
import re
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit

import aiohttp
import requests
from ray import __version__ as ray_version
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from orpo_ray.config.storage import expanded
from orpo_ray.errors import ConfigError, OrpoRayError, ResourceError, on_one_line
from orpo_ray.jobs.job import (
    Job,
    NameTakenError,
    State,
    Submission,
    UnreachableError,
    job_id,
    last_line,
)

Result = TypeVar("Result")

_TIMEOUT_S = (5.0, 60.0)
"""The first limits the connection, the second the wait for each piece of an answer."""
_QUIET_S = 10.0
"""After so long without output from a job, the connection is tested."""
# These loggers report every upload and every closed connection.
_CHATTY = ("ray", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk")
_NOT_LET_IN = (401, 403)
_BUSY = (502, 503, 504)
_ODD = (ValueError, TypeError, KeyError, AttributeError)
"""What Ray's client raises for an answer that is not the JSON that it expects."""
_VERSION = "/api/version"
_CERTIFICATES = ("REQUESTS_CA_BUNDLE", "SSL_CERT_FILE")
_NO_DASHBOARD = "answers, but not as Ray's dashboard does"
_NO_ADDRESS = (
    "--address (or RAY_API_SERVER_ADDRESS) must be the dashboard's URL, such as "
    "http://127.0.0.1:8265"
)
_STATES: dict[JobStatus, State] = {
    JobStatus.PENDING: "pending",
    JobStatus.RUNNING: "running",
    JobStatus.STOPPED: "stopped",
    JobStatus.SUCCEEDED: "succeeded",
    JobStatus.FAILED: "failed",
}
_LINES_BEFORE = "lines_before"
"""How many lines of the log are an earlier job's: Ray appends to the log of the same job id."""
_RAYS_OWN = re.compile(
    r"Running entrypoint for job |\d{4}-\d\d-\d\d [\d:,]+\t\w+ job_manager\.py:\d+ -- "
)
"""Lines that Ray itself writes into a job's log."""


class RayJobs:
    """The jobs of a cluster whose dashboard listens at `address`.

    `connect` is called before each request and mends a broken connection. `before_token` is called
    before the token is sent for the first time. A cluster that answers without a token is refused
    unless `needs_no_token`.

    Raises ConfigError for such a cluster, for a token that the cluster does not take, for another
    version of Ray, and if something other than a dashboard answers. Raises UnreachableError if
    nothing answers.
    """

    def __init__(
        self,
        address: str,
        token: str,
        connect: Callable[[], None] = lambda: None,
        before_token: Callable[[], None] = lambda: None,
        *,
        needs_no_token: bool = False,
    ) -> None:
        self._address, self._connect = address, connect
        for chatty in _CHATTY:
            logging.getLogger(chatty).setLevel(logging.ERROR)
        self._lines_before: dict[str, int] = {}
        connect()
        is_open = _answers_everybody(address)
        if is_open and not needs_no_token:
            raise ConfigError(
                f"{address}: this cluster answers without a token, so anyone who reaches it may "
                "run code there; turn token authentication on (orpo-ray cluster up does), or add "
                "--anyone-may-run-code"
            )
        # In Ray's client this variable, or else RAY_ADDRESS, overrides the given address.
        os.environ["RAY_API_SERVER_ADDRESS"] = address
        if not is_open and not token:
            raise ConfigError(f"{address}: this cluster wants a token; name its file with --token")
        if not is_open:
            before_token()
        headers = {} if is_open else {"Authorization": f"Bearer {token}"}
        try:
            self._client = _Client(address, headers=headers, verify=_trusted(address))
        except OrpoRayError:
            raise
        except (*_ODD, RuntimeError, requests.HTTPError) as error:
            raise ConfigError(f"{address}: {_NO_DASHBOARD}: {on_one_line(error)[:200]}") from error
        if self._client.version != ray_version:
            raise ConfigError(
                f"the cluster has Ray {self._client.version}, but this machine has {ray_version}; "
                "use the same on both"
            )

    def find(self, run: str) -> Job | None:
        """The job of a run, or None."""
        try:
            return self._answer(lambda: _job(self._client.get_job_info(_in_url(run))))
        except RuntimeError as error:
            if " 404" in str(error):
                return None
            raise _failure(error) from error

    def all(self) -> list[Job]:
        """Every job that was submitted, the latest first."""
        try:
            found = self._answer(
                lambda: [_job(each) for each in self._client.list_jobs() if each.submission_id]
            )
        except RuntimeError as error:
            raise _failure(error) from error
        return sorted(found, key=lambda job: -job.submitted_at)

    def submit(self, submission: Submission) -> None:
        """Start a job. Raises NameTakenError if the run has a job already."""
        start = partial(
            self._client.submit_job,
            entrypoint=submission.entrypoint,
            runtime_env=dict(submission.environment),
            metadata={
                **submission.metadata,
                _LINES_BEFORE: str(self._lines_before.get(submission.run, 0)),
            },
            submission_id=job_id(submission.run),
        )
        try:
            self._answer(start)
        except RuntimeError as error:
            if "already exists" in str(error):
                raise NameTakenError(f"run {submission.run} has a job on the cluster") from error
            raise _failure(error) from error

    def delete(self, run: str) -> None:
        """Forget a job, so that its run may be submitted again.

        Raises NameTakenError if the job is not over.
        """
        self._lines_before[run] = self._log(run).count("\n")
        try:
            self._answer(lambda: self._client.delete_job(_in_url(run)))
        except RuntimeError as error:
            if " 404" in str(error):
                return  # another submission has deleted it already
            if "non-terminal" in str(error):
                raise NameTakenError(f"run {run} has a job on the cluster again") from error
            raise _failure(error) from error

    def stop(self, run: str) -> None:
        """Ask a job to end with a checkpoint."""
        try:
            self._answer(lambda: self._client.stop_job(_in_url(run)))
        except RuntimeError as error:
            raise _failure(error) from error

    def printed(self, run: str) -> list[str]:
        """What the job's command has printed so far."""
        return list(self._since_its_start(run, iter(self._log(run).removesuffix("\n").split("\n"))))

    def lines(self, run: str, after: int) -> Iterator[str]:
        """Lines that the command prints, until the job is over; the first `after` are left out."""
        return itertools.islice(self._since_its_start(run, self._tail(run)), after, None)

    def _answer(self, question: Callable[[], Result]) -> Result:
        """The answer through Ray's client, which does not check that a dashboard has answered.

        Raises ResourceError for an answer of another shape.
        """
        self._connect()
        try:
            return question()
        except OrpoRayError:
            raise
        except _ODD as error:
            raise ResourceError(
                f"{self._address}: answers, but not as Ray's Jobs API does: "
                f"{on_one_line(error)[:200]}"
            ) from error

    def _since_its_start(self, run: str, lines: Iterator[str]) -> Iterator[str]:
        job = self.find(run)
        if job is None:
            return
        before = int(job.metadata.get(_LINES_BEFORE, 0))
        yield from (
            line for line in itertools.islice(lines, before, None) if not _RAYS_OWN.match(line)
        )

    def _log(self, run: str) -> str:
        """The log of a run's last job; empty if there is none."""
        try:
            return str(self._answer(lambda: self._client.get_job_logs(_in_url(run))))
        except RuntimeError:
            return ""

    def _tail(self, run: str) -> Iterator[str]:
        rest = ""
        try:
            with asyncio.Runner() as runner:
                stream = self._client.tail_job_logs(_in_url(run))
                while (chunk := runner.run(self._next(stream))) is not None:
                    *lines, rest = (rest + chunk).split("\n")
                    yield from lines
            if rest:
                yield rest
        except (aiohttp.ClientError, OSError, RuntimeError) as error:
            raise UnreachableError(f"{self._address}: the connection is lost") from error

    async def _next(self, stream: AsyncIterator[str]) -> str | None:
        """The next piece of a log, or None at its end.

        While nothing comes, a request tests the connection.
        """
        piece = asyncio.ensure_future(anext(stream, None))
        while not (await asyncio.wait({piece}, timeout=_QUIET_S))[0]:
            await asyncio.to_thread(_ask, "GET", self._address, _VERSION)
        return piece.result()


class _Client(JobSubmissionClient):
    """Ray's client, with requests that time out.

    Ray's own requests wait for ever if a link is cut. If they are given no token, they also add a
    token that Ray finds by itself.
    """

    def __init__(self, address: str, headers: dict[str, str], verify: str | bool) -> None:
        self._ours = headers
        super().__init__(address, headers=dict(headers), verify=verify)
        self._headers = headers  # Ray reads them for the connection that streams the log

    @property
    def version(self) -> str:
        """The version of Ray on the cluster."""
        return str(self._server_ray_version)

    def _do_request(
        self,
        method: str,
        endpoint: str,
        *,
        data: bytes | None = None,
        json_data: Any = None,
        **options: Any,
    ) -> requests.Response:
        assert not options, "our requests have no other options"
        response = _ask(
            method, self._address, endpoint, data=data, json=json_data, headers=self._ours
        )
        if response.status_code in _NOT_LET_IN:
            raise ConfigError(
                f"{self._address}: the cluster does not take this token; is it the right file?"
            )
        if response.status_code in _BUSY:
            raise UnreachableError(f"{self._address}: not ready (HTTP {response.status_code})")
        return response


def _answers_everybody(address: str) -> bool:
    """Whether a cluster answers a request that carries no token.

    Raises UnreachableError if nothing answers. Raises ConfigError if it is not a cluster, because
    nothing else may get the token.
    """
    response = _ask("GET", address, _VERSION)
    if response.status_code in _NOT_LET_IN:
        return False
    if response.status_code in _BUSY:
        raise UnreachableError(f"{address}: not ready (HTTP {response.status_code})")
    try:
        found = response.json() if response.status_code == requests.codes.ok else None
    except ValueError:
        found = None
    if not isinstance(found, dict) or not isinstance(found.get("ray_version"), str):
        raise ConfigError(f"{address}: {_NO_DASHBOARD} (HTTP {response.status_code})")
    return True


def _ask(method: str, address: str, endpoint: str, **content: Any) -> requests.Response:
    """Send one request straight to the cluster.

    The environment's proxy would see the token, and .netrc would replace it.
    """
    trusted = _trusted(address)
    try:
        with requests.Session() as session:
            session.trust_env, session.verify = False, trusted
            return session.request(
                method, address + endpoint, timeout=_TIMEOUT_S, allow_redirects=False, **content
            )
    except requests.exceptions.SSLError as error:
        raise ConfigError(
            f"{address}: no TLS that this machine trusts; write http:// if it has no TLS, or "
            f"name the file of certificates to trust in {' or '.join(_CERTIFICATES)}"
        ) from error
    except (requests.ConnectionError, requests.Timeout) as error:
        raise UnreachableError(f"{address}: no answer") from error
    except (requests.RequestException, ValueError) as error:
        raise ConfigError(f"--address {address}: {on_one_line(error)}") from error


def _trusted(address: str) -> str | bool:
    """The file of certificates to trust, if a variable names one; True for the default list.

    `_ask` reads nothing else from the environment, so the variables are read here. The file counts
    for requests and for the connection that streams the log.
    """
    for variable in _CERTIFICATES if address.startswith("https:") else ():
        if place := os.environ.get(variable):
            if not expanded(place, variable).exists():
                raise ConfigError(f"{variable}: {place}: no such file; unset it, or name another")
            return str(expanded(place, variable))
    return True


def check_address(address: str) -> str:
    """The URL of a dashboard: scheme, host and port.

    Raises ConfigError for anything else. The message leaves out the URL, which may hold a secret.
    """
    try:
        url = urlsplit(address)
        port = url.port
    except ValueError:
        raise ConfigError(_NO_ADDRESS) from None
    rest = (url.username, url.password, url.path.strip("/"), url.query, url.fragment)
    if url.scheme not in ("http", "https") or not url.hostname or port == 0 or any(rest):
        raise ConfigError(_NO_ADDRESS)
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
        started=details.driver_agent_http_address is not None,
    )


def _in_url(run: str) -> str:
    """The job's id as a part of a URL. Jobs that others submitted may have odd names."""
    return quote(job_id(run), safe=":")


def _failure(error: RuntimeError) -> ResourceError:
    """The error for a request that Ray's Jobs API could not fulfil.

    It is UnreachableError, and asked again, if only Ray's agents have not started yet.
    """
    if "No available agent" in str(error):
        return UnreachableError("the cluster has no agent yet to run a job")
    return ResourceError(f"the cluster could not do it: {last_line(str(error))}")
