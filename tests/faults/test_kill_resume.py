"""A run that is killed and resumed ends with the same bytes as an unbroken run, with dropout on."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from signal import SIGINT, SIGKILL, SIGTERM, Signals
from typing import Any

import pytest
import torch
import yaml
from killed_runs import Job, KilledRuns, said_by
from reported import comparable
from safetensors.torch import load_file
from support import Done, Listener, read_metrics, settings

from orpo_ray import api
from orpo_ray.config import load_config
from orpo_ray.config.optimizers import OPTIMIZERS
from orpo_ray.runs.console import SILENT

pytestmark = pytest.mark.slow

STEPS, STEPS_AN_EPOCH, CHECKPOINT_EVERY = 10, 5, 2


@dataclass(frozen=True, kw_only=True)
class Kill:
    """When a run is killed, and what its folder must look like then."""

    at: str
    step: int
    reported: int
    """The last step in metrics.jsonl after the kill."""
    whole: tuple[int, ...]
    """Steps of the checkpoints that are whole after the kill."""
    optimizer: str = "adamw"


KILLS = {
    "first-step": Kill(at="report", step=1, reported=1, whole=()),
    "middle-before-its-checkpoint": Kill(at="report", step=4, reported=4, whole=(2,)),
    "middle-after-a-checkpoint": Kill(at="report", step=7, reported=7, whole=(4, 6)),
    "last-step-of-an-epoch": Kill(at="report", step=STEPS_AN_EPOCH, reported=5, whole=(2, 4)),
    "first-step-of-an-epoch": Kill(at="report", step=STEPS_AN_EPOCH + 1, reported=6, whole=(2, 4)),
    "last-step": Kill(at="report", step=STEPS, reported=10, whole=(6, 8)),
    "writing-the-first-checkpoint": Kill(at="checkpoint", step=2, reported=2, whole=()),
    "writing-a-checkpoint": Kill(at="checkpoint", step=6, reported=6, whole=(2, 4)),
    "deleting-a-checkpoint": Kill(at="prune", step=2, reported=6, whole=(4, 6)),
    "writing-the-result": Kill(at="finish", step=STEPS, reported=10, whole=(8, 10)),
    "8-bit-adamw": Kill(at="report", step=7, reported=7, whole=(4, 6), optimizer="adamw-8bit"),
    "schedule-free": Kill(
        at="report", step=7, reported=7, whole=(4, 6), optimizer="schedule-free-adamw"
    ),
}
LIKE_OTHERS = {"first-step", "middle-before-its-checkpoint", "first-step-of-an-epoch", "last-step"}
"""These kills lose the same, and are resumed from the same, as one of the others."""


def has_schedule(training: dict[str, Any]) -> bool:
    """Whether the optimizer of a run does without a schedule of ours."""
    return OPTIMIZERS[training.get("optimizer", "adamw")].has_schedule


def write_config(storage: Path, name: str, **training: Any) -> Path:
    """A run's YAML, with NF4 and dropout.

    The adapter's tensors are large enough for 8-bit optimizer state.
    """
    tree = settings(
        storage,
        name,
        adapter={"r": 32, "alpha": 32, "dropout": 0.05},
        training={
            "checkpoint_every": CHECKPOINT_EVERY,
            "keep": 2,
            "eval_every": STEPS_AN_EPOCH,
            **({"schedule": "constant"} if has_schedule(training) else {}),
            **training,
        },
    )
    path = storage / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def unbroken(prepared_storage: Path) -> dict[str, Path]:
    """Folders of unbroken runs, by optimizer."""
    folders = {}
    for optimizer in ("adamw", "adamw-8bit", "schedule-free-adamw"):
        config = load_config(
            write_config(prepared_storage, f"unbroken-{optimizer}", optimizer=optimizer)
        )
        api.train(config, SILENT)
        folders[optimizer] = config.run_dir
    return folders


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.long if name in LIKE_OTHERS else ()) for name in KILLS],
)
def test_a_killed_run_resumes_exactly(
    name: str, killed_runs: KilledRuns, prepared_storage: Path, unbroken: dict[str, Path]
) -> None:
    kill = KILLS[name]
    path = write_config(prepared_storage, f"killed-{name}", optimizer=kill.optimizer)
    assert killed_runs.run(Job(str(path), kill.at, kill.step)) == -SIGKILL
    config = load_config(path)
    assert read_metrics(config.run_dir)[-1]["step"] == kill.reported
    assert not (config.run_dir / "result.json").exists()
    said: list[str] = []
    result = api.train(config, Listener(said)).to_json()
    resumed_at = kill.whole[-1] if kill.whole else 0
    assert (f"resuming at step {resumed_at} of {STEPS}" in said) == bool(kill.whole)
    assert not [line for line in said if "damaged" in line]
    assert_same_run(config.run_dir, unbroken[kill.optimizer], result)


def assert_same_run(run_dir: Path, expected: Path, result: dict[str, Any]) -> None:
    """Check that two runs have the same bytes and metrics. Nothing half-written may be left."""
    for file in (
        "adapter/adapter_model.safetensors",
        f"checkpoints/step-{STEPS:06d}/state.safetensors",
        "samples.jsonl",
    ):
        assert (run_dir / file).read_bytes() == (expected / file).read_bytes(), file
    assert names(run_dir / "checkpoints") == names(expected / "checkpoints")
    assert comparable(run_dir) == comparable(expected)
    unbroken_result = json.loads((expected / "result.json").read_text(encoding="utf-8"))
    assert result == json.loads((run_dir / "result.json").read_text(encoding="utf-8"))
    assert result.keys() == unbroken_result.keys()
    assert result["steps"] == unbroken_result["steps"]


def names(folder: Path) -> list[str]:
    """The names in a folder, with hidden files."""
    return sorted(path.name for path in folder.iterdir())


def test_the_unbroken_run_has_all_that_a_resume_could_lose(unbroken: dict[str, Path]) -> None:
    """It has all steps in order, dropout, and 8-bit state. Else equal bytes would prove little."""
    lines = read_metrics(unbroken["adamw"])
    assert [line["step"] for line in lines if "train/loss" in line] == list(range(1, STEPS + 1))
    assert [line["step"] for line in lines if "eval/accuracy" in line] == [0, 5, 10]
    config = json.loads(
        (unbroken["adamw"] / "adapter" / "adapter_config.json").read_text(encoding="utf-8")
    )
    assert config["lora_dropout"] == 0.05
    state = load_file(
        unbroken["adamw-8bit"] / "checkpoints" / f"step-{STEPS:06d}" / "state.safetensors"
    )
    assert {tensor.dtype for name, tensor in state.items() if name.endswith("/state1")} == {
        torch.uint8
    }


# --- signals to the real command ------------------------------------------------------------------

SIGNALLED_IN, STOPPED_AT = 2, 3
"""A signal takes effect in the step after it. That step would write no checkpoint otherwise."""


@pytest.mark.parametrize("number", [SIGTERM, SIGINT])
def test_a_signal_stops_with_a_checkpoint_and_the_same_command_resumes(
    number: Signals,
    shell: Callable[..., Done],
    killed_runs: KilledRuns,
    prepared_storage: Path,
    unbroken: dict[str, Path],
) -> None:
    path = write_config(prepared_storage, f"stopped-by-{number.name}")
    config, job = load_config(path), Job(str(path), number.name, SIGNALLED_IN)
    code = killed_runs.run(job)
    stderr = said_by(job).read_text(encoding="utf-8")
    assert code == 4, stderr
    assert f"{number.name}: stopping, with a checkpoint if training has begun" in stderr
    assert "Traceback" not in stderr
    assert names(config.run_dir / "checkpoints")[-1] == f"step-{STOPPED_AT:06d}"
    assert read_metrics(config.run_dir)[-1]["step"] == STOPPED_AT
    assert f"stopped at step {STOPPED_AT} of {STEPS}" in stderr.splitlines()[-1]
    assert not (config.run_dir / "result.json").exists()

    done = shell("train", path, "--json")
    assert done.code == 0, done.err
    assert f"resuming at step {STOPPED_AT} of {STEPS}" in done.err
    assert_same_run(config.run_dir, unbroken["adamw"], done.result)


def test_the_command_says_that_a_finished_run_is_finished(
    shell: Callable[..., Done], unbroken: dict[str, Path]
) -> None:
    run_dir = unbroken["adamw"]
    before = {
        path: path.read_bytes()
        for path in run_dir.rglob("*")
        if path.is_file() and path.suffix != ".log"
    }
    again = shell("train", run_dir.with_suffix(".yaml"), "--json")
    assert again.code == 0, again.err
    assert "run unbroken-adamw is finished" in again.err
    assert again.result == json.loads((run_dir / "result.json").read_text(encoding="utf-8"))
    after = {
        path: path.read_bytes()
        for path in run_dir.rglob("*")
        if path.is_file() and path.suffix != ".log"
    }
    assert after == before
