"""Commands for a cluster, without one: what they would do, and what they refuse at once."""

import http.server
import json
import os
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml
from ray_head import free_ports
from s3_server import serve
from stand_ins import stand_in
from support import DEMO
from terminal import FAILED, LACKING, STOPPED, WRONG, Command, one_line, write_config

from orpo_ray.cli.console import announce
from orpo_ray.jobs.job import Job, State, Submission
from orpo_ray.jobs.submit import Patience
from orpo_ray.jobs.token import make_token


@pytest.fixture
def no_ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes every server fail that is asked over SSH, and records it."""
    asked = tmp_path / "asked"
    stand_in(tmp_path / "bin" / "ssh", f"open({str(asked)!r}, 'a').write('x')\nsys.exit(255)")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return asked


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home and a project of its own, without variables that name a cluster."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "demo").mkdir()
    for name in ("base", "train.jsonl", "h1.jsonl"):
        (tmp_path / "demo" / name).symlink_to(DEMO / name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for variable in ("RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.setenv(variable, "")  # and undoes what a command sets


@pytest.fixture
def hosts(tmp_path: Path) -> Path:
    """Two servers."""
    (tmp_path / "id").touch()
    tree = {
        "name": "lab",
        "head": "10.0.0.1",
        "workers": ["10.0.0.2"],
        "ssh": {"key": "~/id"},
        "token": "~/s/token",
    }
    (tmp_path / "hosts.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    return tmp_path / "hosts.yaml"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A run whose files would be carried along."""
    path = write_config(tmp_path)
    path.write_text(path.read_text(encoding="utf-8").replace(str(DEMO), "demo"), encoding="utf-8")
    return path


def test_what_up_would_do_is_told_and_nothing_is_asked(
    command: Command, hosts: Path, no_ssh: Path
) -> None:
    done = command("cluster", "up", hosts, "--dry-run")
    first, second = done.out.splitlines()
    versions, token = (
        "as root over SSH, compare its versions with the head's",
        hosts.with_name("s") / "token",
    )
    given = f"{versions}; give it a new token, made in {token}; start Ray of /opt/orpo-ray"
    assert (first, second) == (
        f"10.0.0.1: {given} as the head",
        f"10.0.0.2: {given} and have it join 10.0.0.1",
    )
    assert (done.code, done.said) == (
        0,
        ["nothing was started; servers that have joined already would be left alone"],
    )
    assert not no_ssh.exists() and not token.parent.exists()
    make_token(token)
    steps = command("cluster", "up", hosts, "--dry-run", "--json").result["servers"][0]["steps"]
    assert steps[1] == f"give it the token of {token}"
    token.chmod(0o644)
    assert "others may read or write the token" in command("cluster", "up", hosts, "--dry-run").err


@pytest.mark.parametrize("name", ["up", "status", "down"])
def test_a_key_that_is_not_here_is_named_before_a_server_is_asked(
    command: Command, hosts: Path, no_ssh: Path, name: str
) -> None:
    (hosts.parent / "id").unlink()
    done = command("cluster", name, hosts)
    assert (done.code, done.said) == (
        WRONG,
        [f"orpo-ray: ssh.key: {hosts.parent}/id cannot be read: No such file or directory"],
    )
    assert not no_ssh.exists()


def test_where_no_server_was_reached_none_is_said_to_have_stopped(
    command: Command, hosts: Path, no_ssh: Path
) -> None:
    done = command("cluster", "down", hosts)
    assert done.code == LACKING
    assert done.said[-1] == "orpo-ray: Ray may still run on 10.0.0.1, 10.0.0.2; none was reached"


@pytest.mark.parametrize("way", ["address", "hosts"])
def test_what_would_be_submitted_is_told_and_nobody_is_asked(
    command: Command, config: Path, hosts: Path, no_ssh: Path, way: str
) -> None:
    make_token(hosts.with_name("s") / "token")
    named = (
        ("--address", "http://127.0.0.1:9", "--token", "s/token")
        if way == "address"
        else ("--hosts", hosts)
    )
    asked = ("submit", "train", config, "name=team/a", *named, "--dry-run")
    done = command(*asked, "--json", "--", "--verbose")
    assert done.code == 0, done.err
    assert done.said[-1] == "nothing was submitted, and no connection to the cluster was made"
    plan = done.result
    assert (plan["run"], plan["job"], plan["code"]) == ("team/a", "team:a", [])
    assert plan["cluster"] == (
        "http://127.0.0.1:9" if way == "address" else "10.0.0.1, over SSH as root"
    )
    assert plan["command"].startswith("python job.py ") and plan["command"].endswith(
        " train run.yaml --verbose --json"
    )
    assert plan["files"]["demo/train.jsonl"] == (DEMO / "train.jsonl").stat().st_size
    assert {"job.py", "run.yaml", "demo/base/config.json"} < set(plan["files"])
    shown = command(*asked, "--ship-code")
    assert shown.out.startswith(f"job team:a on {plan['cluster']}: python job.py ")
    assert f"{plan['files']['demo/train.jsonl']:12,} bytes  demo/train.jsonl\n" in shown.out
    assert shown.out.splitlines()[-1].startswith("and the code in ")
    assert not no_ssh.exists()


class Imposter(http.server.ThreadingHTTPServer):
    """A dashboard that needs no token and has another Ray; it records its requests."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _AnotherRay)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.asked: list[str] = []


class _AnotherRay(http.server.BaseHTTPRequestHandler):
    server: Imposter

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        answer = {"version": "4", "ray_version": "2.61.0", "ray_commit": "", "session_name": ""}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing is logged."""


@pytest.fixture
def imposter() -> Iterator[Imposter]:
    with Imposter() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def token(tmp_path: Path) -> Path:
    make_token(tmp_path / "s" / "token")
    return tmp_path / "s" / "token"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["storage=runs"], "storage: runs is relative"),
        (["--env", "HF_TOKEN=hf_abc"], "--env HF_TOKEN: a secret"),
        (
            ["--address", "http://127.0.0.1:0"],
            "--address (or RAY_API_SERVER_ADDRESS) must be the dashboard's URL",
        ),
        (["--address", "ftp://x"], "--address (or RAY_API_SERVER_ADDRESS) must be"),
        (["--address", "http://me:hf_abc@x:8265"], "--address (or RAY_API_SERVER_ADDRESS) must be"),
        (["--hosts", "hosts.yaml"], "--hosts and --address both name a cluster"),
        (["--token", "nowhere"], "nowhere: the token cannot be read"),
        (["--token", "empty"], "empty: must be one line with the token"),
        (
            ["data.train.0.source=../x.jsonl"],
            "data.train.0.source: ../x.jsonl cannot be carried along",
        ),
        (["--", "--verbose", "storage=runs"], "storage=runs: only options of train may follow --"),
    ],
)
@pytest.mark.parametrize("dry", [["--dry-run"], []])
def test_refused_before_anything_is_sent(
    command: Command,
    config: Path,
    token: Path,
    imposter: Imposter,
    dry: list[str],
    words: list[str],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    project = config.parent / "project"
    project.mkdir()
    (config.parent / "x.jsonl").touch()
    (project / "empty").touch(mode=0o600)
    monkeypatch.chdir(project)
    done = command(
        "submit", "train", config, "--address", imposter.address, "--token", token, *dry, *words
    )
    assert one_line(done, WRONG).startswith(f"orpo-ray: {says}")
    assert "hf_abc" not in done.err
    assert imposter.asked == []


def test_a_cluster_that_wants_no_token_is_refused_and_one_with_another_ray(
    command: Command, imposter: Imposter, token: Path
) -> None:
    named = ("status", "--address", imposter.address)
    one_line(command(*named, "--anyone-may-run-code"), WRONG, "the cluster has Ray 2.61.0")
    one_line(command(*named, "--token", token), WRONG, "--anyone-may-run-code")
    assert imposter.asked


def test_a_cluster_that_is_not_there(command: Command, imposter: Imposter, token: Path) -> None:
    nowhere = f"http://127.0.0.1:{free_ports(1)[0]}"
    told = f"{nowhere}: no answer"
    one_line(command("status", "--address", nowhere, "--token", token), LACKING, told)
    tls = imposter.address.replace("http:", "https:")
    told = "no TLS that this machine trusts"
    one_line(command("status", "--address", tls, "--token", token), WRONG, told)
    one_line(command("status", "", "--token", token), WRONG, "must be the name of a run")


def test_who_stops_waiting_for_a_cluster_is_not_told_of_a_run_there(
    command: Command, config: Path, token: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(
        "orpo_ray.cli.on_cluster.patience", lambda: Patience(announce, sleep=interrupted)
    )
    nowhere = ("--address", f"http://127.0.0.1:{free_ports(1)[0]}", "--token", str(token))
    done = command("submit", "train", config, *nowhere)
    assert any("asking again" in line for line in done.said)
    told = "interrupted before the cluster confirmed run tiny"
    one_line(
        done, STOPPED, told, f"`orpo-ray status {' '.join(nowhere)}` shows the runs that it has"
    )


@dataclass
class Cluster:
    """A cluster without a job. A submitted job is over at once, with this state and these lines."""

    state: State
    exit_code: int | None
    printed: list[str]
    submitted: list[Submission] = field(default_factory=list)

    def find(self, run: str) -> Job | None:
        if not self.submitted:
            return None
        return Job(
            run=run, state=self.state, metadata={}, exit_code=self.exit_code, message="lost\n"
        )

    def submit(self, submission: Submission) -> None:
        self.submitted.append(submission)

    def lines(self, run: str, after: int) -> Iterator[str]:
        yield from self.printed[after:]


SAID = json.dumps({"error": "x.jsonl: no such file", "exit_code": WRONG})


@pytest.mark.parametrize(
    ("state", "ended", "printed", "code", "says"),
    [
        (
            "failed",
            WRONG,
            ["orpo-ray: x.jsonl: no such file", SAID],
            WRONG,
            "run tiny: x.jsonl: no such file",
        ),
        ("failed", LACKING, ["some word"], LACKING, "run tiny: see `orpo-ray logs tiny"),
        ("failed", 137, ["some word"], FAILED, "run tiny was ended from outside (exit code 137)"),
        (
            "failed",
            None,
            ["some word"],
            FAILED,
            "run tiny was lost: lost; the same command resumes it",
        ),
        ("stopped", None, ["some word"], STOPPED, "run tiny: stopped; the same command resumes it"),
    ],
)
def test_the_exit_code_is_what_became_of_the_job(
    command: Command,
    config: Path,
    monkeypatch: pytest.MonkeyPatch,
    state: State,
    ended: int | None,
    printed: list[str],
    code: int,
    says: str,
) -> None:
    cluster = Cluster(state, ended, printed)
    monkeypatch.setattr("orpo_ray.cli.on_cluster.jobs_of", lambda *named: nullcontext(cluster))
    done = command("submit", "train", config)
    assert one_line(done, code).startswith(f"orpo-ray: {says}")
    assert ("some word" in done.said) == (printed == ["some word"])


def test_options_behind_two_dashes_are_the_jobs_own(
    command: Command, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = Cluster("succeeded", 0, ["nothing was started", json.dumps({"steps": 4})])
    monkeypatch.setattr("orpo_ray.cli.on_cluster.jobs_of", lambda *named: nullcontext(cluster))
    done = command("submit", "train", config, "--", "--dry-run")
    assert (done.code, done.out, done.said[-1]) == (0, "", "nothing was started"), done.err
    (submission,) = cluster.submitted
    assert submission.entrypoint.endswith(" train run.yaml --dry-run --json")


def test_a_config_in_a_bucket_is_taken_and_told_by_its_url(
    command: Command, config: Path, hosts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_token(hosts.with_name("s") / "token")
    with serve() as server:
        for variable, value in {
            **server.environment,
            "XDG_CACHE_HOME": str(tmp_path / "cache"),
        }.items():
            monkeypatch.setenv(variable, value)
        there, nowhere = "s3://bucket/best/tiny.yaml", "s3://bucket/none.yaml"
        server.bucket.put("best/tiny.yaml", config.read_bytes())
        on_the_hub = [
            "model.base=a/b",
            "data.train.0.source=a/b",
            "data.eval.0.source=a/b",
            "storage=s3://bucket/runs",
        ]
        pods, token = ["--image", "x", "--gpus-per-node", "0"], ["--token", "s/token", "--dry-run"]
        for words, options in (
            (["submit", "train"], token),
            (["slurm", "render"], []),
            (["cluster", "kuberay"], [*on_the_hub, *pods]),
            (["config", "show"], []),
        ):
            done = command(*words, there, *options)
            assert done.code == 0, done.err
        assert f"train=(orpo-ray train {there})\n" in (tmp_path / "tiny.sbatch").read_text(
            encoding="utf-8"
        )
        for words, options in (
            (["submit", "train"], token),
            (["slurm", "render"], []),
            (["train"], []),
        ):
            done = command(*words, nowhere, *options)
            assert (done.code, done.said) == (WRONG, [f"orpo-ray: {nowhere}: no such file"])
