"""What fits by the planner: it decides as a run does, with predicted memory."""

from pathlib import Path
from typing import Any

import pytest

import orpo_ray
from orpo_ray.api.planning import Estimate
from orpo_ray.errors import ConfigError
from orpo_ray.planner import plan
from orpo_ray.planner.advice import advise
from orpo_ray.planner.plan import GpuPlan
from orpo_ray.training import setup

ROOT = Path(__file__).resolve().parents[2]


def planned(storage: Path, example: str, *overrides: str, **options: Any) -> Estimate:
    config = orpo_ray.load_config(ROOT / "examples" / example, [f"storage={storage}", *overrides])
    return orpo_ray.estimate(config, console=orpo_ray.Console(), **options)


def test_sizes_of_micro_batches_are_those_of_a_run() -> None:
    untried = {"cpu": setup._AUTO_TOKENS_CPU, "cuda": setup._AUTO_TOKENS_GPU}
    assert untried == plan._UNTRIED_TOKENS


def test_shared_weights_leave_room_only_beside_gradients_and_moments(tmp_path: Path) -> None:
    """Of 16 bytes a parameter each of four workers has 27 GiB, more than an RTX 4090."""
    (small,) = planned(tmp_path, "mistral-7b-paper/orpo.yaml", gpu="rtx4090").gpus
    state = sum(small.worst.fit.parts[part] for part in ("adapter", "gradients", "optimizer"))
    assert state == pytest.approx(16 * 7.24e9 / 4, rel=0.001)
    assert not small.fits and small.worst.fit.missing > state - small.gpu.memory
    (large,) = planned(tmp_path, "mistral-7b-paper/orpo.yaml", gpu="a100-80").gpus
    assert large.fits


def test_a_micro_batch_that_is_set_must_fit(tmp_path: Path) -> None:
    example, tokens = "mistral-7b-orpo/orpo.yaml", "training.tokens_per_microbatch"
    (fitting,) = planned(tmp_path, example, f"{tokens}=20000", gpu="rtx4090").gpus
    assert fitting.fits and fitting.worst.fit.tokens == 20_000
    (large,) = planned(tmp_path, example, f"{tokens}=60000", gpu="rtx4090").gpus
    assert not large.fits and large.worst.fit.missing > 0
    assert large.change == f"{tokens}=auto"


@pytest.mark.parametrize(
    ("example", "overrides"),
    [
        ("kto-thumbs/kto.yaml", []),
        ("mistral-7b-paper/orpo.yaml", ["scale={deepspeed: {stage: 3}, workers: 4}"]),
    ],
)
def test_a_run_that_tries_no_micro_batch_takes_the_usual_one(
    tmp_path: Path, example: str, overrides: list[str]
) -> None:
    (found,) = planned(tmp_path, example, *overrides, gpu="h200").gpus
    assert found.fits and found.worst.fit.tokens == 4096 and found.worst.fit.method.checkpointing


def test_pairs_that_are_too_long_are_not_counted(tmp_path: Path) -> None:
    """Five of six assumed lengths are below 1,024 tokens, of a seeded fifth of 61,135 rows."""
    lengths = planned(tmp_path, "qwen-0.5b-rtx3050/orpo.yaml", gpu="rtx3050").paper.lengths
    assert lengths.pairs == round(12_227 * 5 / 6) and lengths.held_out == round(512 * 5 / 6)
    assert "; 12,227 rows by what the config and the card of the data set say, 83% of them " in (
        lengths.source
    )


def test_held_out_pairs_that_nobody_counts_are_said(tmp_path: Path) -> None:
    example, overrides = "mistral-7b-orpo/orpo.yaml", "data.eval=someone/unknown"
    lengths = planned(tmp_path, example, overrides, gpu="l4").paper.lengths
    assert lengths.held_out == 0 and "none held out, because nobody knows" in lengths.source


def test_single_answers_are_advised_what_reads_them(tmp_path: Path) -> None:
    assert planned(tmp_path, "kto-thumbs/kto.yaml", gpu="l4").advice.method == "KTO"
    assert advise(60_000, False).method == "ORPO"


@pytest.mark.parametrize(
    "overrides",
    [
        ("model.quantization=none", "adapter.init=pissa", "adapter.dropout=0"),
        ("model.quantization=none", "adapter.init=olora", "adapter.dropout=0"),
        ("training.engine=trl", "objective.nll_on=full"),
    ],
)
def test_a_road_that_cannot_be_taken_stops_no_plan(tmp_path: Path, overrides: Any) -> None:
    found = planned(tmp_path, "mistral-7b-orpo/orpo.yaml", *overrides, gpu="h200")
    assert found.fits and found.advice.method == "ORPO"


def test_a_base_that_is_not_known_cannot_be_planned(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text('{"model_type": "unheard-of"}', "utf-8")
    with pytest.raises(orpo_ray.CannotTellError):
        planned(tmp_path, "mistral-7b-orpo/orpo.yaml", f"model.base={tmp_path / 'base'}", gpu="l4")


def on(gpu: str, base: str = "mistralai/Mistral-7B-v0.1", **settings: str) -> GpuPlan:
    written = [f"{key.replace('__', '.')}={value}" for key, value in settings.items()]
    config = orpo_ray.load_config(
        {
            "name": "p",
            "model": {"base": base},
            "data": {"train": [{"source": "owner/pairs", "limit": 10000}]},
        },
        written,
    )
    return orpo_ray.estimate(config, gpu, console=orpo_ray.Console()).gpus[0]


def test_a_shorter_length_that_is_named_fits() -> None:
    base = "meta-llama/Llama-3.1-8B"
    asked = on("rtx3050", base, data__max_length="100000")
    assert not asked.fits and asked.change.startswith("data.max_length=")
    length = asked.change.removeprefix("data.max_length=").partition(" ")[0]
    assert on("rtx3050", base, data__max_length=length).fits


def test_every_worker_holds_a_quantised_base_whole() -> None:
    settings = {"scale__deepspeed": "{stage: 3}", "scale__workers": "8"}
    assert not on("rtx4090", "meta-llama/Llama-2-70b-hf", **settings).fits


def test_a_gpu_without_bfloat16_does_not_take_it() -> None:
    refused = on("t4", model__dtype="bfloat16")
    assert not refused.fits and refused.change == "model.dtype=auto"


def test_pairs_that_the_base_does_not_read_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"gpt2 reads 1024; set data\.max_length=1024"):
        on("t4", "gpt2", data__max_length="8192")


def test_activations_are_recomputed_if_set_tokens_need_it() -> None:
    found = on("a100-80", training__tokens_per_microbatch="60000")
    assert found.fits and found.worst.fit.method.checkpointing


def test_parts_add_up_to_no_more_than_the_gpu() -> None:
    plan = on("rtx4090")
    parts = plan.worst.fit.parts
    total = sum(parts.values()) - min(parts["layer"], parts["head"])
    assert total == pytest.approx(plan.worst.fit.peak.middle) and total <= plan.gpu.memory


def test_workers_that_the_config_sets_are_those_that_are_planned() -> None:
    with pytest.raises(ConfigError, match=r"set scale\.workers=4, or leave --count out"):
        config = orpo_ray.load_config(
            {"name": "p", "model": {"base": "gpt2"}, "data": {"train": ["owner/pairs"]}},
            ["scale.workers=2", "data.max_length=1024"],
        )
        orpo_ray.estimate(config, "l4", count=4, console=orpo_ray.Console())
