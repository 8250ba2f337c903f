"""A finished run continues with more steps, which have their own schedule and resume exactly."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from support import Listener, StopsAfter, read_metrics, run_config

from orpo_ray import api
from orpo_ray.config import RunConfig
from orpo_ray.errors import ConfigError, StoppedError
from orpo_ray.runs.console import SILENT
from orpo_ray.runs.files import RUN_FILE, read_json
from orpo_ray.runs.run import Run

BEFORE, AFTER = 4, 9
FILES = ("adapter/adapter_model.safetensors", f"checkpoints/step-{AFTER:06d}/state.safetensors")


def config(storage: Path, max_steps: int, **training: Any) -> RunConfig:
    steps = {"max_steps": max_steps, "checkpoint_every": 2, "eval_every": 2, "warmup": 1}
    return run_config(storage, training={**steps, **training})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage with a finished run of a few steps."""
    storage = tmp_path_factory.mktemp("extend")
    api.train(config(storage, BEFORE), SILENT)
    return storage


@pytest.fixture(scope="module")
def unbroken(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run after an extension that was not stopped."""
    storage = tmp_path_factory.mktemp("unbroken") / "storage"
    shutil.copytree(finished, storage)
    console = Listener()
    result = api.train(config(storage, AFTER), console, extend=True)
    assert result.steps == AFTER
    assert any("continues after step 4: a cosine schedule" in line for line in console.said)
    return storage / "run"


def rates(run_dir: Path) -> list[float]:
    return [
        record["train/learning_rate"]
        for record in read_metrics(run_dir)
        if "train/learning_rate" in record
    ]


def test_added_steps_have_a_schedule_of_their_own(finished: Path, unbroken: Path) -> None:
    assert len(rates(unbroken)) == AFTER
    assert rates(unbroken)[:BEFORE] == rates(finished / "run")
    alone = finished.parent / "alone"
    api.train(config(alone, AFTER - BEFORE), SILENT)
    assert rates(unbroken)[BEFORE:] == rates(alone / "run")


def test_an_extension_is_on_record(unbroken: Path) -> None:
    facts = read_json(unbroken / RUN_FILE)
    assert facts is not None
    (begun,) = facts["extensions"]
    assert begun["step"] == BEFORE and begun["training"]["max_steps"] == BEFORE
    assert "eval/accuracy" in begun["metrics"]


def test_an_extension_that_is_stopped_is_resumed_exactly(
    finished: Path, unbroken: Path, tmp_path: Path
) -> None:
    storage = tmp_path / "storage"
    shutil.copytree(finished, storage)
    longer = config(storage, AFTER)
    with pytest.raises(StoppedError):
        api.train(longer, StopsAfter(BEFORE + 3), extend=True)
    assert Run(longer).result() is None, "a run that waits for more steps is not finished"
    api.train(longer, SILENT, extend=True)
    for name in FILES:
        assert (storage / "run" / name).read_bytes() == (unbroken / name).read_bytes()
    assert rates(storage / "run") == rates(unbroken)


@pytest.mark.parametrize("dies_in", ["write_config", "reopen"])
def test_an_extension_whose_process_dies_as_it_begins_is_begun_again(
    finished: Path,
    unbroken: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dies_in: str,
) -> None:
    storage = tmp_path / "storage"
    shutil.copytree(finished, storage)
    longer = config(storage, AFTER)

    def dies(run: Run) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Run, dies_in, dies)
        with pytest.raises(KeyboardInterrupt):
            api.train(longer, SILENT, extend=True)
    assert Run(longer).result() is not None
    api.train(longer, SILENT, extend=True)
    facts, whole = read_json(storage / "run" / RUN_FILE), read_json(unbroken / RUN_FILE)
    assert facts is not None and whole is not None
    assert facts["extensions"] == whole["extensions"]
    assert (storage / "run" / FILES[0]).read_bytes() == (unbroken / FILES[0]).read_bytes()


def test_the_command_before_the_extension_is_told_what_it_became(unbroken: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"^training\.max_steps: 4 here, but run run was extended "
    ):
        api.train(config(unbroken.parent, BEFORE), SILENT)


@pytest.mark.parametrize(
    ("section", "setting"), [("training", "learning_rate"), ("adapter", "dropout")]
)
def test_what_the_extension_left_alone_is_said_as_of_any_run(
    unbroken: Path, section: str, setting: str
) -> None:
    changed = config(unbroken.parent, AFTER)
    part = getattr(changed, section).model_copy(update={setting: 0.25})
    with pytest.raises(ConfigError, match=rf"{setting}: 0\.25 here, but run run was made with "):
        api.train(changed.model_copy(update={section: part}), SILENT)


def test_a_finished_extension_is_finished(unbroken: Path) -> None:
    console = Listener()
    again = api.train(config(unbroken.parent, AFTER), console)
    assert again.steps == AFTER
    assert console.said[-1].startswith("run run is finished")


@pytest.mark.parametrize(
    ("steps", "training", "says"),
    [
        (BEFORE, {}, r"--extend: run run has 4 steps already, .* training\.max_steps=8"),
        (2, {}, r"--extend: run run has 4 steps already"),
        (AFTER, {"pairs_per_step": 4}, r"training\.pairs_per_step: 4 here"),
        (AFTER, {"warmup": 5}, r"training\.warmup: 5 steps, but only 5 steps are added"),
    ],
)
def test_what_is_no_extension_is_refused(
    finished: Path, steps: int, training: dict[str, Any], says: str
) -> None:
    before = (finished / "run" / RUN_FILE).read_bytes()
    with pytest.raises(ConfigError, match=f"^{says}"):
        api.train(config(finished, steps, **training), SILENT, extend=True)
    assert (finished / "run" / RUN_FILE).read_bytes() == before
    assert Run(config(finished, BEFORE)).result() is not None


def test_a_run_that_is_not_finished_is_not_extended(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^--extend: run run in .* is not finished; the same"):
        api.train(config(tmp_path, AFTER), SILENT, extend=True)
    assert list(tmp_path.iterdir()) == []


def test_the_adapter_may_be_that_of_the_best_checkpoint(finished: Path, tmp_path: Path) -> None:
    """The rate is so high that accuracy falls again, so the best step is not the last one."""
    console = Listener()
    wild = config(tmp_path, 8, adapter_from="best", learning_rate=3e-2, keep=8)
    result = api.train(wild, console)
    evaluated = {
        int(record["step"]): (record["eval/accuracy"], record["eval/margin"])
        for record in read_metrics(tmp_path / "run")
        if "eval/accuracy" in record and record["step"] > 0
    }
    best = max(evaluated, key=lambda step: (*evaluated[step], step))
    assert result.adapter_step == best
    assert result.metrics["eval/accuracy"] == evaluated[best][0]
    kept = tmp_path / "run" / "checkpoints" / f"step-{best:06d}" / "adapter"
    weights = "adapter_model.safetensors"
    assert (tmp_path / "run" / "adapter" / weights).read_bytes() == (kept / weights).read_bytes()
    assert f"the adapter is that of step {best} of 8, the best by held-out accuracy" in console.said
