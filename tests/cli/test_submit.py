"""Runs submitted to a Ray cluster of one machine that wants a token.

What needs no cluster to be shown is in test_cluster.py.
"""

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from project import weights, write_project
from ray_head import Head
from support import wait_until
from terminal import FAILED, LACKING, STOPPED, WRONG, Command, one_line, start

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Head]:
    """A Ray of this machine that wants a token."""
    head = Head(cpus=2)
    yield head
    head.end()


def way(cluster: Head) -> list[str]:
    """The variables by which the commands find the cluster."""
    return ["--address", cluster.dashboard, "--token", str(cluster.token)]


@pytest.fixture(scope="module")
def written(cluster: Head) -> Path:
    """A config that names its files by relative paths, and those files."""
    training = {"max_steps": 4, "eval_every": 2, "checkpoint_every": 2}
    folder = cluster.folder / "project"
    write_project(folder, str(cluster.folder / "storage"), "tiny", 48, training, {"workers": 1})
    return folder


@pytest.fixture(autouse=True)
def project(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder of the commands. Variables that they set are removed after the test."""
    monkeypatch.chdir(written)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")


def test_a_submitted_run_is_the_run_of_this_machine_and_goes_on_when_nobody_follows(
    command: Command, cluster: Head
) -> None:
    first = start("submit", "train", "tiny.yaml", *way(cluster))
    # When a line of the job is shown, the submission is over, and the training still to come.
    wait_until(
        lambda: "\n" in first.said().partition("submitted run tiny\n")[2], "the job has begun"
    )
    first.send_signal(signal.SIGINT)
    where = " ".join(way(cluster))
    told = (f"orpo-ray stop tiny {where}`", f"logs --follow tiny {where}`")
    one_line(first.end(), STOPPED, "no longer following", *told)

    followed = command("logs", "tiny", "--follow", *way(cluster))
    assert followed.code == 0, followed.err
    printed = followed.out.splitlines()
    assert any(line.startswith("step 4/4  ") for line in printed)
    result = json.loads(printed[-1])
    assert result["status"] == "finished"
    here = command("train", "tiny.yaml", f"storage={cluster.folder / 'here'}", "--json")
    assert weights(result["adapter"]) == weights(here.result["adapter"])

    again = command("submit", "train", "tiny.yaml", *way(cluster))
    assert again.code == 0, again.err
    assert f"adapter: {result['adapter']}\n" in again.out
    assert "carried along: demo/train.jsonl, demo/h1.jsonl, demo/base" in again.said
    assert "run tiny was submitted before (succeeded); submitting it again" in again.said
    other = "what the earlier job printed is not its own"
    assert not any(line.startswith("step ") for line in again.said), other
    assert any(line.startswith("run tiny is finished: ") for line in again.said)


@pytest.mark.long
def test_a_run_is_stopped_with_a_checkpoint_and_goes_on_when_it_is_submitted_again(
    command: Command, cluster: Head
) -> None:
    length = ["training.max_steps=60", "training.eval_every=30", "training.checkpoint_every=30"]
    ask = ["tiny.yaml", "name=team/long", *length, *way(cluster)]
    first = start("submit", "train", *ask)
    metrics = cluster.folder / "storage" / "team" / "long" / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 2, "it trains")
    wait_until(cluster.processes.hold, "it is held")

    attached = command("submit", "train", *ask, "--detach", "--json")
    assert (attached.code, attached.result) == (0, {"run": "team/long", "state": "at work"})
    assert "run team/long is at work on the cluster already; nothing was submitted" in attached.said
    other = command("submit", "train", *ask, "training.seed=7")
    one_line(other, WRONG, "run team/long is at work on the cluster with other settings")
    shown = command("status", "team/long", *way(cluster), "--json")
    assert [(run["command"], run["state"]) for run in shown.result["runs"]] == [
        ("train", "running")
    ]

    stopping = start("stop", "team/long", *way(cluster))
    wait_until(lambda: "stopping" in first.said(), "the run hears of it")
    cluster.processes.release()
    ended = stopping.end()
    assert (ended.code, ended.out) == (0, "team/long: stopped\n"), ended.err
    one_line(first.end(), STOPPED, "run team/long: stopped at step", "with a checkpoint")
    assert list((metrics.parent / "checkpoints").glob("step-*"))
    stopped = command("logs", "team/long", *way(cluster))
    assert any(line.startswith("step 0/60  ") for line in stopped.out.splitlines())

    done = command("submit", "train", *ask, "--json")
    assert done.code == 0, done.err
    assert any(line.startswith("resuming at step ") for line in done.said)
    assert any(line.startswith("step 60/60  ") for line in done.said)
    whole = command("train", *ask[:-4], f"storage={cluster.folder / 'whole'}", "--json")
    assert weights(done.result["adapter"]) == weights(whole.result["adapter"])

    judged = command("submit", "evaluate", *ask, "--json", "--", "--samples", "1")
    assert judged.code == 0, judged.err
    assert len(judged.result["samples"]) == 1
    assert judged.result["metrics"]["trained"]["h1.jsonl"]["pairs"] == 16
    assert_nowhere_to_be_read(cluster)


def test_the_exit_code_is_the_commands_own(command: Command, cluster: Head) -> None:
    asked = ("submit", "prepare", "tiny.yaml", "name=y", *way(cluster), "--env", "PATH=/bin")
    broken = command(*asked)
    one_line(broken, FAILED, "run y was ended from outside (exit code 127)")
    first = "what the shell says comes before Ray's own first line"
    assert "not found" in "".join(broken.said[:-1]), first
    asked = ("submit", "train", "tiny.yaml", "name=x", "scale.workers=9", *way(cluster), "--json")
    lacking = command(*asked)
    one_line(lacking, LACKING, "scale.workers: 9 workers")
    assert lacking.result["exit_code"] == LACKING


@pytest.mark.long
def test_the_code_of_this_machine_is_sent_where_asked(command: Command, cluster: Head) -> None:
    asked = ("submit", "prepare", "tiny.yaml", "name=sent", *way(cluster), "--ship-code", "--json")
    done = command(*asked)
    assert done.code == 0 and done.result["train"] == 48, done.err
    sent = "session_*/runtime_resources/py_modules_files/_ray_pkg_*/orpo_ray/api/ground.py"
    assert list((cluster.folder / "ray").glob(sent))
    assert_nowhere_to_be_read(cluster)


def test_doctor_asks_every_server_by_a_job_that_it_deletes(command: Command, cluster: Head) -> None:
    done = command("doctor", "tiny.yaml", *way(cluster), "--json")
    (server,) = done.result["servers"]
    assert server["facts"]["failures"] == {}, done.err
    found = {finding["subject"]: finding for finding in reversed(server["findings"])}
    assert "a server of the cluster" in found["Ray"]["what"]
    assert found["base"]["what"].startswith("demo/base: template the base's own")
    assert found["storage"]["what"].startswith(f"{cluster.folder}/storage: there and back")
    assert done.code == (LACKING if done.result["stops"] else 0)
    assert "clock" in {finding["subject"] for finding in done.result["findings"]}
    left = command("status", *way(cluster), "--json").result["runs"]
    assert not [run for run in left if run["run"].startswith("doctor")]
    assert not list((cluster.folder / "storage").glob("_seen-*"))


def test_without_the_token_there_is_one_line_at_once(
    command: Command, cluster: Head, tmp_path: Path
) -> None:
    token = tmp_path / "token"
    token.write_text("0123456789abcdef", encoding="ascii")
    token.chmod(0o600)
    named = ("--address", cluster.dashboard, "--token", token)
    done = command("submit", "train", "tiny.yaml", *named)
    one_line(done, WRONG, "does not take this token")
    assert not any("asking again" in line for line in done.said), "it does not wait"


def test_a_run_that_the_cluster_does_not_know_is_told(command: Command, cluster: Head) -> None:
    one_line(command("stop", "nobody", *way(cluster)), WRONG, "has no job of run nobody")
    one_line(command("logs", "tiny?x", *way(cluster)), WRONG, "has no job of run tiny?x")


def test_the_token_goes_straight_to_the_cluster(
    command: Command, cluster: Head, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".netrc").write_text("default login me password other\n", encoding="utf-8")
    (tmp_path / ".netrc").chmod(0o600)
    nobody = "http://127.0.0.1:9"
    for name, value in {"http_proxy": nobody, "HTTP_PROXY": nobody, "HOME": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    shown = command("status", *way(cluster), "--json")
    assert shown.code == 0 and "runs" in shown.result, shown.err


def test_the_token_is_nowhere_to_be_read(cluster: Head) -> None:
    assert_nowhere_to_be_read(cluster)


def assert_nowhere_to_be_read(cluster: Head) -> None:
    """Places of the token: files that the cluster and its jobs have made, and command lines."""
    token = cluster.token.read_text().strip().encode()
    others = [
        path for path in cluster.folder.rglob("*") if path.is_file() and path != cluster.token
    ]
    assert len(others) > 50
    assert not [path for path in others if token in path.read_bytes()]
    for process in psutil.process_iter():
        try:
            assert token.decode() not in " ".join(process.cmdline())
        except psutil.Error:
            continue  # it has ended, or we may not read it
