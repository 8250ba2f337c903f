"""Commands for a cluster, as far as they need none: what they would do, and what they refuse before they ask it."""

import os
from pathlib import Path

import pytest
import yaml
from s3_server import serve
from stand_ins import stand_in
from support import DEMO
from terminal import Command, write_config

from orpo_ray.jobs.token import make_token

WRONG, LACKING = 2, 3


@pytest.fixture
def no_ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Fails the servers that are asked over SSH, and keeps that they were."""
    asked = tmp_path / "asked"
    stand_in(tmp_path / "bin" / "ssh", f"open({str(asked)!r}, 'a').write('x')\nsys.exit(255)")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return asked


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home and a project of one's own, and no cluster that is named elsewhere."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "demo").mkdir()
    for name in ("base", "train.jsonl", "h1.jsonl"):
        (tmp_path / "demo" / name).symlink_to(DEMO / name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for variable in ("RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def hosts(tmp_path: Path) -> Path:
    """Two servers."""
    (tmp_path / "id").touch()
    tree = {"name": "lab", "head": "10.0.0.1", "workers": ["10.0.0.2"], "ssh": {"key": "~/id"}, "token": "~/s/token"}
    (tmp_path / "hosts.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    return tmp_path / "hosts.yaml"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A run whose files would be carried along."""
    path = write_config(tmp_path)
    path.write_text(path.read_text(encoding="utf-8").replace(str(DEMO), "demo"), encoding="utf-8")
    return path


def test_what_up_would_do_is_told_and_nothing_is_asked(command: Command, hosts: Path, no_ssh: Path) -> None:
    done = command("cluster", "up", hosts, "--dry-run")
    first, second = done.out.splitlines()
    versions, token = "as root over SSH, compare its versions with the head's", hosts.with_name("s") / "token"
    given = f"{versions}; give it a new token, made in {token}; start Ray of /opt/orpo-ray"
    assert (first, second) == (f"10.0.0.1: {given} as the head", f"10.0.0.2: {given} and have it join 10.0.0.1")
    assert (done.code, done.said) == (0, ["nothing was started; servers that have joined already would be left alone"])
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


def test_where_no_server_was_reached_none_is_said_to_have_stopped(command: Command, hosts: Path, no_ssh: Path) -> None:
    done = command("cluster", "down", hosts)
    assert done.code == LACKING
    assert done.said[-1] == "orpo-ray: Ray may still run on 10.0.0.1, 10.0.0.2; none was reached"


@pytest.mark.parametrize("way", ["address", "hosts"])
def test_what_would_be_submitted_is_told_and_nobody_is_asked(
    command: Command, config: Path, hosts: Path, no_ssh: Path, way: str
) -> None:
    make_token(hosts.with_name("s") / "token")
    named = ("--address", "http://127.0.0.1:9", "--token", "s/token") if way == "address" else ("--hosts", hosts)
    asked = ("submit", "train", config, "name=team/a", *named, "--dry-run")
    done = command(*asked, "--json", "--", "--verbose")
    assert done.code == 0, done.err
    assert done.said[-1] == "nothing was submitted, and the cluster was not asked"
    plan = done.result
    assert (plan["run"], plan["job"], plan["code"]) == ("team/a", "team:a", [])
    assert plan["cluster"] == ("http://127.0.0.1:9" if way == "address" else "10.0.0.1, over SSH as root")
    assert plan["command"].startswith("python job.py ") and plan["command"].endswith(" train run.yaml --verbose --json")
    assert plan["files"]["demo/train.jsonl"] == (DEMO / "train.jsonl").stat().st_size
    assert {"job.py", "run.yaml", "demo/base/config.json"} < set(plan["files"])
    shown = command(*asked, "--ship-code")
    assert shown.out.startswith(f"job team:a on {plan['cluster']}: python job.py ")
    assert f"{plan['files']['demo/train.jsonl']:12,} bytes  demo/train.jsonl\n" in shown.out
    assert shown.out.splitlines()[-1].startswith("and the code in ")
    assert not no_ssh.exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["storage=runs"], "storage: runs is relative"),
        (["--env", "HF_TOKEN=hf_abc"], "--env HF_TOKEN: a secret"),
        (["--address", "http://127.0.0.1:0"], "--address (or RAY_API_SERVER_ADDRESS) must be the dashboard's URL"),
        (["--token", "nowhere"], "nowhere: the token cannot be read"),
        (["data.train.0.source=../x.jsonl"], "data.train.0.source: ../x.jsonl cannot be carried along"),
    ],
)
def test_a_dry_run_refuses_what_a_submission_would(
    command: Command, config: Path, hosts: Path, words: list[str], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_token(hosts.with_name("s") / "token")
    (hosts.parent / "project").mkdir()
    (hosts.parent / "x.jsonl").touch()
    monkeypatch.chdir(hosts.parent / "project")
    named = [] if "--token" in words else ["--token", str(hosts.with_name("s") / "token")]
    done = command("submit", "train", config, *words, *named, "--dry-run")
    assert done.code == WRONG and done.said[-1].startswith(f"orpo-ray: {says}"), done.err
    assert "hf_abc" not in done.err


def test_a_config_in_a_bucket_is_taken_and_told_by_its_url(
    command: Command, config: Path, hosts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_token(hosts.with_name("s") / "token")
    with serve() as server:
        for variable, value in {**server.environment, "XDG_CACHE_HOME": str(tmp_path / "cache")}.items():
            monkeypatch.setenv(variable, value)
        there, nowhere = "s3://bucket/best/tiny.yaml", "s3://bucket/none.yaml"
        server.bucket.put("best/tiny.yaml", config.read_bytes())
        on_the_hub = ["model.base=a/b", "data.train.0.source=a/b", "data.eval.0.source=a/b", "storage=s3://bucket/runs"]
        pods, token = ["--image", "x", "--gpus-per-node", "0"], ["--token", "s/token", "--dry-run"]
        for words, options in (
            (["submit", "train"], token),
            (["slurm", "render"], []),
            (["cluster", "kuberay"], [*on_the_hub, *pods]),
            (["config", "show"], []),
        ):
            done = command(*words, there, *options)
            assert done.code == 0, done.err
        assert f"train=(orpo-ray train {there})\n" in (tmp_path / "tiny.sbatch").read_text(encoding="utf-8")
        for words, options in ((["submit", "train"], token), (["slurm", "render"], []), (["train"], [])):
            done = command(*words, nowhere, *options)
            assert (done.code, done.said) == (WRONG, [f"orpo-ray: {nowhere}: no such file"])
