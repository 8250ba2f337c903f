"""A run's records: it does not resume with other settings, and lets no second process in."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import BASE, HOLD, locked_elsewhere, make_artifact, run_config, settings, train_locally

from orpo_ray.config import RunConfig, build, dump
from orpo_ray.data.store import Artifact
from orpo_ray.errors import ConfigError
from orpo_ray.models.hardware import CPU
from orpo_ray.runs import files
from orpo_ray.runs.console import SILENT
from orpo_ray.runs.metrics import last_metrics, metric_by_step
from orpo_ray.runs.run import Run
from orpo_ray.training.reporter import LocalReporter
from orpo_ray.training.setup import settle

# --- changed settings -----------------------------------------------------------------------------


def start_run(config: RunConfig) -> None:
    """Leave what a run leaves that has saved a checkpoint."""
    (config.run_dir / "checkpoints" / "step-000002").mkdir(parents=True)
    Run(config).write_config()


def changed(storage: Path, change: Callable[[dict[str, Any]], object]) -> RunConfig:
    tree = settings(storage)
    change(tree)
    return build(RunConfig, tree, {(): "tests"})


REFUSED: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "training.learning_rate": (
        lambda t: t["training"].update(learning_rate=2e-3),
        "0.002 here, but run run was",
    ),
    "training.seed": (
        lambda t: t["training"].update(seed=1),
        "1 here, but run run was made with 42",
    ),
    "training.pairs_per_step": (lambda t: t["training"].update(pairs_per_step=4), "4 here"),
    "training.optimizer": (
        lambda t: t["training"].update(optimizer="adamw-8bit"),
        "'adamw-8bit' here",
    ),
    "objective.lambda": (lambda t: t.update(objective={"kind": "orpo", "lambda": 0.2}), "0.2 here"),
    "objective.kind": (
        lambda t: t.update(objective={"kind": "cpo"}),
        "'cpo' here, but run run was made with 'orpo' (and 4 more: objective.alpha",
    ),
    "objective.beta": (
        lambda t: t.update(objective={"kind": "orpo", "beta": 2.0, "lambda": 0.1}),
        "2.0 here, but run run was made with 1.0",
    ),
    "model.quantization": (lambda t: t["model"].update(quantization="none"), "'none' here"),
    "adapter.r": (lambda t: t["adapter"].update(r=16), "16 here, but run run was made with 8"),
    "adapter.targets": (lambda t: t["adapter"].update(targets=["q_proj"]), "['q_proj'] here"),
    "data.train.0.limit": (lambda t: t["data"]["train"][0].update(limit=3), "3 here"),
    "data.train.1.source": (
        lambda t: t["data"]["train"].append({"source": "x.jsonl"}),
        "'x.jsonl' here",
    ),
    "data.eval": (lambda t: t["data"].update(eval=[]), "[] here"),
    "data.max_length": (lambda t: t["data"].update(max_length=64), "64 here"),
}
FREE: dict[str, Callable[[dict[str, Any]], object]] = {
    "scale.workers": lambda t: t.update(scale={"workers": 3}),
    "scale.deepspeed": lambda t: t.update(scale={"deepspeed": {"stage": 3}}),
    "scale.max_failures": lambda t: t.update(scale={"max_failures": 9}),
    "training.tokens_per_microbatch": lambda t: t["training"].update(tokens_per_microbatch="auto"),
    "training.trackers": lambda t: t["training"].update(trackers=["wandb"]),
    "training.eval_every": lambda t: t["training"].update(eval_every=2),
    "training.samples": lambda t: t["training"].update(samples=0),
    "training.checkpoint_every": lambda t: t["training"].update(checkpoint_every=2),
    "training.keep": lambda t: t["training"].update(keep=5),
    "training.adapter_from": lambda t: t["training"].update(adapter_from="best"),
    "training.trl_metric_names": lambda t: t["training"].update(trl_metric_names=True),
    "search": lambda t: t.update(search={"trials": 3}),
}


@pytest.mark.parametrize("key", REFUSED)
def test_a_changed_setting_is_refused_by_its_key(key: str, tmp_path: Path) -> None:
    config = run_config(tmp_path)
    start_run(config)
    change, complaint = REFUSED[key]
    with pytest.raises(ConfigError) as caught:
        Run(changed(tmp_path, change)).refuse_changes()
    line = str(caught.value)
    assert key in line.split(";")[0]
    assert complaint in line
    assert line.endswith("give the new run another name, or restore the setting")


def test_the_first_changed_key_is_named_with_the_number_of_others(tmp_path: Path) -> None:
    config = run_config(tmp_path)
    start_run(config)
    several = changed(
        tmp_path,
        lambda t: (t["adapter"].update(r=16), t["training"].update(seed=1, weight_decay=0.1)),
    )
    others = r"\(and 2 more: training\.seed, training\.weight_decay\); "
    with pytest.raises(ConfigError, match=r"^adapter\.r: 16 .* " + others):
        Run(several).refuse_changes()


@pytest.mark.parametrize("key", FREE)
def test_where_and_how_work_is_done_may_change(key: str, tmp_path: Path) -> None:
    config = run_config(tmp_path)
    start_run(config)
    other = changed(tmp_path, FREE[key])
    assert dump(other) != dump(config)
    Run(other).refuse_changes()


def test_a_setting_that_an_older_version_did_not_know_has_its_default(tmp_path: Path) -> None:
    config = run_config(tmp_path, objective={"kind": "dpo"})
    start_run(config)
    stored = dump(config)
    del stored["objective"]["loss"], stored["training"]["keep"]
    files.write_json(config.run_dir / files.CONFIG_FILE, stored)
    Run(config).refuse_changes()
    with pytest.raises(
        ConfigError, match=r"^objective\.loss: 'hinge' here, but run run was made with 'sigmoid'"
    ):
        Run(run_config(tmp_path, objective={"kind": "dpo", "loss": "hinge"})).refuse_changes()


def test_a_result_of_another_version_is_read(tmp_path: Path) -> None:
    run = Run(run_config(tmp_path))
    run.folder.mkdir()
    written = {
        "status": "finished",
        "name": "run",
        "steps": 1,
        "adapter": "elsewhere",
        "metrics": {},
        "pairs_per_second": 1.0,
        "workers": [1],
        "strategy": "ddp",
        "layout": "packed",
        "versions": {},
        "what_comes_later": 1,
    }
    files.write_json(run.path(files.RESULT_FILE), written)
    result = run.result()
    assert result is not None and (result.workers, result.adapter) == (
        (1,),
        str(run.folder / "adapter"),
    )
    del written["layout"]
    files.write_json(run.path(files.RESULT_FILE), written)
    older = run.result()
    assert older is not None and older.layout is None
    for key, value in (("steps", None), ("stages", ["a"])):
        damaged = (
            {**written, key: value} if value else {k: v for k, v in written.items() if k != key}
        )
        files.write_json(run.path(files.RESULT_FILE), damaged)
        with pytest.raises(ConfigError, match=r"result\.json: not as this version writes it"):
            run.result()


@pytest.mark.parametrize(
    "change",
    [
        lambda stored: stored["scale"].update(gone=1),
        lambda stored: stored["scale"].update(cpus_per_worker=1.00001),
        lambda stored: stored.update(search={"space": {"training.layout": {"choice": ["padded"]}}}),
    ],
)
def test_what_may_change_may_hold_what_this_version_refuses(
    change: Callable[[dict[str, Any]], object], tmp_path: Path
) -> None:
    config = run_config(tmp_path, objective={"kind": "dpo"})
    start_run(config)
    stored = dump(config)
    del stored["objective"]["loss"]
    change(stored)
    files.write_json(config.run_dir / files.CONFIG_FILE, stored)
    Run(config).refuse_changes()


@pytest.mark.parametrize("section", ["training", "objective"])
def test_a_setting_that_this_version_does_not_know_is_named(section: str, tmp_path: Path) -> None:
    config = run_config(tmp_path, objective={"kind": "dpo"})
    start_run(config)
    stored = dump(config)
    del stored["objective"]["loss"]
    stored[section]["gone"] = 3
    files.write_json(config.run_dir / files.CONFIG_FILE, stored)
    with pytest.raises(
        ConfigError, match=rf"^{section}\.gone: nothing here, but run run was made with 3; "
    ):
        Run(config).refuse_changes()


@pytest.mark.parametrize(
    ("in_stages", "finished", "advice"),
    [
        (False, True, "; --extend continues it with more steps; otherwise give the new run "),
        (False, False, "; give the new run another name, or restore the setting"),
        (True, True, "; give the new run another name, or restore the setting"),
    ],
)
def test_more_steps_for_a_finished_run_are_refused_with_the_way_to_get_them(
    in_stages: bool, finished: bool, advice: str, tmp_path: Path
) -> None:
    stages = [{"objective": {"kind": kind}} for kind in ("sft", "orpo") if in_stages]
    start_run(changed(tmp_path, lambda tree: tree.update(stages=stages)))
    training = {**settings(tmp_path)["training"], "epochs": None, "max_steps": 99}
    longer = changed(tmp_path, lambda tree: tree.update(stages=stages, training=training))
    if finished:
        files.write_json(longer.run_dir / files.RESULT_FILE, {})
    with pytest.raises(ConfigError, match="max_steps") as refused:
        Run(longer).refuse_changes()
    assert advice in str(refused.value)


def test_a_storage_with_stages_may_be_moved(tmp_path: Path) -> None:
    first, other = (tmp_path / name / "x" / "1-sft" for name in ("here", "there"))
    start_run(run_config(tmp_path / "here", adapter={"init_from": str(first)}))
    shutil.move(tmp_path / "here", tmp_path / "there")
    Run(run_config(tmp_path / "there", adapter={"init_from": str(other)})).refuse_changes()
    elsewhere = run_config(tmp_path / "there", adapter={"init_from": str(other / "y")})
    with pytest.raises(ConfigError, match=r"^adapter\.init_from: "):
        Run(elsewhere).refuse_changes()


def test_the_storage_may_be_moved(tmp_path: Path) -> None:
    config = run_config(tmp_path / "here")
    start_run(config)
    shutil.move(tmp_path / "here", tmp_path / "there")
    moved = run_config(tmp_path / "there")
    Run(moved).refuse_changes()


def test_the_same_settings_and_a_run_that_saved_nothing_are_not_refused(tmp_path: Path) -> None:
    config = run_config(tmp_path)
    start_run(config)
    Run(run_config(tmp_path)).refuse_changes()
    shutil.rmtree(config.run_dir / "checkpoints")
    Run(changed(tmp_path, REFUSED["training.seed"][0])).refuse_changes()


# --- changed inputs behind the same settings ------------------------------------------------------


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return Path(shutil.copytree(BASE, tmp_path / "base"))


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}", encoding="utf-8")
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    return folder


@pytest.fixture
def begun(base: Path, adapter: Path, tmp_path: Path) -> tuple[RunConfig, Artifact]:
    """A run that has begun: settled, with a checkpoint."""
    config = run_config(tmp_path, model={"base": str(base)}, adapter={"init_from": str(adapter)})
    artifact = make_artifact(tmp_path, train=4, evaluation=2)
    config.run_dir.mkdir(parents=True)
    settle(Run(config), artifact, SILENT.announce, CPU)
    start_run(config)
    return config, artifact


def flip_last_byte(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def rename_a_token(base: Path) -> None:
    path = base / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    one, two = list(vocabulary)[-2:]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    path.write_text(json.dumps(tokenizer), encoding="utf-8")


def test_the_same_inputs_go_on(begun: tuple[RunConfig, Artifact]) -> None:
    config, artifact = begun
    identity = settle(Run(config), artifact, SILENT.announce, CPU).identity
    assert set(identity) == {"data", "tokenizer", "model.base", "adapter.init_from"}
    assert (
        json.loads((config.run_dir / "run.json").read_text(encoding="utf-8"))["identity"]
        == identity
    )


@pytest.mark.parametrize(
    ("pids", "workers", "threads"),
    [([11], 1, 2), ([11, 12], 2, 2), ([11, 12], 1, None), ([11], 2, None), (None, 1, 2)],
    ids=["alone", "two", "two, then alone", "alone, then two", "ended before its first step"],
)
def test_threads_are_kept_by_as_many_workers_as_before(
    begun: tuple[RunConfig, Artifact], pids: list[int] | None, workers: int, threads: int | None
) -> None:
    config, artifact = begun
    run = Run(config)
    run.add_facts({"decisions": {**run.facts()["decisions"], "threads": 2}})
    if pids is not None:
        run.add_facts({"workers": pids})
    found = settle(Run(config), artifact, SILENT.announce, CPU, workers=workers)
    assert found.decisions.threads == threads


def test_a_run_that_lost_its_record_is_not_taken_on_trust(
    begun: tuple[RunConfig, Artifact],
) -> None:
    config, artifact = begun
    (config.run_dir / "run.json").unlink()
    with pytest.raises(ConfigError, match=r"run\.json: the file is missing"):
        settle(Run(config), artifact, SILENT.announce, CPU)


@pytest.mark.parametrize("key", ["data", "tokenizer", "model.base", "adapter.init_from"])
def test_a_changed_input_is_refused_by_its_name(
    key: str, begun: tuple[RunConfig, Artifact], base: Path, adapter: Path, tmp_path: Path
) -> None:
    config, artifact = begun
    match key:
        case "data":
            artifact = make_artifact(tmp_path, train=3, evaluation=2)
        case "tokenizer":
            rename_a_token(base)
        case "model.base":
            flip_last_byte(base / "model.safetensors")
        case "adapter.init_from":
            flip_last_byte(adapter / "adapter_model.safetensors")
    before = (config.run_dir / "run.json").read_bytes()
    with pytest.raises(
        ConfigError, match=rf"^{key}: not what run run began with \(\w{{16}} then, \w{{16}} now\)"
    ):
        settle(Run(config), artifact, SILENT.announce, CPU)
    assert (config.run_dir / "run.json").read_bytes() == before


def test_a_refused_run_is_left_as_it_was(tmp_path: Path) -> None:
    """The refusal changes no checkpoint and no metrics, so the right command still resumes."""
    artifact, other = (
        make_artifact(tmp_path, train=4, evaluation=2),
        make_artifact(tmp_path, train=5, evaluation=2),
    )
    config = run_config(tmp_path, training={"max_steps": 1, "pairs_per_step": 4, "warmup": 0})
    train_locally(config, artifact)
    before = {path: path.read_bytes() for path in config.run_dir.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=r"^data: "):
        train_locally(config, other)
    assert {
        path: path.read_bytes() for path in config.run_dir.rglob("*") if path.is_file()
    } == before


# --- one process a run ----------------------------------------------------------------------------


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the run's lock until its stdin is closed."""
    with locked_elsewhere(tmp_path / "run") as process:
        yield process


def test_a_second_process_is_refused_until_the_first_has_ended(
    holder: subprocess.Popen[str], tmp_path: Path
) -> None:
    run = Run(run_config(tmp_path))
    with pytest.raises(ConfigError, match="another process is at work here"):
        run.refuse_busy(0.0)
    with pytest.raises(ConfigError, match="another process is at work here"), run.lock():
        raise AssertionError("two processes in one run")
    assert not run.is_ours
    with Run(run_config(tmp_path, "other")).lock():
        pass
    holder.communicate("")
    with run.lock():
        assert run.is_ours


def test_a_killed_process_leaves_no_lock(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    holder.kill()
    holder.wait()
    with Run(run_config(tmp_path)).lock():
        pass


def test_a_third_process_is_refused_as_well(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    third = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    assert third.returncode == 1
    assert "LockedError" in third.stderr
    assert "held" not in third.stdout


# --- files ----------------------------------------------------------------------------------------


def test_json_is_replaced_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.json"
    assert files.read_json(path) is None
    files.write_json(path, {"a": 1})

    def killed(self: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        files.write_json(path, {"a": 2})
    assert files.read_json(path) == {"a": 1}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    made = Run(run_config(tmp_path))
    made.folder.mkdir()
    return made


def test_facts_are_added_to_what_run_json_says(run: Run) -> None:
    run.add_facts({"workers": [7, 9]})
    run.add_facts({"strategy": "single-process"})
    assert files.read_json(run.path(files.RUN_FILE)) == {
        "workers": [7, 9],
        "strategy": "single-process",
    }


def metrics_file(run: Run, text: str) -> LocalReporter:
    run.path(files.METRICS_FILE).write_text(text, encoding="utf-8")
    return LocalReporter(run, SILENT)


LINES = [
    '{"step": 0, "eval/a": 1.0}',
    '{"step": 1, "train/b": 2.0}',
    '{"step": 1, "eval/a": 3.0}',
    '{"step": 2, "train/b"',
]


@pytest.mark.parametrize(("step", "kept"), [(-1, 0), (0, 1), (1, 3), (2, 3)])
def test_rewinding_forgets_later_steps_and_half_a_line(step: int, kept: int, run: Run) -> None:
    metrics_file(run, "\n".join(LINES)).rewind(step)
    assert run.path(files.METRICS_FILE).read_text(encoding="utf-8") == "".join(
        line + "\n" for line in LINES[:kept]
    )


def test_rewinding_a_run_that_reported_nothing_is_no_error(run: Run) -> None:
    LocalReporter(run, SILENT).rewind(-1)
    assert list(run.folder.iterdir()) == []


def test_metrics_are_read_back(run: Run) -> None:
    reporter = metrics_file(run, "")
    reporter.report(1, 3, {"train/loss": 0.1 + 0.2, "eval/a": 0.5})
    reporter.report(2, 3, {"train/loss": 0.25})
    assert last_metrics(run.folder) == {"train/loss": 0.25, "eval/a": 0.5}
    assert metric_by_step(run.folder, "train/loss") == {1: 0.30000000000000004, 2: 0.25}, (
        "at full precision"
    )


def test_the_latest_number_of_a_metric_passes_over_one_that_was_not_finite(run: Run) -> None:
    reporter = LocalReporter(run, SILENT)
    reporter.report(1, 2, {"train/loss": 2.0, "train/grad_norm": 0.5})
    reporter.report(2, 2, {"train/loss": 1.0, "train/grad_norm": float("inf")})
    assert last_metrics(run.folder) == {"train/loss": 1.0, "train/grad_norm": 0.5}
