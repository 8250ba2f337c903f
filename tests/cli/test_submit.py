"""Runs submitted to a Ray cluster of one machine that wants a token, as a person does it, by real commands."""

import http.server
import json
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from project import weights, write_project
from ray_head import Head, free_ports
from support import HANG_S, Done, wait_until
from terminal import ENVIRONMENT, FAILED, LACKING, STOPPED, WRONG, one_line, shell

pytestmark = [pytest.mark.ray, pytest.mark.slow]

REFUSED_WITHIN_S = 5.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[Head]:
    """A Ray of this machine that wants a token."""
    head = Head(cpus=2)
    yield head
    head.end()


def way(cluster: Head) -> list[str]:
    """How the commands find it."""
    return ["--address", cluster.dashboard, "--token", str(cluster.token)]


@pytest.fixture(scope="module")
def project(cluster: Head) -> Path:
    """Where the commands are given: a config that names its files by relative paths."""
    training = {"max_steps": 4, "eval_every": 2, "checkpoint_every": 2}
    folder = cluster.folder / "project"
    write_project(folder, str(cluster.folder / "storage"), "tiny", 48, training, {"workers": 1})
    return folder


def test_a_submitted_run_is_the_run_of_this_machine(cluster: Head, project: Path) -> None:
    done = shell("submit", "train", "tiny.yaml", *way(cluster), "--json", cwd=project)
    assert done.code == 0, done.err
    assert "carried along: demo/train.jsonl, demo/h1.jsonl, demo/base" in done.said
    assert any(line.startswith("step 4/4  ") for line in done.said)
    here = shell("train", "tiny.yaml", f"storage={cluster.folder / 'here'}", "--json", cwd=project)
    assert weights(done.result["adapter"]) == weights(here.result["adapter"])

    again = shell("submit", "train", "tiny.yaml", *way(cluster), cwd=project)
    assert (again.code, again.out) == (0, f"adapter: {done.result['adapter']}\n")
    assert "run tiny was submitted before (succeeded); submitting it again" in again.said
    assert not any(line.startswith("step ") for line in again.said), "what the earlier job printed is not its own"
    assert any(line.startswith("run tiny is finished: ") for line in again.said)

    judged = shell("submit", "evaluate", "tiny.yaml", *way(cluster), "--json", "--", "--samples", "1", cwd=project)
    assert judged.code == 0, judged.err
    assert len(judged.result["samples"]) == 1 and judged.result["metrics"]["trained"]["h1.jsonl"]["pairs"] == 16


@pytest.mark.long
def test_a_run_is_stopped_with_a_checkpoint_and_goes_on_when_it_is_submitted_again(
    cluster: Head, project: Path
) -> None:
    length = ["training.max_steps=60", "training.eval_every=30", "training.checkpoint_every=30"]
    ask = ["tiny.yaml", "name=team/long", *length, *way(cluster)]
    first = submitting(project, "train", *ask)
    metrics = cluster.folder / "storage" / "team" / "long" / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 2, "it trains")

    attached = shell("submit", "train", *ask, "--detach", "--json", cwd=project)
    assert (attached.code, attached.result) == (0, {"run": "team/long", "state": "at work"})
    assert "run team/long is at work on the cluster already; nothing was submitted" in attached.said
    other = shell("submit", "train", *ask, "training.seed=7", cwd=project)
    one_line(other, WRONG, "run team/long is at work on the cluster with other settings")
    shown = shell("status", "team/long", *way(cluster), "--json")
    assert [(run["command"], run["state"]) for run in shown.result["runs"]] == [("train", "running")]

    ended = shell("stop", "team/long", *way(cluster))
    assert (ended.code, ended.out) == (0, "team/long: stopped\n"), ended.err
    one_line(first(), STOPPED, "run team/long: stopped at step", "with a checkpoint")
    assert list((metrics.parent / "checkpoints").glob("step-*"))
    stopped = shell("logs", "team/long", *way(cluster))
    assert any(line.startswith("step 0/60  ") for line in stopped.out.splitlines())

    done = shell("submit", "train", *ask, "--json", cwd=project)
    assert done.code == 0, done.err
    assert any(line.startswith("resuming at step ") for line in done.said)
    whole = shell("train", *ask[:-4], f"storage={cluster.folder / 'whole'}", "--json", cwd=project)
    assert weights(done.result["adapter"]) == weights(whole.result["adapter"])
    assert_nowhere_to_be_read(cluster)


def submitting(project: Path, *words: str) -> Callable[[], Done]:
    """A submission under way; call it to see its end."""
    process = subprocess.Popen(
        [sys.executable, "-m", "orpo_ray.cli.main", "submit", *words],
        cwd=project,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )

    def end() -> Done:
        out, err = process.communicate(timeout=HANG_S)
        return Done(process.returncode, out, err)

    end.process = process  # type: ignore[attr-defined]
    return end


def test_who_stops_following_does_not_stop_the_run(cluster: Head, project: Path) -> None:
    first = submitting(project, "train", "tiny.yaml", "name=alone", *way(cluster))
    metrics = cluster.folder / "storage" / "alone" / "metrics.jsonl"
    wait_until(metrics.exists, "it trains")
    first.process.send_signal(signal.SIGINT)  # type: ignore[attr-defined]
    where = " ".join(way(cluster))
    one_line(first(), STOPPED, "no longer following", f"orpo-ray stop alone {where}`", f"logs --follow alone {where}`")
    followed = shell("logs", "alone", "--follow", *way(cluster))
    assert followed.code == 0 and json.loads(followed.out.splitlines()[-1])["status"] == "finished"


def test_who_stops_waiting_for_a_cluster_is_not_told_of_a_run_there(cluster: Head, project: Path) -> None:
    nowhere = ["--address", f"http://127.0.0.1:{free_ports(1)[0]}", "--token", str(cluster.token)]
    waiting = submitting(project, "train", "tiny.yaml", *nowhere)
    process = waiting.process  # type: ignore[attr-defined]
    assert any("asking again" in line for line in process.stderr)
    process.send_signal(signal.SIGINT)
    told = "interrupted before the cluster said that it has run tiny"
    one_line(waiting(), STOPPED, told, f"`orpo-ray status {' '.join(nowhere)}` shows what it has")


def test_the_exit_code_is_the_commands_own(cluster: Head, project: Path) -> None:
    missing = shell(
        "submit", "train", "tiny.yaml", "name=x", "data.train.0.source=/no/x.jsonl", *way(cluster), cwd=project
    )
    one_line(missing, WRONG, "run x: /no/x.jsonl: no such file")
    planned = shell("submit", "train", "tiny.yaml", "name=x", *way(cluster), "--", "--dry-run", cwd=project)
    assert (planned.code, planned.out) == (0, ""), planned.err
    assert any("nothing was started" in line for line in planned.said)
    broken = shell("submit", "prepare", "tiny.yaml", "name=y", *way(cluster), "--env", "PATH=/bin", cwd=project)
    one_line(broken, FAILED, "run y was ended from outside (exit code 127)")
    assert "not found" in "".join(broken.said[:-1]), "what the shell says comes before Ray's own first line"
    lacking = shell("submit", "train", "tiny.yaml", "name=x", "scale.workers=9", *way(cluster), "--json", cwd=project)
    one_line(lacking, LACKING, "scale.workers: 9 workers")
    assert lacking.result["exit_code"] == LACKING


@pytest.mark.long
def test_the_code_of_this_machine_is_sent_where_asked(cluster: Head, project: Path) -> None:
    done = shell("submit", "prepare", "tiny.yaml", "name=sent", *way(cluster), "--ship-code", "--json", cwd=project)
    assert done.code == 0 and done.result["train"] == 48, done.err
    assert list(
        (cluster.folder / "ray").glob("session_*/runtime_resources/py_modules_files/_ray_pkg_*/orpo_ray/api.py")
    )
    assert_nowhere_to_be_read(cluster)


@pytest.mark.parametrize(
    ("content", "told"),
    [(None, "the token cannot be read"), ("0123456789abcdef", "does not take this token"), ("", "one line")],
)
def test_without_the_token_there_is_one_line_at_once(
    cluster: Head, project: Path, tmp_path: Path, content: str | None, told: str
) -> None:
    token = tmp_path / "token"
    if content is not None:
        token.write_text(content, encoding="ascii")
        token.chmod(0o600)
    began = time.monotonic()
    done = shell("submit", "train", "tiny.yaml", "--address", cluster.dashboard, "--token", token, cwd=project)
    assert time.monotonic() - began < REFUSED_WITHIN_S
    one_line(done, WRONG, told)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--env", "HF_TOKEN=hf_abc"], "--env HF_TOKEN: a secret"),
        (["storage=runs"], "storage: runs is relative"),
        (["--hosts", "hosts.yaml"], "--hosts and --address both name a cluster"),
        (["--address", "ftp://x"], "must be the dashboard's URL"),
        (["--address", "http://me:hf_abc@x:8265"], "must be the dashboard's URL"),
        (["--", "--verbose", "storage=runs"], "storage=runs: settings stand before --"),
    ],
)
def test_refused_before_anything_is_sent(cluster: Head, project: Path, words: list[str], told: str) -> None:
    done = shell("submit", "train", "tiny.yaml", *way(cluster), *words, cwd=project)
    one_line(done, WRONG, told)
    assert "hf_abc" not in done.err


def test_the_token_is_nowhere_to_be_read(cluster: Head) -> None:
    assert_nowhere_to_be_read(cluster)


def assert_nowhere_to_be_read(cluster: Head) -> None:
    """The token, in any file that the cluster and its jobs have made so far, or in a command line."""
    token = cluster.token.read_text().strip().encode()
    others = [path for path in cluster.folder.rglob("*") if path.is_file() and path != cluster.token]
    assert len(others) > 50
    assert not [path for path in others if token in path.read_bytes()]
    for process in psutil.process_iter():
        try:
            assert token.decode() not in " ".join(process.cmdline())
        except psutil.Error:
            continue  # it has ended, or is not ours to look at


class Imposter(http.server.BaseHTTPRequestHandler):
    """A dashboard that asks nobody for a token, and has another Ray."""

    def do_GET(self) -> None:
        answer = json.dumps({"version": "4", "ray_version": "2.61.0", "ray_commit": "", "session_name": ""}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing is logged."""


@pytest.fixture
def imposter() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Imposter)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_cluster_that_wants_no_token_is_refused_and_one_with_another_ray(imposter: str) -> None:
    one_line(shell("status", "--address", imposter, "--anyone-may-run-code"), WRONG, "the cluster has Ray 2.61.0")
    with tempfile.NamedTemporaryFile("w") as token:
        token.write("0123")
        token.flush()
        one_line(shell("status", "--address", imposter, "--token", token.name), WRONG, "--anyone-may-run-code")


def test_the_token_goes_straight_to_the_cluster(
    cluster: Head, imposter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".netrc").write_text("default login me password other\n", encoding="utf-8")
    (tmp_path / ".netrc").chmod(0o600)
    for name, value in {"http_proxy": imposter, "HTTP_PROXY": imposter, "HOME": str(tmp_path)}.items():
        monkeypatch.setitem(ENVIRONMENT, name, value)
    shown = shell("status", *way(cluster), "--json")
    assert shown.code == 0 and "runs" in shown.result, shown.err


def test_a_cluster_that_is_not_there(cluster: Head) -> None:
    nowhere = f"http://127.0.0.1:{free_ports(1)[0]}"
    one_line(shell("status", "--address", nowhere, "--token", cluster.token), LACKING, f"{nowhere}: no answer")
    tls = cluster.dashboard.replace("http:", "https:")
    one_line(shell("status", "--address", tls, "--token", cluster.token), WRONG, "no TLS that this machine trusts")
    one_line(shell("stop", "nobody", *way(cluster)), WRONG, "the cluster has no job of run nobody")
    one_line(shell("logs", "tiny?x", *way(cluster)), WRONG, "the cluster has no job of run tiny?x")
    one_line(shell("status", "", *way(cluster)), WRONG, "must be the name of a run")
