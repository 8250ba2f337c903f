"""A loss, a gradient or an evaluation that is no number ends the run before the optimizer touches a
weight.
"""

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from poison import Poison, find_poison, poisoned_base, step_pairs, tokens_of
from safetensors.torch import load_file, save_file
from support import (
    ENVIRONMENT,
    read_metrics,
    remember_trainers,
    run_config,
    settings,
    train_locally,
)
from torch import Tensor

from orpo_ray import api
from orpo_ray.config import RunConfig
from orpo_ray.data.store import Artifact
from orpo_ray.errors import NonFiniteError
from orpo_ray.objectives import Objective, PairLogps, build_objective
from orpo_ray.runs.console import SILENT
from orpo_ray.training import loop
from orpo_ray.training.trainer import PreferenceTrainer

pytestmark = pytest.mark.ray

BAD_STEP = 3
EVERY_STEP = {"checkpoint_every": 1, "keep": 20}


@pytest.fixture(scope="module")
def artifact(prepared_storage: Path) -> Artifact:
    """The pairs of the shared storage, found there."""
    config = run_config(prepared_storage)
    return api.prepare(config, SILENT)


@pytest.fixture
def trainers(monkeypatch: pytest.MonkeyPatch) -> list[PreferenceTrainer]:
    """Fills with the trainers that runs make, so that their live weights can be looked at after a
    failure.
    """
    return remember_trainers(monkeypatch)


def assert_stopped(
    error: NonFiniteError, what: str, config: RunConfig, artifact: Artifact, step: int
) -> None:
    """The message names the step and its very pairs; later steps were not trained."""
    ids = artifact.train.pair_ids
    line = str(error)
    assert line.startswith(f"the {what} of step {step} is not finite")
    named = line.split("Its pairs: ")[1].split(". Look")[0].split(", ")
    assert named == [ids[i] for i in step_pairs(config, artifact, step)]
    assert [
        record["step"] for record in read_metrics(config.run_dir) if "train/loss" in record
    ] == list(range(1, step))
    assert not (config.run_dir / "result.json").exists()


def assert_untouched(trainer: PreferenceTrainer, config: RunConfig, step: int) -> None:
    """Live adapter and optimizer state are, bit for bit, what the checkpoint of the step before
    holds.
    """
    saved = load_file(config.run_dir / "checkpoints" / f"step-{step - 1:06d}" / "state.safetensors")
    model = trainer.accelerator.unwrap_model(trainer.model)
    trained = {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    assert len(trained) == 56
    for name, parameter in trained.items():
        assert torch.equal(parameter, saved[f"{name}/master"]), name
        live: dict[str, Tensor] = trainer.optimizer.optimizer.state[parameter]
        assert torch.equal(live["exp_avg"], saved[f"{name}/exp_avg"]), name
        assert int(live["step"]) == step - 1


# --- the forward pass -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def poison(artifact: Artifact) -> Poison:
    return find_poison(run_config(Path("unused")), artifact)


@pytest.fixture(scope="module")
def poisoned(poison: Poison, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return poisoned_base(tmp_path_factory.mktemp("base"), poison.token)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_loss_that_is_no_number_stops_before_the_optimizer(
    quantization: str,
    artifact: Artifact,
    poison: Poison,
    poisoned: Path,
    trainers: list[PreferenceTrainer],
    tmp_path: Path,
) -> None:
    config = run_config(
        tmp_path, model={"base": str(poisoned), "quantization": quantization}, training=EVERY_STEP
    )
    with pytest.raises(NonFiniteError) as caught:
        train_locally(config, artifact)
    assert artifact.train.pair_ids[poison.pair] in str(caught.value)
    assert_stopped(caught.value, "loss", config, artifact, poison.step)
    assert_untouched(trainers[0], config, poison.step)


def test_an_infinite_reference_stops_at_the_step_that_reads_it(
    artifact: Artifact, trainers: list[PreferenceTrainer], tmp_path: Path
) -> None:
    dpo = {"kind": "dpo"}
    train_locally(
        run_config(
            tmp_path, "fills-the-cache", objective=dpo, training={"max_steps": 1, "warmup": 0}
        ),
        artifact,
    )
    (cached,) = (tmp_path / "references").iterdir()
    log_probs = load_file(cached)["log_probs"]
    config = run_config(tmp_path, objective=dpo, training=EVERY_STEP)
    log_probs[step_pairs(config, artifact, BAD_STEP)[0], 1] = -float("inf")
    save_file({"log_probs": log_probs}, cached)
    with pytest.raises(NonFiniteError) as caught:
        train_locally(config, artifact)
    assert_stopped(caught.value, "loss", config, artifact, BAD_STEP)
    assert_untouched(trainers[-1], config, BAD_STEP)


# --- the backward pass ----------------------------------------------------------------------------


def root_of_zero(chosen: Tensor) -> Tensor:
    """Zero, with a gradient of 0 times infinity."""
    return (chosen - chosen.detach()).abs().sqrt()


def vertical(chosen: Tensor) -> Tensor:
    """Zero, with an infinite gradient."""
    return (chosen - chosen.detach()) * 3e38 * 3e38


@pytest.mark.parametrize(("extra", "max_grad_norm"), [(root_of_zero, 1.0), (vertical, 0.0)])
def test_a_gradient_that_is_no_number_stops_before_the_optimizer_though_the_loss_is_finite(
    extra: Callable[[Tensor], Tensor],
    max_grad_norm: float,
    artifact: Artifact,
    trainers: list[PreferenceTrainer],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(
        loop, "build_objective", lambda config: breaking(build_objective(config), extra)
    )
    # Nothing is left to find from memory, so that each call of the objective is a step.
    fixed = {"tokens_per_microbatch": 10_000, "gradient_checkpointing": False}
    config = run_config(tmp_path, training={**EVERY_STEP, **fixed, "max_grad_norm": max_grad_norm})
    with pytest.raises(NonFiniteError) as caught:
        train_locally(config, artifact)
    assert_stopped(caught.value, "gradient", config, artifact, BAD_STEP)
    assert_untouched(trainers[0], config, BAD_STEP)


def breaking(objective: Objective, extra: Callable[[Tensor], Tensor]) -> Objective:
    """The objective with something added to its preference term at the BAD_STEP-th call."""
    calls = 0
    plain = objective.preference
    assert plain is not None

    def preference(pairs: PairLogps) -> Tensor:
        nonlocal calls
        calls += 1
        loss = plain(pairs) + (extra(pairs.chosen) if calls == BAD_STEP else 0.0)
        assert torch.isfinite(loss).all()
        return loss

    return replace(objective, preference=preference)


# --- the evaluation -------------------------------------------------------------------------------


def test_an_evaluation_that_is_no_number_stops_and_names_its_pairs(
    artifact: Artifact, tmp_path: Path
) -> None:
    trained = set().union(*(tokens_of(pair) for pair in artifact.train))
    counts = Counter(token for pair in artifact.eval for token in tokens_of(pair))
    token = next(
        token
        for token, count in counts.items()
        if token not in trained and count < len(artifact.eval)
    )
    config = run_config(tmp_path, model={"base": str(poisoned_base(tmp_path / "base", token))})
    with pytest.raises(NonFiniteError) as caught:
        train_locally(config, artifact)
    bad = [pair.pair_id for pair in artifact.eval if token in tokens_of(pair)]
    expected = (
        f"the evaluation at step 0 is not finite: {len(bad)} pairs, such as {', '.join(bad)}. "
    )
    assert str(caught.value).startswith(expected)


# --- the command ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_ends_with_code_1_and_one_line(
    prepared_storage: Path, artifact: Artifact, poison: Poison, poisoned: Path
) -> None:
    tree = settings(prepared_storage, "poisoned", model={"base": str(poisoned)})
    path = prepared_storage / "poisoned.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "orpo_ray.cli.main", "train", str(path), "--json"],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "Traceback" not in done.stdout
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"orpo-ray: the loss of step {poison.step} is not finite")
    assert artifact.train[poison.pair].pair_id in last
    assert last.endswith(f"(full log: {prepared_storage / 'poisoned' / 'run.log'})")
    assert "NonFiniteError" in (prepared_storage / "poisoned" / "run.log").read_text(
        encoding="utf-8"
    )
    answer = json.loads(done.stdout)
    assert answer["exit_code"] == 1
    assert answer["error"].startswith(f"the loss of step {poison.step} is not finite")
    page = (prepared_storage / "poisoned" / "report.html").read_text(encoding="utf-8")
    why = f"It ended before its last step: the loss of step {poison.step} is not finite"
    assert why in page, "a run that failed has a page, which says why"
