"""A run that is killed anywhere and started again ends with the bytes of a run that was left alone; dropout is on."""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from signal import SIGINT, SIGKILL, SIGTERM, Signals
from typing import Any

import pytest
import torch
import yaml
from reported import comparable
from safetensors.torch import load_file
from support import ENVIRONMENT, read_metrics, settings

from orpo_ray import api
from orpo_ray.config import load_config

pytestmark = [pytest.mark.slow, pytest.mark.ray]

STEPS, STEPS_AN_EPOCH, CHECKPOINT_EVERY = 10, 5, 2
RUN_SCRIPT = Path(__file__).with_name("killed_runs.py")


@dataclass(frozen=True)
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
    "first-step": Kill("report", 1, reported=1, whole=()),
    "middle-before-its-checkpoint": Kill("report", 4, reported=4, whole=(2,)),
    "middle-after-a-checkpoint": Kill("report", 7, reported=7, whole=(4, 6)),
    "last-step-of-an-epoch": Kill("report", STEPS_AN_EPOCH, reported=5, whole=(2, 4)),
    "first-step-of-an-epoch": Kill("report", STEPS_AN_EPOCH + 1, reported=6, whole=(2, 4)),
    "last-step": Kill("report", STEPS, reported=10, whole=(6, 8)),
    "writing-the-first-checkpoint": Kill("checkpoint", 2, reported=2, whole=()),
    "writing-a-checkpoint": Kill("checkpoint", 6, reported=6, whole=(2, 4)),
    "deleting-a-checkpoint": Kill("prune", 2, reported=6, whole=(4, 6)),
    "writing-the-result": Kill("finish", STEPS, reported=10, whole=(8, 10)),
    "8-bit-adamw": Kill("report", 7, reported=7, whole=(4, 6), optimizer="adamw-8bit"),
}


def write_config(storage: Path, name: str, **training: Any) -> Path:
    """A run's YAML: NF4, dropout, and an adapter with tensors large enough for 8-bit optimizer state."""
    tree = settings(
        storage,
        name,
        adapter={"r": 32, "alpha": 32, "dropout": 0.05},
        training={"checkpoint_every": CHECKPOINT_EVERY, "keep": 2, "eval_every": STEPS_AN_EPOCH, **training},
    )
    path = storage / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def unbroken(prepared_storage: Path) -> dict[str, Path]:
    """Folders of runs that were left alone, by optimizer."""
    folders = {}
    for optimizer in ("adamw", "adamw-8bit"):
        config = load_config(write_config(prepared_storage, f"unbroken-{optimizer}", optimizer=optimizer))
        api.train(config, lambda line: None)
        folders[optimizer] = config.run_dir
    return folders


@pytest.fixture(scope="module")
def killed(prepared_storage: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Configs of runs that have just been killed, by the name of the kill."""
    configs = {
        name: write_config(prepared_storage, f"killed-{name}", optimizer=kill.optimizer) for name, kill in KILLS.items()
    }
    jobs = [{"config": str(configs[name]), "at": kill.at, "step": kill.step} for name, kill in KILLS.items()]
    file = tmp_path_factory.mktemp("jobs") / "jobs.json"
    file.write_text(json.dumps(jobs), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(RUN_SCRIPT), str(file)], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [-SIGKILL] * len(jobs), done.stderr
    return configs


@pytest.mark.parametrize("name", KILLS)
def test_a_killed_run_goes_on_exactly(name: str, killed: dict[str, Path], unbroken: dict[str, Path]) -> None:
    kill = KILLS[name]
    config = load_config(killed[name])
    assert read_metrics(config.run_dir)[-1]["step"] == kill.reported
    assert not (config.run_dir / "result.json").exists()
    said: list[str] = []
    result = api.train(config, said.append)
    resumed_at = kill.whole[-1] if kill.whole else 0
    assert (f"resuming at step {resumed_at} of {STEPS}" in said) == bool(kill.whole)
    assert not [line for line in said if "damaged" in line]
    assert_same_run(config.run_dir, unbroken[kill.optimizer], result)


def assert_same_run(run_dir: Path, expected: Path, result: dict[str, Any]) -> None:
    """Adapter, optimizer state and checkpoints byte for byte, every metric once; nothing half-written is left."""
    for file in ("adapter/adapter_model.safetensors", f"checkpoints/step-{STEPS:06d}/state.safetensors"):
        assert (run_dir / file).read_bytes() == (expected / file).read_bytes(), file
    assert names(run_dir / "checkpoints") == names(expected / "checkpoints")
    assert comparable(run_dir) == comparable(expected)
    unbroken_result = json.loads((expected / "result.json").read_text(encoding="utf-8"))
    assert result == json.loads((run_dir / "result.json").read_text(encoding="utf-8"))
    assert result.keys() == unbroken_result.keys()
    assert result["steps"] == unbroken_result["steps"]


def names(folder: Path) -> list[str]:
    """What lies in a folder, hidden leftovers included."""
    return sorted(path.name for path in folder.iterdir())


def test_the_unbroken_run_is_one_worth_comparing_with(unbroken: dict[str, Path]) -> None:
    """Otherwise equal bytes would prove little: steps in order, dropout at work, 8-bit state really 8-bit."""
    lines = read_metrics(unbroken["adamw"])
    assert [line["step"] for line in lines if "train/loss" in line] == list(range(1, STEPS + 1))
    assert [line["step"] for line in lines if "eval/accuracy" in line] == [0, 5, 10]
    config = json.loads((unbroken["adamw"] / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["lora_dropout"] == 0.05
    state = load_file(unbroken["adamw-8bit"] / "checkpoints" / f"step-{STEPS:06d}" / "state.safetensors")
    assert {tensor.dtype for name, tensor in state.items() if name.endswith("/state1")} == {torch.uint8}


# --- signals to the real command --------------------------------------------------------------------------------

SIGNAL_STEPS = 30
HANG_SECONDS = 240.0


def command(config: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "orpo_ray.cli.main", "train", str(config), *options]


@contextmanager
def killed_if_it_hangs(process: subprocess.Popen[str]) -> Iterator[None]:
    """A test that waits for output must end even if there is none."""
    timer = threading.Timer(HANG_SECONDS, process.kill)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        process.kill()
        process.wait()


def stop_after_first_step(config: Path, number: Signals) -> tuple[int, str]:
    """Start the command, send it a signal once its first step is shown; its exit code and the rest of its stderr."""
    process = subprocess.Popen(
        command(config), env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with killed_if_it_hangs(process):
        assert process.stderr is not None
        shown = next((line for line in process.stderr if line.startswith("step 1/")), None)
        assert shown is not None, "the run ended before its first step"
        process.send_signal(number)
        _, rest = process.communicate()
        return process.returncode, rest


@pytest.fixture(scope="module")
def uninterrupted(prepared_storage: Path) -> Path:
    """A finished run of SIGNAL_STEPS that shows each of them."""
    config = load_config(write_config(prepared_storage, "uninterrupted", **signal_settings()))
    api.train(config, lambda line: None)
    return config.run_dir


def signal_settings() -> dict[str, Any]:
    """An evaluation at each step prints a line for it; no checkpoint is due before the last step."""
    return {"max_steps": SIGNAL_STEPS, "eval_every": 1, "checkpoint_every": SIGNAL_STEPS}


@pytest.mark.parametrize("number", [SIGTERM, SIGINT])
def test_a_signal_stops_with_a_checkpoint_and_the_same_command_goes_on(
    number: Signals, prepared_storage: Path, uninterrupted: Path
) -> None:
    path = write_config(prepared_storage, f"stopped-by-{number.name}", **signal_settings())
    config = load_config(path)
    code, stderr = stop_after_first_step(path, number)
    assert code == 4, stderr
    assert f"{number.name}: stopping, with a checkpoint if training has begun" in stderr
    assert "Traceback" not in stderr
    (checkpoint,) = names(config.run_dir / "checkpoints")
    stopped_at = int(checkpoint.removeprefix("step-"))
    assert 1 <= stopped_at < SIGNAL_STEPS
    assert read_metrics(config.run_dir)[-1]["step"] == stopped_at
    assert f"stopped at step {stopped_at} of {SIGNAL_STEPS}" in stderr.splitlines()[-1]
    assert not (config.run_dir / "result.json").exists()

    assert f"resuming at step {stopped_at} of {SIGNAL_STEPS}" in go_on(path, number)
    for file in ("adapter/adapter_model.safetensors", f"checkpoints/step-{SIGNAL_STEPS:06d}/state.safetensors"):
        assert (config.run_dir / file).read_bytes() == (uninterrupted / file).read_bytes(), file
    assert comparable(config.run_dir) == comparable(uninterrupted)


def go_on(path: Path, number: Signals) -> str:
    """Run the same config again to its end, once by the command, once from Python; returns what it said."""
    if number == SIGINT:
        said: list[str] = []
        api.train(load_config(path), said.append)
        return "\n".join(said)
    again = subprocess.run(command(path), env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    return again.stderr


def test_the_command_says_that_a_finished_run_is_finished(uninterrupted: Path) -> None:
    before = {path: path.read_bytes() for path in uninterrupted.rglob("*") if path.is_file() and path.suffix != ".log"}
    config = uninterrupted.parent / "uninterrupted.yaml"
    again = subprocess.run(command(config, "--json"), env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert "run uninterrupted is finished" in again.stderr
    result = json.loads((uninterrupted / "result.json").read_text(encoding="utf-8"))
    assert json.loads(again.stdout) == result
    after = {path: path.read_bytes() for path in uninterrupted.rglob("*") if path.is_file() and path.suffix != ".log"}
    assert after == before
