"""Runs whose storage is a bucket: the same bytes as in a folder, and any server can resume them.

Only the bucket survives what happens here: processes are killed, and local copies are deleted, too
old or changed.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from signal import SIGKILL
from typing import Any

import pytest
import yaml
from killed_runs import Job, KilledRuns
from reported import comparable
from s3_server import Server, serve
from support import ENVIRONMENT, Done, Listener, settings
from two_servers import train_and_lose_one

from orpo_ray import api
from orpo_ray.cli import config_file
from orpo_ray.config import RunConfig, load_config
from orpo_ray.runs.console import SILENT
from orpo_ray.runs.named import named_config
from orpo_ray.runs.search_run import find_search

pytestmark = [pytest.mark.slow, pytest.mark.ray]

STEPS, CHECKPOINT_EVERY, KILLED_AT = 10, 2, 7
URL = "s3://bucket/runs"
ADAPTER, STATE = (
    "adapter/adapter_model.safetensors",
    f"checkpoints/step-{STEPS:06d}/state.safetensors",
)


@dataclass(frozen=True)
class Site:
    """A bucket, and servers by name.

    Each server has its own folder for copies. They share only the bucket.
    """

    server: Server
    folder: Path
    orpo_ray: Callable[..., Done]

    def environment(self, server: str = "first") -> dict[str, str]:
        """The environment of a process on one of the servers."""
        return {**self.server.environment, "XDG_CACHE_HOME": str(self.cache(server))}

    def cache(self, server: str) -> Path:
        return self.folder / server

    @contextmanager
    def on(self, server: str) -> Iterator[None]:
        """Have this process be on one of the servers."""
        with pytest.MonkeyPatch.context() as patch:
            for name, value in self.environment(server).items():
                patch.setenv(name, value)
            yield

    def shell(self, *arguments: object) -> Done:
        """Run a command in its own process on the first server."""
        done = self.orpo_ray(*arguments, environment={**ENVIRONMENT, **self.environment()})
        assert done.code == 0, done.err
        return done

    def kept(self, name: str) -> dict[str, bytes]:
        """Files of a run in the bucket."""
        return self.server.bucket.under(f"runs/{name}/")


@pytest.fixture(scope="module")
def site(shell: Callable[..., Done], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """An empty bucket, and servers without copies."""
    with serve() as server:
        yield Site(server, tmp_path_factory.mktemp("servers"), shell)


def write_config(
    folder: Path, storage: str, name: str, stages: Sequence[Any] = (), **sections: Any
) -> Path:
    """A run's YAML, with dropout."""
    training = {"checkpoint_every": CHECKPOINT_EVERY, "keep": 2, "eval_every": 5}
    common = {"adapter": {"dropout": 0.05}, "training": training}
    path = folder / f"{name}.yaml"
    tree = {
        **settings(folder, name, **{**common, **sections}),
        "storage": storage,
        "stages": list(stages),
    }
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def unbroken(prepared_storage: Path) -> Path:
    """The folder of a run whose storage is a folder, and that was not interrupted."""
    config = load_config(write_config(prepared_storage, str(prepared_storage), "bucketless"))
    api.train(config, SILENT)
    return config.run_dir


def same_numbers(lines: bytes, expected: Path, folder: Path) -> bool:
    (folder / "metrics.jsonl").write_bytes(lines)
    return comparable(folder) == comparable(expected)


# --- one run --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trained:
    """The result that the real command printed for a run; it also prepared the pairs."""

    config: Path
    result: dict[str, Any]
    said: str


@pytest.fixture(scope="module")
def trained(site: Site) -> Trained:
    config = write_config(site.folder, URL, "trained")
    done = site.shell("train", config, "--json")
    return Trained(config, done.result, done.err)


def test_a_run_leaves_in_the_bucket_what_it_leaves_in_a_folder(
    site: Site, trained: Trained, unbroken: Path, tmp_path: Path
) -> None:
    kept = site.kept("trained")
    for file in (ADAPTER, STATE):
        assert kept[file] == (unbroken / file).read_bytes(), file
    assert same_numbers(kept["metrics.jsonl"], unbroken, tmp_path)
    assert kept["samples.jsonl"] == (unbroken / "samples.jsonl").read_bytes()
    expected = {
        path.relative_to(unbroken).as_posix() for path in unbroken.rglob("*") if path.is_file()
    }
    expected = {name for name in expected if not name.startswith((".", "tensorboard/"))}
    assert {name for name in kept if not name.startswith("tensorboard/")} == expected | {
        "run.log",
        "report.html",
    }
    assert sum(name.startswith("tensorboard/") for name in kept) == 1
    assert b"36 training pairs" in kept["run.log"]


def test_the_result_names_the_adapter_and_the_page_by_their_urls(
    site: Site, trained: Trained
) -> None:
    assert trained.result["adapter"] == "s3://bucket/runs/trained/adapter"
    assert trained.result["report"] == "s3://bucket/runs/trained/report.html"
    assert json.loads(site.kept("trained")["result.json"]) == trained.result


def test_another_server_sees_that_the_run_is_finished_and_evaluates_it(
    site: Site, trained: Trained
) -> None:
    before = site.kept("trained")
    config = load_config(trained.config)
    with site.on("second"):
        said: list[str] = []
        assert api.train(config, Listener(said)).to_json() == trained.result
        assert said == [
            "run trained is finished: s3://bucket/runs/trained; give another name to train again, "
            "or more steps with --extend"
        ]
        evaluation = api.evaluate(config, console=Listener(said))
        by_url = api.evaluate(config, adapter=trained.result["adapter"], console=SILENT)
    assert evaluation.adapter == trained.result["adapter"]
    accuracy = evaluation.metrics["trained"]["all"]["accuracy"]
    assert accuracy == pytest.approx(trained.result["metrics"]["eval/accuracy"])
    assert by_url.metrics == evaluation.metrics
    after = site.kept("trained")
    assert json.loads(after.pop("evaluation.json")) == by_url.to_json()
    assert after == before


def test_a_run_is_named_by_its_url_on_a_server_that_has_nothing_of_it(
    site: Site, trained: Trained, tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("What sound does a cow make?\n", encoding="utf-8")
    with site.on("ninth"):
        named = named_config("s3://bucket/runs/trained/")
        exported = api.export(named, tmp_path / "out", answers=1, console=SILENT)
        written = api.generate(
            named, tmp_path / "prompts.txt", tmp_path / "a.jsonl", max_new_tokens=8, console=SILENT
        )
    assert exported.merge_error <= exported.tolerance
    assert written.answers == 1 and (tmp_path / "out" / "model.safetensors").is_file()


def test_pairs_that_one_server_prepared_are_found_by_another(site: Site, trained: Trained) -> None:
    assert "prepared data found" not in trained.said
    config, said = load_config(trained.config), []
    kept = site.server.bucket.under("runs/artifacts/")
    with site.on("eighth"):
        found = api.prepare(config, Listener(said))
    assert {f"{found.path.name}/{path.name}" for path in found.path.iterdir()} == kept.keys()
    assert f"prepared data found in s3://bucket/runs/artifacts/{found.path.name}" in said


# --- a server that dies ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def killed(site: Site, trained: Trained, killed_runs: KilledRuns) -> dict[str, bytes]:
    """What a run that was killed in a step has stored in the bucket.

    The copy on its server stays as it was.
    """
    config = write_config(site.folder, URL, "killed")
    job = Job(str(config), "report", KILLED_AT, site.environment("first"))
    assert killed_runs.run(job) == -SIGKILL
    return site.kept("killed")


@pytest.fixture
def killed_again(site: Site, killed: dict[str, bytes]) -> RunConfig:
    """A second copy of the same state."""
    for name in site.kept("killed"):
        del site.server.bucket.objects[f"runs/killed/{name}"]
    for name, content in killed.items():
        site.server.bucket.put(f"runs/killed/{name}", content)
    return load_config(site.folder / "killed.yaml")


def go_on(site: Site, config: RunConfig, server: str, unbroken: Path) -> list[str]:
    """Train to the end on a server, with the same bytes as the unbroken run.

    Returns the lines that were announced.
    """
    said: list[str] = []
    with site.on(server):
        api.train(config, Listener(said)).to_json()
    for file in (ADAPTER, STATE):
        assert site.kept("killed")[file] == (unbroken / file).read_bytes(), file
    return said


def test_what_was_saved_is_in_the_bucket_with_the_metrics_that_led_to_it(
    killed: dict[str, bytes],
) -> None:
    manifests = sorted(name for name in killed if name.endswith("MANIFEST.json"))
    assert manifests == [f"checkpoints/step-{step:06d}/MANIFEST.json" for step in (4, 6)]
    assert not [name for name in killed if "step-000002" in name]
    steps = [json.loads(line)["step"] for line in killed["metrics.jsonl"].splitlines()]
    assert steps[-1] == 6


def test_another_server_resumes_with_the_same_bytes(
    site: Site, killed_again: RunConfig, unbroken: Path, tmp_path: Path
) -> None:
    said = go_on(site, killed_again, "third", unbroken)
    assert f"resuming at step 6 of {STEPS}" in said
    assert same_numbers(site.kept("killed")["metrics.jsonl"], unbroken, tmp_path)
    assert site.kept("killed")["samples.jsonl"] == (unbroken / "samples.jsonl").read_bytes()
    steps = {name.split("/")[1] for name in site.kept("killed") if name.startswith("checkpoints/")}
    assert steps == {"step-000008", "step-000010"}


def test_a_checkpoint_whose_upload_was_cut_is_passed_over(
    site: Site, killed_again: RunConfig, unbroken: Path
) -> None:
    """Even the server that wrote it, and has a whole copy, does not use it."""
    cut = "runs/killed/checkpoints/step-000006/"
    del (
        site.server.bucket.objects[f"{cut}MANIFEST.json"],
        site.server.bucket.objects[f"{cut}state.safetensors"],
    )
    assert site.cache("first").joinpath("orpo-ray/s3/bucket", cut, "MANIFEST.json").exists()
    said = go_on(site, killed_again, "first", unbroken)
    assert f"resuming at step 4 of {STEPS}" in said
    assert not [line for line in said if "damaged" in line]


def test_a_damaged_checkpoint_is_announced_and_passed_over(
    site: Site, killed_again: RunConfig, unbroken: Path
) -> None:
    key = "runs/killed/checkpoints/step-000006/state.safetensors"
    site.server.bucket.put(key, site.server.bucket.objects[key][::-1])
    said = go_on(site, killed_again, "fourth", unbroken)
    assert any(
        line.startswith("checkpoint step-000006 is damaged (state.safetensors") for line in said
    )
    assert f"resuming at step 4 of {STEPS}" in said


def test_a_stale_and_tampered_copy_does_not_win(
    site: Site, killed_again: RunConfig, unbroken: Path
) -> None:
    with site.on("stale"):
        run_dir = killed_again.run_dir
    checkpoints = run_dir / "checkpoints"
    shutil.copytree(unbroken, run_dir)  # finished, by what lies here
    shutil.copytree(checkpoints / "step-000008", checkpoints / "step-000006")
    for file in (
        run_dir / "adapter" / "adapter_model.safetensors",
        checkpoints / "step-000010" / "state.safetensors",
    ):
        file.write_bytes(file.read_bytes()[::-1])
    said = go_on(site, killed_again, "stale", unbroken)
    assert f"resuming at step 6 of {STEPS}" in said


# --- several servers ------------------------------------------------------------------------------


@pytest.mark.long
def test_two_servers_without_a_common_disk_train_one_run_and_one_of_them_dies(
    site: Site, trained: Trained
) -> None:
    """Two raylets with their own copies; the run resumes on the one left, from the bucket."""
    scale = {"workers": "auto", "gpus_per_worker": 0}
    training = {"max_steps": 15, "checkpoint_every": 5, "eval_every": 15}
    config = write_config(
        site.folder, URL, "servers", adapter={"dropout": 0.0}, training=training, scale=scale
    )
    environment = {**ENVIRONMENT, **site.environment("driver")}
    printed = train_and_lose_one(config, 5, site.cache("other-server"), environment=environment)
    assert any(
        "lost" in line and "resuming from the last checkpoint" in line for line in printed["said"]
    )
    (resumed,) = (line for line in printed["said"] if line.startswith("resuming at step"))
    assert int(resumed.split()[3]) >= 5
    assert printed["result"]["adapter"] == "s3://bucket/runs/servers/adapter"
    assert (site.cache("other-server") / "orpo-ray/s3/bucket/runs/artifacts").is_dir()
    steps = [json.loads(line) for line in site.kept("servers")["metrics.jsonl"].splitlines()]
    assert [line["step"] for line in steps if "train/loss" in line] == list(range(1, 16))


# --- a search -------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_search_is_shown_and_its_best_run_used_on_another_server(
    site: Site, trained: Trained
) -> None:
    search = {
        "space": {"objective.lambda": {"grid": [0.1, 0.5]}},
        "searcher": "grid",
        "scheduler": "none",
    }
    scale = {"workers": 1, "gpus_per_worker": 0}
    training = {"max_steps": 4, "eval_every": 2, "checkpoint_every": 4}
    config = write_config(
        site.folder, URL, "searched", search=search, scale=scale, training=training
    )
    printed = site.shell("tune", config, "--json").result
    assert [trial["state"] for trial in printed["trials"]] == ["finished", "finished"]
    outcome = printed["outcome"]
    assert outcome["config"] == "s3://bucket/runs/searched/search/best.yaml"
    assert (
        outcome["adapter"]
        == f"s3://bucket/runs/searched/search/trials/{outcome['best']:03d}/adapter"
    )
    assert len(outcome["answers"]) == 4
    logs = [site.kept("searched")[f"search/trials/{number:03d}/run.log"] for number in range(2)]
    assert all(b"starting 1 worker under Ray Train" in log for log in logs)
    with site.on("fifth"):
        assert find_search(f"{URL}/searched").to_json() == printed
        assert config_file.load(outcome["config"], []).name == "searched-best"
        found = api.evaluate(load_config(config), adapter=outcome["adapter"], console=SILENT)
    assert found.metrics["trained"]["all"]["accuracy"] == pytest.approx(
        outcome["metrics"]["eval/accuracy"]
    )


def test_a_later_stage_starts_from_the_adapter_of_the_one_before_wherever_it_runs(
    site: Site, trained: Trained
) -> None:
    stages = [{"objective": {"kind": "sft"}}, {"objective": {"kind": "dpo"}}]
    short = {"max_steps": 2, "eval_every": 2, "checkpoint_every": 2}
    config = load_config(write_config(site.folder, URL, "staged", training=short, stages=stages))

    class Stopping(Listener):
        def watch(self, step: int, total_steps: int, metrics: dict[str, float]) -> None:
            if step == 1 and any(line.startswith("stage 2") for line in self.said):
                raise KeyboardInterrupt

    with site.on("first"), pytest.raises(KeyboardInterrupt):
        api.train(config, Stopping())
    said: list[str] = []
    with site.on("seventh"):
        result = api.train(config, Listener(said)).to_json()
    assert "stage 1 of 2: sft, in s3://bucket/runs/staged/1-sft, finished already" in said
    assert any(line.startswith("reference log-probs: reused") for line in said)
    assert result["adapter"] == "s3://bucket/runs/staged/adapter"
    kept = site.kept("staged")
    assert kept[ADAPTER] == kept[f"2-dpo/{ADAPTER}"] != kept[f"1-sft/{ADAPTER}"]
    stored = json.loads(kept["2-dpo/config.json"])
    assert stored["adapter"]["init_from"] == "s3://bucket/runs/staged/1-sft"
