"""Existing runs that are finished, unfinished or damaged, and commands that do not fit them."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from support import BASE, locked_elsewhere
from terminal import WRONG, Command, Finished, nothing_in_the_way, one_line

from orpo_ray.api import ground


@pytest.fixture
def unfinished(finished: Finished, config: Path) -> Path:
    """The finished run as it stood after its first checkpoint, in the storage of `config`."""
    run_dir = config.parent / "storage" / "tiny"
    shutil.copytree(finished.run_dir, run_dir)
    (run_dir / "result.json").unlink()
    shutil.rmtree(run_dir / "adapter")
    shutil.rmtree(run_dir / "checkpoints" / "step-000004")
    return run_dir


def test_a_changed_setting_on_an_unfinished_run(
    command: Command, config: Path, unfinished: Path
) -> None:
    done = command("train", config, "objective.lambda=0.7", "training.seed=1")
    one_line(
        done, WRONG, "objective.lambda: 0.7 here", "tiny was made with 0.5", "1 more: training.seed"
    )
    one_line(
        command("train", config, "data.train.0.limit=40"),
        WRONG,
        "data.train.0.limit: 40 here",
        "with 48",
    )
    one_line(
        command("train", config, "--dry-run", "model.quantization=none"),
        WRONG,
        "model.quantization",
    )


def test_an_unfinished_run_goes_on_with_the_settings_it_had(
    command: Command, config: Path, unfinished: Path, finished: Finished
) -> None:
    done = command("train", config, "training.tokens_per_microbatch=4096")
    assert done.code == 0
    assert "resuming at step 2 of 4" in done.said
    assert any(line.startswith("held out at step 2: accuracy ") for line in done.said)
    weights = "adapter/adapter_model.safetensors"
    ours, theirs = (load_file(folder / weights) for folder in (unfinished, finished.run_dir))
    assert all((ours[name] - theirs[name]).abs().max() < 1e-6 for name in theirs)


def test_a_changed_setting_on_a_finished_run(command: Command, finished: Finished) -> None:
    done = command("train", finished.config, "training.learning_rate=2e-3")
    one_line(
        done,
        WRONG,
        "training.learning_rate: 0.002 here",
        "made with 0.001",
        "give the new run another name",
    )
    assert command("train", finished.config).code == 0


def test_changed_weights_behind_an_unchanged_setting(command: Command, config: Path) -> None:
    base_dir = config.parent / "base"
    shutil.copytree(BASE, base_dir)
    here = ["train", config, f"model.base={base_dir}"]
    assert command(*here).code == 0
    run_dir = config.parent / "storage" / "tiny"
    (run_dir / "result.json").unlink()
    tensors = load_file(base_dir / "model.safetensors")
    save_file(
        {k: v + 1 for k, v in tensors.items()},
        base_dir / "model.safetensors",
        metadata={"format": "pt"},
    )
    one_line(command(*here), WRONG, "model.base: not what run tiny began with")


@pytest.mark.ray
def test_a_run_that_another_process_is_at(command: Command, config: Path) -> None:
    run_dir = config.parent / "storage" / "tiny"
    with locked_elsewhere(run_dir):
        one_line(command("train", config), WRONG, str(run_dir), "another process")
        assert [path.name for path in run_dir.iterdir()] == [".lock"], (
            "its log is not ours to write to"
        )
        # Once it has begun, too: the second command announces where its workers go before it asks
        # for the lock.
        (run_dir / "config.json").write_text("{}")
        one_line(
            command("train", config, "scale.workers=auto"), WRONG, str(run_dir), "another process"
        )
        assert not (run_dir / "run.log").exists()
    (run_dir / "config.json").unlink()
    nothing_in_the_way(command, config)


def test_a_file_where_the_run_should_be(command: Command, config: Path) -> None:
    (config.parent / "storage" / "tiny").write_text("mine")
    one_line(command("train", config), WRONG, "storage", "tiny cannot be written")
    assert (config.parent / "storage" / "tiny").read_text() == "mine"


def test_a_finished_run_whose_prepared_pairs_are_gone(
    command: Command, config: Path, finished: Finished
) -> None:
    storage = config.parent / "storage"
    (storage / "artifacts").unlink()
    shutil.copytree(finished.run_dir, storage / "tiny")
    done = command("train", config)
    assert (done.code, done.said[0].startswith("run tiny is finished")) == (0, True)
    done = command("evaluate", config, "--samples", "0", "--json")
    assert done.code == 0, done.err
    assert done.result["metrics"]["trained"]["all"]["pairs"] == 16


def test_a_run_that_another_process_ends_meanwhile(
    command: Command, config: Path, finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After this one has looked, and before it has the lock."""
    prepare = ground.prepare_run

    def slowly(*arguments: Any) -> Any:
        shutil.copytree(finished.run_dir, config.parent / "storage" / "tiny")
        return prepare(*arguments)

    monkeypatch.setattr(ground, "prepare_run", slowly)
    done = command("train", config)
    assert done.code == 0
    assert done.said[-1].startswith("run tiny is finished")
    assert not any(line.startswith("resuming") for line in done.said)


def test_a_finished_run_whose_adapter_is_gone(
    command: Command, config: Path, finished: Finished
) -> None:
    run_dir = config.parent / "storage" / "tiny"
    shutil.copytree(finished.run_dir, run_dir)
    shutil.rmtree(run_dir / "adapter")
    one_line(command("evaluate", config), WRONG, str(run_dir / "adapter"), "adapter_config.json")


@pytest.mark.parametrize("content", ["", "{"])
@pytest.mark.parametrize("name", ["config.json", "run.json", "result.json"])
def test_a_broken_file_of_the_run(
    command: Command, config: Path, unfinished: Path, name: str, content: str
) -> None:
    (unfinished / name).write_text(content)
    one_line(command("train", config), WRONG, str(unfinished / name))


def test_an_unfinished_run_as_first_stage(command: Command, config: Path, unfinished: Path) -> None:
    done = command("train", config, "name=second", f"adapter.init_from={unfinished}")
    one_line(done, WRONG, str(unfinished), "is the run finished?")
