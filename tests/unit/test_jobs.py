"""Submitting without a cluster: what is sent, what is refused, and what follows an answer."""

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from stand_ins import stand_in
from support import settings

from orpo_ray.config import RunConfig, build, load_config
from orpo_ray.errors import ConfigError, ResourceError, StoppedError
from orpo_ray.jobs import entry
from orpo_ray.jobs.job import (
    Job,
    NameTakenError,
    State,
    Submission,
    UnreachableError,
    decide,
    describe,
    last_line,
)
from orpo_ray.jobs.package import MOST_BYTES, pack, sort_luggage
from orpo_ray.jobs.reach import is_loopback, way_to
from orpo_ray.jobs.request import parse_environment, request
from orpo_ray.jobs.secrets import is_secret, refuse_secrets, refuse_secrets_of_overrides
from orpo_ray.jobs.submit import Patience, follow, stop, submit, submit_and_follow
from orpo_ray.jobs.token import make_token

HERS = {"command": "train", "config": "a"}


def config_of(**changes: Any) -> RunConfig:
    return build(RunConfig, {**settings(Path("/storage")), **changes}, {(): "tests"})


def job_of(
    state: State, metadata: dict[str, str] | None = None, run: str = "run", **facts: Any
) -> Job:
    return Job(run=run, state=state, metadata=HERS if metadata is None else metadata, **facts)


class Cluster:
    """Jobs of a scripted cluster: it leaves the first `down` questions unanswered."""

    def __init__(self, job: Job | None = None, down: int = 0, starts: int = 0) -> None:
        self.job, self.down, self.failing_starts = job, down, starts
        self.log: list[str | None] = []
        """Lines of the job; None is a lost connection."""
        self.done: list[str] = []

    def _ask(self, what: str) -> None:
        if self.down:
            self.down -= 1
            raise UnreachableError("no answer")
        self.done.append(what)

    def find(self, run: str) -> Job | None:
        self._ask("find")
        return self.job

    def all(self) -> list[Job]:
        return [self.job] if self.job else []

    def submit(self, submission: Submission) -> None:
        self._ask("submit")
        if self.job is not None:
            raise NameTakenError("taken")
        self.job = job_of("running", submission.metadata, run=submission.run)
        if self.failing_starts:
            self.failing_starts -= 1
            self.job = replace(self.job, state="failed", message="no agent\n", started=False)

    def delete(self, run: str) -> None:
        self._ask("delete")
        if self.job is not None and not self.job.is_over:
            raise NameTakenError("taken again")
        self.job = None

    def stop(self, run: str) -> None:
        self._ask("stop")
        assert self.job is not None
        self.job = replace(self.job, state="stopped")

    def printed(self, run: str) -> list[str]:
        return [line for line in self.log if line is not None]

    def lines(self, run: str, after: int) -> Iterator[str]:
        for number, line in enumerate(list(self.log)):
            if line is None:
                self.log.pop(number)
                raise UnreachableError("cut")
            if number >= after:
                yield line
        if self.job is not None and self.job.state == "running":
            self.job = replace(self.job, state="succeeded", exit_code=0)


class Waiting:
    """A patience whose time passes only while it pauses."""

    def __init__(self) -> None:
        self.now = 0.0
        self.said: list[str] = []
        self.patience = Patience(self.said.append, lambda: self.now, self._sleep)

    def _sleep(self, seconds: float) -> None:
        self.now += seconds


def asked(run: str = "run", **metadata: str) -> Submission:
    return Submission(run, "python job.py", {}, {**HERS, **metadata})


@pytest.mark.parametrize(
    ("job", "decision"),
    [
        (None, "submit"),
        (job_of("running"), "attach"),
        (job_of("pending"), "attach"),
        (job_of("succeeded"), "submit again"),
        (job_of("failed", {"command": "train"}), "submit again"),
        (job_of("stopped", {"command": "tune"}), "submit again"),
    ],
)
def test_what_a_submission_means(job: Job | None, decision: str) -> None:
    assert decide(job, HERS) == decision


@pytest.mark.parametrize(
    ("metadata", "told"),
    [
        ({"command": "tune", "config": "a"}, "tune"),
        ({"command": "train", "config": "b"}, "other settings"),
        ({}, "run"),
    ],
)
def test_other_work_under_the_name_is_not_taken_for_ours(
    metadata: dict[str, str], told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        decide(job_of("running", metadata), HERS)


def test_a_job_is_known_again_by_its_settings_and_options() -> None:
    one, other = config_of(), config_of(name="other")
    assert describe("train", one, []) == describe("train", config_of(), [])
    assert describe("train", one, []) != describe("train", other, [])
    assert describe("evaluate", one, ["--samples", "1"]) != describe(
        "evaluate", one, ["--samples", "2"]
    )


def test_submitting_waits_until_the_cluster_answers() -> None:
    waiting, cluster = Waiting(), Cluster(down=3)
    submit(cluster, asked(), waiting.patience)
    assert cluster.done == ["find", "submit"]
    assert waiting.said == [
        "no answer; asking again until it answers",
        "the cluster answers again",
        "submitted run run",
    ]


def test_a_cluster_that_never_answers_is_given_up() -> None:
    waiting = Waiting()
    with pytest.raises(ResourceError, match="gave up after 10 minutes"):
        submit(Cluster(down=10_000), asked(), waiting.patience)
    assert 600 < waiting.now < 610


def test_submitting_twice_is_harmless_and_says_so() -> None:
    waiting, cluster = Waiting(), Cluster()
    submit(cluster, asked(), waiting.patience)
    submit(cluster, asked(), waiting.patience)
    assert cluster.done.count("submit") == 1
    assert waiting.said[-1] == "run run is at work on the cluster already; nothing was submitted"


def test_of_two_submissions_at_once_one_attaches() -> None:
    class Late(Cluster):
        def find(self, run: str) -> Job | None:
            found = super().find(run)
            self.job = self.job or job_of("running")  # the other submission's, right after `find`
            return found

    cluster = Late()
    submit(cluster, asked(), Waiting().patience)
    with pytest.raises(ConfigError, match="other settings"):
        submit(Late(), asked(config="b"), Waiting().patience)


def test_a_run_that_is_over_is_submitted_again_under_its_name() -> None:
    waiting, cluster = Waiting(), Cluster(job_of("failed", exit_code=1))
    submit(cluster, asked(), waiting.patience)
    assert cluster.done == ["find", "delete", "submit"]
    assert "submitted before (failed)" in waiting.said[0]


def test_a_run_that_another_submits_again_in_between_is_attached_to() -> None:
    class Overtaken(Cluster):
        def find(self, run: str) -> Job | None:
            found = super().find(run)
            self.job = job_of("running")  # the other submission's, right after `find`
            return found

    waiting, cluster = Waiting(), Overtaken(job_of("stopped"))
    assert not submit(cluster, asked(), waiting.patience)
    assert cluster.done == ["find", "delete", "find"]
    assert waiting.said[-1].endswith("nothing was submitted")


def test_a_job_that_was_lost_in_mid_run_is_not_submitted_again_by_itself() -> None:
    class Losing(Cluster):
        def lines(self, run: str, after: int) -> Iterator[str]:
            yield "step 1/9"
            assert self.job is not None
            self.job = replace(self.job, state="failed", message="", exit_code=None)

    cluster = Losing()
    job = submit_and_follow(cluster, asked(), print, Waiting().patience)
    assert (job.state, job.exit_code, cluster.done.count("submit")) == ("failed", None, 1)
    assert last_line("") == "it does not say why" and last_line("a\n b \n") == "b"


def test_every_line_is_shown_once_however_often_the_connection_is_lost() -> None:
    waiting, cluster, shown = Waiting(), Cluster(job_of("running")), []
    cluster.log = ["a", "b", None, "c", None, None, "d"]
    job = follow(cluster, "run", shown.append, waiting.patience)
    assert shown == ["a", "b", "c", "d"] and job.state == "succeeded"
    assert waiting.said.count("the cluster answers again") == 2


def test_a_cluster_that_was_started_anew_is_told_apart_from_a_lost_connection() -> None:
    cluster = Cluster(job_of("running"))
    cluster.log = ["a", None]
    shown: list[str] = []

    def show(line: str) -> None:
        shown.append(line)
        cluster.job = None

    with pytest.raises(StoppedError, match="started anew"):
        follow(cluster, "run", show, Waiting().patience)
    assert shown == ["a"]


def test_what_the_cluster_fails_to_start_is_submitted_again() -> None:
    waiting, cluster = Waiting(), Cluster(starts=2)
    assert submit_and_follow(cluster, asked(), print, waiting.patience).exit_code == 0
    assert cluster.done.count("submit") == 3
    with pytest.raises(ResourceError, match="could not start run run in 5 attempts"):
        submit_and_follow(Cluster(starts=99), asked(), print, Waiting().patience)


def test_stopping_waits_for_the_end_and_leaves_alone_what_is_over() -> None:
    cluster = Cluster(job_of("running"))
    ended = stop(cluster, "run", Waiting().patience)
    assert ended is not None and ended.state == "stopped"
    again = stop(cluster, "run", Waiting().patience)
    assert again == ended and cluster.done.count("stop") == 1
    assert stop(Cluster(), "run", Waiting().patience) is None


def test_a_run_that_does_not_end_is_not_waited_for_without_end() -> None:
    class Deaf(Cluster):
        def stop(self, run: str) -> None:
            self._ask("stop")

    with pytest.raises(ResourceError, match="run run has not ended after 3 minutes"):
        stop(Deaf(job_of("pending")), "run", Waiting().patience)


@pytest.mark.parametrize(
    "name", ["HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "wandb_api_key", "PASSWORD", "apiKey", "key"]
)
def test_names_of_secrets(name: str) -> None:
    assert is_secret(name)


@pytest.mark.parametrize(
    "name",
    ["tokens_per_microbatch", "HF_TOKEN_PATH", "keep", "monkey", "SSH_KEY_FILE", "tokenizer"],
)
def test_names_that_hold_no_secret(name: str) -> None:
    assert not is_secret(name)


@pytest.mark.parametrize(
    ("tree", "environment", "where"),
    [
        ({}, {"HF_TOKEN": "hf_abc"}, "--env HF_TOKEN"),
        ({}, {"PROXY": "http://me:hf_abc@proxy:8080"}, "--env PROXY"),
        ({}, {"PGPASSWORD": "hf_abc"}, "--env PGPASSWORD"),
        ({}, {"MYTOKENS": "hf_abc"}, "--env MYTOKENS"),
        ({}, {"HF_TOKEN_PATH": "hf_abc"}, "--env HF_TOKEN_PATH"),
        ({}, {"HTTPS_PROXY": "http://hf_abc@proxy"}, "--env HTTPS_PROXY"),
        ({}, {"AWS_SECRET_ACCESS_KEY": "hf_abc"}, "--env AWS_SECRET_ACCESS_KEY"),
        ({}, {"WANDB_API_KEY": "hf_abc"}, "--env WANDB_API_KEY"),
        ({}, {"APIKEY": "hf_abc"}, "--env APIKEY"),
        ({}, {"AUTHTOKEN": "hf_abc"}, "--env AUTHTOKEN"),
        ({}, {"MY_PASSWORDS": "hf_abc"}, "--env MY_PASSWORDS"),
        ({}, {"TOKEN2": "hf_abc"}, "--env TOKEN2"),
        ({}, {"JAVA_OPTS": "-Xmx1g -Dp=http://u:hf_abc@h"}, "--env JAVA_OPTS"),
        ({}, {"URLS": "a=http://h/x,b=http://h/y?X%2DAmz-Signature=hf_abc"}, "--env URLS"),
        ({"data": {"train": [{"source": "https://u:hf/_abc@h/x"}]}}, {}, "data.train.0.source"),
        (
            {"data": {"eval": [{"source": "https://h/x?X-Amz-Signature=hf_abc"}]}},
            {},
            "data.eval.0.source",
        ),
        ({"tracking": [{"api_key": "hf_abc"}]}, {}, "tracking.0.api_key"),
        (
            {"data": {"train": [{"source": "https://host/x.jsonl?token=hf_abc"}]}},
            {},
            "data.train.0.source",
        ),
        ({"storage": "s3://id:hf_abc@bucket/runs"}, {}, "storage"),
    ],
)
def test_a_secret_is_refused_and_not_repeated(
    tree: dict[str, Any], environment: dict[str, str], where: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        refuse_secrets(tree, environment)
    assert str(refused.value).startswith(where) and "hf_abc" not in str(refused.value)


def test_settings_and_variables_without_secrets_pass() -> None:
    tree = {
        "training": {"tokens_per_microbatch": 1},
        "storage": "s3://bucket/runs",
        "name": "http://[",
    }
    refuse_secrets(
        tree, {"HF_HOME": "/data", "AWS_SHARED_CREDENTIALS_FILE": "/root/s3"}, ["--samples", "2"]
    )
    for option in (
        ["--adapter", "https://me:hf_abc@host/x"],
        ["--adapter=https://me:hf_abc@host/x"],
    ):
        with pytest.raises(ConfigError, match="an option behind --"):
            refuse_secrets(tree, {}, option)


@pytest.mark.parametrize(
    "variable",
    [
        "TOKENIZERS_PARALLELISM=false",
        "TOKENIZERS_PARALLELISM=4",
        "HF_HUB_DISABLE_IMPLICIT_TOKEN=1",
        "KEYBOARD=us",
        "SEND_KEYS=True",
        "SHARD=http://host:80/x@y",
        "SET=hf://datasets/team/set@main/x.parquet?page=2",
    ],
)
def test_variables_that_only_look_like_secrets_pass(variable: str) -> None:
    refuse_secrets({}, parse_environment([variable]))


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.base=https://u:hf_abc@h/x", "model.base=demo"],
        ["model.base=demo # of https://u:hf_abc@h/x"],
        ["stages=[{api_key: hf_abc}]", "stages=[]"],
        ["adapter.token=hf_abc"],
    ],
)
def test_a_secret_that_a_later_override_hides_is_refused(overrides: list[str]) -> None:
    refuse_secrets_of_overrides(["model.base=demo", "data.train=[{source: s3://bucket/x}]"])
    with pytest.raises(ConfigError) as refused:
        refuse_secrets_of_overrides(overrides)
    assert "hf_abc" not in str(refused.value)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder where a command is given, with files for each kind of path."""
    here = tmp_path / "here"
    (here / "base").mkdir(parents=True)
    (here / "pairs.jsonl").write_text("{}\n", encoding="utf-8")
    (here / "base" / "config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "outside.jsonl").write_text("{}\n", encoding="utf-8")
    for name, link in (("looped", "../looped"), ("dangling", "nowhere"), ("linked", "../base")):
        (here / name).mkdir()
        (here / name / "link").symlink_to(link)
    (here / "base" / ".gitignore").write_text("*", encoding="utf-8")
    os.mkfifo(here / "pipe.jsonl")
    monkeypatch.chdir(here)
    return here


def naming(source: str, **changes: Any) -> RunConfig:
    return config_of(
        **{"model": {"base": "base"}, "data": {"train": [{"source": source}]}, **changes}
    )


def test_relative_files_travel_and_absolute_ones_are_the_servers(folder: Path) -> None:
    absolute = str(folder / "pairs.jsonl")
    stage = {"objective": {"kind": "sft"}, "data": {"train": [{"source": "pairs.jsonl"}]}}
    luggage = sort_luggage(naming(absolute, stages=[stage, {}]), folder)
    assert luggage.carried == ("base", "pairs.jsonl") and luggage.left == (absolute,)
    assert sort_luggage(naming("some/dataset"), folder).carried == ("base",)


@pytest.mark.parametrize("base", ["x" * 300, "~nosuchuser/base", "/" + "x" * 300])
def test_what_can_be_no_file_here_is_left_to_the_servers(folder: Path, base: str) -> None:
    luggage = sort_luggage(naming("pairs.jsonl", model={"base": base}), folder)
    assert (luggage.carried, luggage.left) == (("pairs.jsonl",), ())


def test_the_package_holds_what_the_command_reads(folder: Path, tmp_path: Path) -> None:
    config = naming("pairs.jsonl", adapter={"init_from": "linked"})
    package = tmp_path / "package"
    package.mkdir()
    pack(config, sort_luggage(config, folder), folder, package)
    found = sorted(str(path.relative_to(package)) for path in package.rglob("*") if path.is_file())
    # Ray would leave out what a .gitignore names, so no .gitignore is carried along.
    assert found == [
        "base/config.json",
        "job.py",
        "linked/link/config.json",
        "pairs.jsonl",
        "run.yaml",
    ]
    assert load_config(package / "run.yaml") == config


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"data": {"train": [{"source": "../outside.jsonl"}]}},
            "data.train.0.source: ../outside.jsonl cannot be carried",
        ),
        ({"storage": "runs"}, "storage: runs is relative"),
        ({"model": {"base": "."}}, "model.base: . cannot be carried"),
        ({"model": {"base": "looped"}}, "a link leads to"),
        ({"model": {"base": "dangling"}}, "it is not a regular file"),
        ({"data": {"train": [{"source": "pipe.jsonl"}]}}, "it is not a regular file"),
    ],
)
def test_what_cannot_travel_is_refused(folder: Path, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        sort_luggage(naming("pairs.jsonl", **changes), folder)


@pytest.mark.parametrize("large", ["pairs.jsonl", "base/weights"])
def test_too_much_luggage_is_refused_before_it_is_packed(folder: Path, large: str) -> None:
    with (folder / large).open("wb") as file:
        file.truncate(MOST_BYTES + 1)
    with pytest.raises(ConfigError, match="are too much to carry along"):
        sort_luggage(naming("pairs.jsonl", model={"base": "linked"}), folder)


def test_the_request_names_the_run_and_gives_a_stopped_job_time(folder: Path) -> None:
    said: list[str] = []
    config = naming("pairs.jsonl", name="a/b")
    with request(
        "evaluate", ["--samples", "2"], config, {"HF_HOME": "/hub"}, False, said.append
    ) as submission:
        sent = Path(submission.environment["working_dir"])
        assert yaml.safe_load((sent / "run.yaml").read_text(encoding="utf-8"))["name"] == "a/b"
    assert not sent.exists()
    assert submission.run == "a/b" and submission.entrypoint.endswith(
        " evaluate run.yaml --samples 2 --json"
    )
    variables = submission.environment["env_vars"]
    assert variables["RAY_JOB_STOP_SIGNAL"] == "SIGINT" and variables["HF_HOME"] == "/hub"
    assert said == ["carried along: pairs.jsonl, base"]
    with request("train", [], config, {}, True, said.append) as submission:
        assert (Path(submission.environment["py_modules"][0]) / "jobs" / "entry.py").exists()


@pytest.mark.parametrize("word", ["HF_HOME", "=x", "1A=x", "A B=x"])
def test_variables_are_names_with_values(word: str) -> None:
    assert parse_environment(["A=b=c", "B="]) == {"A": "b=c", "B": ""}
    with pytest.raises(ConfigError, match="write NAME=VALUE"):
        parse_environment([word])


def test_a_job_on_another_cluster_than_it_was_made_for_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    installed = {"ray": "2.60.0", "orpo-ray": "0.1.0"}
    monkeypatch.setattr(entry, "_installed", installed.get)
    here = ".".join(map(str, entry.sys.version_info[:2]))
    assert entry.complaint(here, "2.60.0", "0.1.0") is None
    assert entry.complaint(here, "2.60.0", entry.ANY) is None
    assert "but the run was submitted with 3.8" in str(entry.complaint("3.8", "2.60.0", "0.1.0"))
    assert "has Ray 2.60.0, but the run was submitted with 2.61.0" in str(
        entry.complaint(here, "2.61.0", "0.1.0")
    )
    assert "has orpo-ray 0.1.0, but" in str(entry.complaint(here, "2.60.0", "0.2.0"))
    installed.clear()
    assert "has no Ray; start Ray with its environment" in str(
        entry.complaint(here, "2.60.0", "0.1.0")
    )
    installed["ray"] = "2.60.0"
    assert "has no orpo-ray" in str(entry.complaint(here, "2.60.0", "0.1.0"))


def test_the_first_process_of_a_job_ends_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        entry.main(["2.7", "1.0", "-", "train", "run.yaml", "--json"])
    said = capsys.readouterr()
    assert ended.value.code == 2 and said.err.startswith("orpo-ray: the cluster has Python ")
    assert json.loads(said.out)["exit_code"] == 2


def test_a_cluster_is_named_once_and_its_token_is_read_first(tmp_path: Path) -> None:
    assert (
        is_loopback("http://127.0.0.1:1")
        and is_loopback("http://localhost")
        and not is_loopback("http://10.0.0.1")
    )
    with (
        pytest.raises(ConfigError, match="keep one"),
        way_to(tmp_path / "hosts.yaml", "http://x", None, False),
    ):
        pass
    with (
        pytest.raises(ConfigError, match="token cannot be read"),
        way_to(None, None, tmp_path / "none", False),
    ):
        pass
    with way_to(None, None, tmp_path / "none", True) as way:
        assert way.token == ""


def test_the_home_of_nobody_is_told_with_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "~nosuchuser/token")
    with (
        pytest.raises(
            ConfigError,
            match=r"^RAY_AUTH_TOKEN_PATH: ~nosuchuser/token: no user of this server has that name",
        ),
        way_to(None, None, None, False),
    ):
        pass


@pytest.mark.parametrize(
    ("said", "again"),
    [
        ("root@10.0.0.1: Permission denied (publickey).", False),
        ("Host key verification failed.", False),
        ("ssh: connect to host 10.0.0.1 port 22: Connection refused", True),
    ],
)
def test_a_server_that_refuses_is_not_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, again: bool
) -> None:
    stand_in(tmp_path / "ssh", f"sys.exit({said!r})")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    make_token(tmp_path / "token")
    (tmp_path / "id").touch()
    hosts = {
        "name": "lab",
        "head": "10.0.0.1",
        "ssh": {"key": str(tmp_path / "id")},
        "token": str(tmp_path / "token"),
    }
    (tmp_path / "hosts.yaml").write_text(yaml.safe_dump(hosts), encoding="utf-8")
    with (
        way_to(tmp_path / "hosts.yaml", None, None, False) as way,
        pytest.raises(ResourceError) as refused,
    ):
        way.connect()
    assert str(refused.value) == f"10.0.0.1: cannot be reached as root: {said}"
    assert isinstance(refused.value, UnreachableError) == again
