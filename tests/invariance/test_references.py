"""The reference of DPO and IPO is the model that training starts from.

Its log-probs are computed once for all runs that share it.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.numpy import load_file
from support import BASE, StopsAfter, Trained, make_artifact, run_config, train_locally
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from orpo_ray import api
from orpo_ray.data.store import Artifact, PairTable
from orpo_ray.errors import StoppedError
from orpo_ray.runs.console import SILENT
from orpo_ray.runs.run import Run

DPO = {"kind": "dpo"}
COMPUTED, REUSED = (
    "reference log-probs: computing them once for 36 pairs",
    "reference log-probs: reused from",
)


def train(
    storage: Path, artifact: Artifact, name: str, objective: dict[str, Any], **sections: Any
) -> Trained:
    """Train two steps, without dropout by default.

    Activations are kept, so that no memory must be measured.
    """
    adapter = {"dropout": 0.0, **sections.pop("adapter", {})}
    training = {
        "max_steps": 2,
        "pairs_per_step": 4,
        "eval_every": 2,
        "checkpoint_every": 2,
        "warmup": 0,
    }
    training["gradient_checkpointing"] = False
    config = run_config(
        storage, name, objective=objective, adapter=adapter, training=training, **sections
    )
    return train_locally(config, artifact)


@pytest.fixture(scope="module")
def sft(artifact: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a short supervised stage, under NF4."""
    return train(tmp_path_factory.mktemp("sft"), artifact, "sft", {"kind": "sft"}).run_dir


def cached(storage: Path) -> list[Path]:
    return sorted((storage / "references").iterdir())


# --- implicit rewards start at zero ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "objective", "expected"),
    [
        ("fresh", {"kind": "dpo", "beta": 0.5}, math.log(2)),
        ("fresh-dora", {"kind": "dpo", "beta": 0.5}, math.log(2)),
        ("sft", {"kind": "dpo", "beta": 0.5, "label_smoothing": 0.2}, math.log(2)),
        ("fresh", {"kind": "ipo", "beta": 0.25}, 4.0),
        ("sft", {"kind": "ipo", "beta": 0.25, "log_probs": "token-mean"}, 4.0),
    ],
)
def test_the_first_loss_is_that_of_implicit_rewards_of_zero(
    start: str,
    objective: dict[str, Any],
    expected: float,
    artifact: Artifact,
    sft: Path,
    tmp_path: Path,
) -> None:
    adapter: dict[str, Any] = {
        "fresh": {},
        "fresh-dora": {"dora": True},
        "sft": {"init_from": str(sft)},
    }[start]
    trained = train(tmp_path, artifact, "aligned", objective, adapter=adapter)
    # A pack of the reference has other pairs than one of training, so sums differ by roundings.
    assert trained.losses[0] == pytest.approx(expected, abs=1e-5)
    assert trained.losses[-1] != pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_the_first_loss_is_the_same_under_every_quantisation(
    quantization: str, artifact: Artifact, tmp_path: Path
) -> None:
    trained = train(tmp_path, artifact, "aligned", DPO, model={"quantization": quantization})
    assert trained.losses[0] == pytest.approx(math.log(2), abs=1e-6)


def test_the_reference_is_the_sft_adapter_and_not_the_base(
    artifact: Artifact, sft: Path, tmp_path: Path
) -> None:
    """Compared with log-probs that transformers and PEFT compute pair by pair from full logits."""
    train(tmp_path, artifact, "aligned", DPO, adapter={"init_from": str(sft)})
    (file,) = cached(tmp_path)
    reference = load_file(file)["log_probs"]
    base = plain_base("nf4")
    without = plain_log_probs(base, artifact.train)
    adapted = plain_log_probs(PeftModel.from_pretrained(base, sft / "adapter"), artifact.train)
    np.testing.assert_allclose(reference, adapted, rtol=1e-5)
    assert np.abs(reference - without).max() > 0.05


def test_dropout_does_not_disturb_a_start_from_an_adapter(
    artifact: Artifact, sft: Path, tmp_path: Path
) -> None:
    """Dropout must be off in the start-up check of the head, and in the reference."""
    for name, dropout in (("without", 0.0), ("with", 0.5)):
        train(
            tmp_path / name,
            artifact,
            "aligned",
            DPO,
            adapter={"init_from": str(sft), "dropout": dropout},
        )
    without, with_dropout = (
        load_file(cached(tmp_path / name)[0])["log_probs"] for name in ("without", "with")
    )
    np.testing.assert_array_equal(without, with_dropout)


# --- computed once --------------------------------------------------------------------------------


def computed(trained: Trained) -> bool:
    """Whether the run announced that it computed its reference log-probs."""
    said = [line for line in trained.said if line.startswith("reference log-probs")]
    assert len(said) == 1
    assert said[0] == COMPUTED or said[0].startswith(REUSED)
    return said[0] == COMPUTED


def test_runs_that_share_a_reference_compute_it_once(artifact: Artifact, tmp_path: Path) -> None:
    """Another beta, another objective or another rank does not change the reference."""
    assert computed(train(tmp_path, artifact, "first", DPO))
    assert not computed(train(tmp_path, artifact, "second", {"kind": "dpo", "beta": 0.3}))
    assert not computed(train(tmp_path, artifact, "third", {"kind": "ipo"}, adapter={"r": 4}))
    assert len(cached(tmp_path)) == 1


def test_the_reference_is_computed_again_if_an_input_changes(
    artifact: Artifact, sft: Path, tmp_path: Path
) -> None:
    assert computed(train(tmp_path, artifact, "first", DPO))
    other_data = make_artifact(tmp_path / "other", train=35)
    changed: list[dict[str, Any]] = [
        {"model": {"quantization": "none"}},
        {"model": {"dtype": "bfloat16"}},
        {"model": {"attention": "eager"}},
        {"adapter": {"init_from": str(sft)}},
    ]
    for number, sections in enumerate(changed):
        assert computed(train(tmp_path, artifact, f"changed-{number}", DPO, **sections)), sections
    said = train(tmp_path, other_data, "other-data", DPO).said
    assert "reference log-probs: computing them once for 35 pairs" in said
    assert len(cached(tmp_path)) == len(changed) + 2


def test_objectives_without_a_reference_compute_none(artifact: Artifact, tmp_path: Path) -> None:
    train(tmp_path, artifact, "orpo", {"kind": "orpo"})
    assert not (tmp_path / "references").exists()


def test_a_damaged_cache_is_announced_and_made_again(artifact: Artifact, tmp_path: Path) -> None:
    """tests/unit/test_reference.py has more kinds of damage."""
    first = train(tmp_path, artifact, "first", DPO)
    (file,) = cached(tmp_path)
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    second = train(tmp_path, artifact, "second", DPO)
    assert any(
        line.startswith(f"the cached reference log-probs {file.name} are damaged")
        for line in second.said
    )
    assert computed(second)
    assert second.losses == first.losses
    assert [path.read_bytes() for path in cached(tmp_path)] == [whole]


# --- the result, seen from outside ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("quantization", "adapter"),
    [("none", {}), ("nf4", {}), ("none", {"dora": True}), ("none", {"kind": "none"})],
)
def test_plain_peft_loads_the_result_and_finds_the_same_log_probs(
    quantization: str, adapter: dict[str, Any], artifact: Artifact, tmp_path: Path
) -> None:
    trained = train(
        tmp_path,
        artifact,
        "trained",
        {"kind": "orpo"},
        model={"quantization": quantization},
        adapter=adapter,
    )
    folder = trained.run_dir / "adapter"
    if adapter.get("kind") == "none":
        model = AutoModelForCausalLM.from_pretrained(folder)
    else:
        model = PeftModel.from_pretrained(plain_base(quantization), folder)
    log_probs = plain_log_probs(model, artifact.eval)
    means = log_probs / artifact.eval.lengths[:, 1:]
    reported = trained.result["metrics"]
    assert reported["eval/chosen_logp"] == pytest.approx(means[:, 0].mean(), rel=1e-5)
    assert reported["eval/rejected_logp"] == pytest.approx(means[:, 1].mean(), rel=1e-5)
    assert reported["eval/accuracy"] == (means[:, 0] > means[:, 1]).mean()
    before = trained.metrics[0]
    assert before["eval/chosen_logp"] != pytest.approx(reported["eval/chosen_logp"], rel=1e-3), (
        "nothing was learned"
    )


def plain_base(quantization: str) -> PreTrainedModel:
    """The demo base as transformers loads it.

    It is not repacked, because that would change its numbers on some CPUs.
    """
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    config = nf4 if quantization == "nf4" else None
    model = AutoModelForCausalLM.from_pretrained(
        BASE, quantization_config=config, dtype=torch.float32
    )
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


@torch.no_grad()
def plain_log_probs(model: torch.nn.Module, table: PairTable) -> np.ndarray:
    """Summed log-probs [n, 2] of both answers, one row at a time and unpadded."""
    model.eval()
    sums = np.zeros((len(table), 2))
    for index, pair in enumerate(table):
        for side, answer in enumerate((pair.chosen, pair.rejected)):
            ids = torch.from_numpy(np.concatenate([pair.prompt, answer]).astype(np.int64))
            log_probs = model(input_ids=ids[None]).logits[0].float().log_softmax(-1)
            predicted = log_probs[len(pair.prompt) - 1 : -1].gather(
                -1, ids[len(pair.prompt) :, None]
            )
            sums[index, side] = predicted.sum().item()
    return sums


def test_trls_rewards_are_gains_since_the_start_after_a_resume_too(tmp_path: Path) -> None:
    training = {"max_steps": 4, "eval_every": 2, "checkpoint_every": 2, "trl_metric_names": True}
    config = run_config(tmp_path, objective=DPO, training=training)
    with pytest.raises(StoppedError):
        api.train(config, StopsAfter(2))
    api.train(config, SILENT)
    shown: dict[str, dict[int, float]] = {}
    for folder in (tmp_path / "run" / "tensorboard").iterdir():
        events = EventAccumulator(str(folder)).Reload()
        for name in events.Tags()["scalars"]:
            shown.setdefault(name, {}).update({e.step: e.value for e in events.Scalars(name)})
    held_out, trained = shown["eval/rewards/margins"], shown["train/rewards/margins"]
    assert sorted(held_out) == [0, 2, 4] and sorted(trained) == [1, 2, 3, 4]
    assert held_out[0] == 0 and held_out[2] != 0 and held_out[4] != 0
    scores = [Run(config).scores(step) for step in (0, 4)]
    gains = [after - before for before, after in zip(*map(_margins, scores), strict=True)]
    assert held_out[4] == pytest.approx(0.1 * np.mean(gains), rel=1e-4)


def _margins(scores: Any) -> np.ndarray:
    return scores.chosen - scores.rejected
