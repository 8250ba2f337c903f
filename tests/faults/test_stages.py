"""A run in two stages, SFT and then DPO, that is killed in its second stage and resumed."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from signal import SIGKILL
from typing import Any

import pytest
import yaml
from killed_runs import Job, KilledRuns
from reported import comparable
from safetensors.numpy import load_file
from support import DEMO, Done, Listener, read_metrics, settings

from orpo_ray import api
from orpo_ray.config import load_config
from orpo_ray.errors import ConfigError
from orpo_ray.runs.console import SILENT

pytestmark = pytest.mark.slow

WEIGHTS = "adapter_model.safetensors"
STAGES: list[dict[str, Any]] = [
    {"objective": {"kind": "sft"}, "training": {"max_steps": 4}},
    {
        "objective": {"kind": "dpo", "beta": 0.1},
        "training": {"max_steps": 8, "learning_rate": 5e-4},
    },
]
KILLED_AT = 6
"""A step that only the second stage has."""


def write_config(storage: Path, name: str) -> Path:
    tree = settings(
        storage, name, training={"max_steps": 4, "checkpoint_every": 4, "eval_every": 4}
    )
    path = storage / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**tree, "stages": STAGES}), encoding="utf-8")
    return path


@dataclass(frozen=True)
class Pair:
    """The same run twice: left alone, and killed in its second stage."""

    unbroken: Path
    killed: Path
    first_stage_at_kill: dict[str, int]
    done: Done


def files_of(folder: Path) -> dict[str, int]:
    """When each file of a run was written."""
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def runs(shell: Callable[..., Done], killed_runs: KilledRuns, prepared_storage: Path) -> Pair:
    done = shell("train", write_config(prepared_storage, "staged"), "--json")
    assert done.code == 0, done.err
    config, folder = (
        write_config(prepared_storage, "staged-killed"),
        prepared_storage / "staged-killed",
    )
    assert killed_runs.run(Job(str(config), "report", KILLED_AT)) == -SIGKILL
    at_kill = files_of(folder / "1-sft")
    again = shell("train", config, "--json")
    assert again.code == 0, again.err
    return Pair(prepared_storage / "staged", folder, at_kill, again)


def test_each_stage_has_metrics_and_checkpoints_of_its_own(runs: Pair) -> None:
    for stage, steps in (("1-sft", 4), ("2-dpo", 8)):
        folder = runs.unbroken / stage
        assert [line["step"] for line in read_metrics(folder) if "train/loss" in line] == list(
            range(1, steps + 1)
        )
        assert (folder / "checkpoints" / f"step-{steps:06d}").is_dir()


def test_the_second_stage_starts_from_the_first_ones_adapter_which_is_its_reference(
    runs: Pair,
) -> None:
    first, second = (read_metrics(runs.unbroken / stage) for stage in ("1-sft", "2-dpo"))
    numbers = ("eval/accuracy", "eval/margin", "eval/nll")
    assert [second[0][name] for name in numbers] == pytest.approx(
        [first[-1][name] for name in numbers], abs=1e-6
    )
    # Where policy and reference are the same, DPO's loss is log 2; dropout moves it a little.
    assert second[1]["train/loss"] == pytest.approx(0.6931, abs=0.02)


def test_the_whole_run_leaves_what_an_ordinary_one_leaves(runs: Pair) -> None:
    result = json.loads((runs.unbroken / "result.json").read_text(encoding="utf-8"))
    assert (result["status"], result["name"], result["steps"]) == ("finished", "staged", 12)
    assert [stage["name"] for stage in result["stages"]] == ["staged/1-sft", "staged/2-dpo"]
    last = runs.unbroken / "2-dpo" / "adapter" / WEIGHTS
    assert (Path(result["adapter"]) / WEIGHTS).read_bytes() == last.read_bytes()
    assert result["adapter"] == str(runs.unbroken / "adapter")


def test_the_whole_run_is_compared_with_the_model_before_its_first_stage(runs: Pair) -> None:
    result = json.loads((runs.unbroken / "result.json").read_text(encoding="utf-8"))
    first, last = result["stages"]
    for name, change in result["changes"].items():
        assert change["before"] == first["changes"][name]["before"]
        assert change["after"] == last["changes"][name]["after"]
    assert result["start"] == first["start"]
    assert result["seconds"] == pytest.approx(first["seconds"] + last["seconds"])
    rates = [stage["pairs_per_second"] for stage in (first, last)]
    assert min(rates) <= result["pairs_per_second"] <= max(rates)


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"damaged")])
def test_scores_that_are_lost_cost_the_comparison_and_not_the_run(
    runs: Pair, damage: Callable[[Path], object], tmp_path: Path
) -> None:
    storage = Path(shutil.copytree(runs.unbroken.parent, tmp_path / "storage"))
    (storage / "staged" / "result.json").unlink()
    damage(storage / "staged" / "1-sft" / "evaluations" / "step-00000000.safetensors")
    config = load_config(runs.unbroken.parent / "staged.yaml", [f"storage={storage}"])
    result = api.train(config, SILENT)
    assert result.changes == result.stages[-1].changes
    assert "its scores are not on record" in result.remarks[-1]


def test_killed_in_its_second_stage_the_run_goes_on_there(runs: Pair) -> None:
    assert any(
        line.startswith("stage 1 of 2: sft") and line.endswith("1-sft, finished already")
        for line in runs.done.said
    )
    assert [line for line in runs.done.said if "resuming at step" in line] == [
        "resuming at step 4 of 8"
    ]
    assert files_of(runs.killed / "1-sft") == runs.first_stage_at_kill
    expected, found = (
        load_file(folder / "adapter" / WEIGHTS) for folder in (runs.unbroken, runs.killed)
    )
    assert all((expected[name] == found[name]).all() for name in expected)
    assert comparable(runs.killed / "2-dpo") == comparable(runs.unbroken / "2-dpo")


def test_a_finished_run_in_stages_is_not_run_again(runs: Pair) -> None:
    config = load_config(runs.unbroken.parent / "staged.yaml")
    said: list[str] = []
    assert api.train(config, Listener(said)).steps == 12
    assert said == [f"run staged is finished: {runs.unbroken}; give another name to train again"]


def test_another_setting_of_a_stage_that_was_trained_is_refused(runs: Pair) -> None:
    config = runs.unbroken.parent / "staged.yaml"
    with pytest.raises(
        ConfigError,
        match=r"stages\.1\.objective\.beta: 0\.2 here, but run staged was made with 0\.1",
    ):
        api.train(load_config(config, ["stages.1.objective.beta=0.2"]))


def test_a_run_in_stages_is_evaluated_as_any_other(runs: Pair) -> None:
    config = load_config(runs.unbroken.parent / "staged.yaml")
    found = api.evaluate(config, console=SILENT)
    assert found.adapter == str(runs.unbroken / "adapter")
    last = read_metrics(runs.unbroken / "2-dpo")[-1]
    assert found.metrics["trained"]["all"]["accuracy"] == last["eval/accuracy"]


@pytest.mark.parametrize(
    "gone",
    [
        "stages.0.data={train: [{source: gone.jsonl}]}",
        "stages.1.adapter={init_from: ./gone}",
        "adapter.init_from=./gone",
    ],
)
def test_what_only_training_needs_may_be_gone_at_an_evaluation(runs: Pair, gone: str) -> None:
    config = load_config(runs.unbroken.parent / "staged.yaml", [gone])
    assert api.evaluate(config, console=SILENT).adapter == str(runs.unbroken / "adapter")


def test_a_run_in_stages_is_evaluated_on_what_its_last_stage_is(runs: Pair) -> None:
    judged_by = f"stages.1.data={{eval: [{{source: {DEMO / 'h2.jsonl'}, limit: 8}}]}}"
    config = load_config(runs.unbroken.parent / "staged.yaml", [judged_by])
    assert "h2.jsonl" in api.evaluate(config, console=SILENT).metrics["trained"]
