"""Answers of dashboards, Ray's or not: who gets the token, and which errors become one line."""

import asyncio
import json
import shutil
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from ray import __version__ as ray_version
from ray.dashboard.modules import dashboard_sdk
from support import HANG_S

from orpo_ray.cli import console
from orpo_ray.cli.on_cluster import jobs_of
from orpo_ray.errors import ConfigError, ResourceError
from orpo_ray.jobs import reach
from orpo_ray.jobs.job import Submission, UnreachableError
from orpo_ray.jobs.ray_jobs import RayJobs, check_address
from orpo_ray.jobs.token import make_token

VERSION = json.dumps(
    {"version": "4", "ray_version": ray_version, "ray_commit": "", "session_name": ""}
)
JOB = {
    "type": "SUBMISSION",
    "submission_id": "run",
    "status": "RUNNING",
    "entrypoint": "x",
    "metadata": {},
}

Answer = tuple[int, str]


@dataclass
class Dashboard:
    """A server with given answers; those to requests without a token may differ."""

    answers: dict[str, Answer] = field(default_factory=dict)
    to_strangers: Answer | None = (401, "Unauthorized")
    log: str = "one\ntwo\n"
    tokens: list[str] = field(default_factory=list)
    address: str = ""

    async def handle(self, request: web.Request) -> web.StreamResponse:
        token = request.headers.get("Authorization")
        self.tokens += [token] if token is not None else []
        if request.path.endswith("/logs/tail"):
            stream = web.WebSocketResponse()
            await stream.prepare(request)
            await stream.send_str(self.log)
            await stream.close()
            return stream
        if token is None and self.to_strangers is not None:
            status, body = self.to_strangers
        else:
            status, body = {"/api/version": (200, VERSION), **self.answers}.get(
                request.path, (404, "not found")
            )
        return web.Response(
            status=status, text=body, headers={"Location": "/login"} if 300 <= status < 400 else {}
        )


@pytest.fixture
def serve() -> Iterator[Callable[..., Dashboard]]:
    """Starts dashboards on this machine's loopback, with TLS if given a context, and ends them."""
    loop = asyncio.new_event_loop()
    runners: list[web.AppRunner] = []
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def start(dashboard: Dashboard, tls: ssl.SSLContext | None) -> None:
        app = web.Application()
        app.router.add_route("*", "/{any:.*}", dashboard.handle)
        runners.append(web.AppRunner(app))
        await runners[-1].setup()
        site = web.TCPSite(runners[-1], "127.0.0.1", 0, ssl_context=tls)
        await site.start()
        port = runners[-1].addresses[0][1]
        dashboard.address = f"{'https' if tls else 'http'}://127.0.0.1:{port}"

    def serve(dashboard: Dashboard, tls: ssl.SSLContext | None = None) -> Dashboard:
        asyncio.run_coroutine_threadsafe(start(dashboard, tls), loop).result(HANG_S)
        return dashboard

    yield serve
    for runner in runners:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(HANG_S)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@pytest.fixture(autouse=True)
def no_address_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Removes variables that Ray's client leaves behind, and those that name certificates."""
    for variable in ("RAY_API_SERVER_ADDRESS", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE"):
        monkeypatch.setenv(variable, "")


@pytest.mark.parametrize(
    "answer",
    [
        (404, "not found"),
        (400, "Client sent an HTTP request to an HTTPS server"),
        (500, "oops"),
        (302, ""),
        (204, ""),
        (200, "<html>log in</html>"),
        (200, '"2.60.0"'),
        (200, '{"version": "1"}'),
        (200, '{"ray_version": 1}'),
        (201, VERSION),
    ],
)
@pytest.mark.parametrize("needs_no_token", [False, True])
def test_what_is_no_dashboard_is_told_so_and_not_sent_the_token(
    serve: Callable[..., Dashboard], answer: Answer, needs_no_token: bool
) -> None:
    other = serve(Dashboard(to_strangers=answer))
    with pytest.raises(ConfigError) as refused:
        RayJobs(other.address, "the-token", needs_no_token=needs_no_token)
    assert (
        str(refused.value)
        == f"{other.address}: answers, but not as Ray's dashboard does (HTTP {answer[0]})"
    )
    assert other.tokens == []


@pytest.mark.parametrize("status", [401, 403])
def test_a_cluster_that_asks_for_the_token_is_sent_it(
    serve: Callable[..., Dashboard], status: int
) -> None:
    cluster, told = (
        serve(Dashboard({"/api/jobs/run": (200, json.dumps(JOB))}, (status, ""))),
        list[int](),
    )
    jobs = RayJobs(
        cluster.address, "the-token", before_token=lambda: told.append(len(cluster.tokens))
    )
    assert told == [0], "told before it is sent"
    job = jobs.find("run")
    assert (
        job is not None and job.state == "running" and set(cluster.tokens) == {"Bearer the-token"}
    )


def test_a_cluster_that_is_not_ready_is_asked_again(serve: Callable[..., Dashboard]) -> None:
    with pytest.raises(UnreachableError, match=r"not ready \(HTTP 503\)$"):
        RayJobs(serve(Dashboard(to_strangers=(503, ""))).address, "the-token")


@pytest.mark.parametrize(
    "answer",
    [(200, "<html>"), (200, "[]"), (200, "{}"), (200, '{"ray_version": "x y"}'), (500, "")],
)
def test_who_does_not_stay_a_dashboard_behind_the_token_is_told_so(
    serve: Callable[..., Dashboard], answer: Answer
) -> None:
    cluster = serve(Dashboard({"/api/version": answer}))
    with pytest.raises(
        ConfigError, match=f"^{cluster.address}: answers, but not as Ray's dashboard does: "
    ):
        RayJobs(cluster.address, "the-token")


def test_an_open_cluster_is_sent_no_token_and_nothing_is_said_of_one(
    serve: Callable[..., Dashboard], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(console, "announce", said.append)
    monkeypatch.setattr(reach, "is_loopback", lambda url: False)
    monkeypatch.setattr(
        dashboard_sdk,
        "get_auth_headers_if_auth_enabled",
        lambda _: {"Authorization": "Bearer rays"},
    )
    token = tmp_path / "token"
    make_token(token)
    cluster = serve(
        Dashboard({"/api/jobs/": (200, "[]"), "/api/jobs/run": (200, json.dumps(JOB))}, None)
    )
    with jobs_of(None, cluster.address, token, True) as jobs:
        assert jobs.all() == [] and list(jobs.lines("run", after=0)) == ["one", "two"]
    assert (cluster.tokens, said) == ([], [])
    cluster.to_strangers = (401, "")
    with jobs_of(None, cluster.address, token, True) as jobs:
        assert jobs.all() == []
    (line,) = said
    assert cluster.tokens and line.startswith(
        f"the token is sent to {cluster.address} unencrypted; use --hosts"
    )
    wanted = pytest.raises(
        ConfigError, match="this cluster wants a token; name its file with --token"
    )
    with wanted, jobs_of(None, cluster.address, tmp_path / "none", True):
        pass
    assert said == [line], "there was no token to send"


def ask(jobs: RayJobs, what: str) -> Any:
    """One of the questions that the commands ask."""
    match what:
        case "list":
            return jobs.all()
        case "find":
            return jobs.find("run")
        case "submit":
            return jobs.submit(Submission("run", "python job.py", {}, {}))
        case "delete":
            return jobs.delete("run")
        case "stop":
            return jobs.stop("run")
        case "logs":
            return jobs.printed("run")
    raise AssertionError(what)


PATHS = {
    "list": "/api/jobs/",
    "submit": "/api/jobs/",
    "stop": "/api/jobs/run/stop",
    "logs": "/api/jobs/run/logs",
}


@pytest.mark.parametrize("what", ["list", "find", "submit", "delete", "stop", "logs"])
@pytest.mark.parametrize("body", ["<html>", "null", "[1]", '{"x": 1}', '[{"status": "RUNNING"}]'])
def test_an_answer_that_is_none_of_rays_is_one_line(
    serve: Callable[..., Dashboard], what: str, body: str
) -> None:
    job = {} if what == "find" else {"/api/jobs/run": (200, json.dumps(JOB))}
    path = PATHS.get(what, "/api/jobs/run")
    cluster = serve(Dashboard({**job, path: (200, body)}))
    with pytest.raises(ResourceError) as caught:
        ask(RayJobs(cluster.address, "the-token"), what)
    assert str(caught.value).startswith(
        f"{cluster.address}: answers, but not as Ray's Jobs API does: "
    )
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 320


@pytest.mark.parametrize("what", ["list", "find", "submit", "delete", "stop"])
def test_what_the_cluster_cannot_do_is_one_line(serve: Callable[..., Dashboard], what: str) -> None:
    told = "Traceback (most recent call last):\n  File 'x'\nOSError: no disk"
    cluster = serve(Dashboard({PATHS.get(what, "/api/jobs/run"): (500, told)}))
    with pytest.raises(ResourceError, match=r"^the cluster could not do it: OSError: no disk"):
        ask(RayJobs(cluster.address, "the-token"), what)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1:8265",
        "http://127.0.0.1:0",
        "http://u:secret",
        "http://u:secret@h:1",
        "u:secret@h",
        "http://h/?secret",
    ],
)
def test_an_address_is_a_dashboards_url_and_not_told_where_it_is_none(address: str) -> None:
    with pytest.raises(
        ConfigError, match=r"^--address \(or RAY_API_\w+\) must be the dashboard's URL"
    ) as no:
        check_address(address)
    assert "secret" not in str(no.value)
    assert check_address("https://[::1]/") == "https://[::1]"


# --- certificates ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A key and a self-signed certificate of this machine's loopback."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not on this machine")
    folder = tmp_path_factory.mktemp("tls")
    command = [
        "openssl",
        "req",
        "-x509",
        "-nodes",
        "-newkey",
        "rsa:2048",
        "-keyout",
        "key.pem",
        "-out",
        "own.pem",
    ]
    names = ["-days", "2", "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*command, *names], cwd=folder, check=True, capture_output=True)
    return folder / "own.pem"


@pytest.fixture
def private(serve: Callable[..., Dashboard], certificate: Path) -> Dashboard:
    """A dashboard that shows this certificate."""
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, certificate.with_name("key.pem"))
    return serve(Dashboard({"/api/jobs/run": (200, json.dumps(JOB))}), tls)


@pytest.mark.parametrize("variable", ["REQUESTS_CA_BUNDLE", "SSL_CERT_FILE"])
def test_a_certificate_of_ones_own_counts_for_requests_and_for_the_log(
    private: Dashboard, certificate: Path, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        ConfigError,
        match=r"no TLS that this machine trusts; .* in REQUESTS_CA_BUNDLE or SSL_CERT_FILE",
    ):
        RayJobs(private.address, "the-token")
    monkeypatch.setenv(variable, str(certificate))
    assert list(RayJobs(private.address, "the-token").lines("run", after=0)) == ["one", "two"]


def test_proxies_are_still_not_asked(
    private: Dashboard, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
    for variable in ("https_proxy", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    assert RayJobs(private.address, "the-token").find("run")


def test_certificates_that_cannot_be_read_are_told(
    private: Dashboard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "none.pem"))
    with pytest.raises(ConfigError, match=rf"^SSL_CERT_FILE: {tmp_path}/none\.pem: no such file;"):
        RayJobs(private.address, "the-token")
    (tmp_path / "none.pem").write_text("no certificate", encoding="utf-8")
    with pytest.raises(ConfigError, match="no TLS that this machine trusts"):
        RayJobs(private.address, "the-token")
