"""The time of a micro-batch, by hand."""

from dataclasses import replace
from typing import Any

import pytest
from test_planner_stock import (
    HIDDEN,
    INNER,
    LAYERS,
    LINEAR,
    LORA,
    MIXTURE,
    TOKENS,
    VOCABULARY,
    training,
)

from orpo_ray.planner.hardware import load_gpus
from orpo_ray.planner.published import find_base, make_base
from orpo_ray.planner.speed import Speed, Work, count_work, predict_speed
from orpo_ray.planner.stock import NF4, Training

HEAD = 4 * HIDDEN * VOCABULARY * TOKENS
GPUS = load_gpus()


def mistral(**changes: Any) -> Training:
    base = find_base("mistralai/Mistral-7B-v0.1")
    assert base is not None
    return training(base=base, batch=4, sequence=4096, autocast=True, attention="flash2", **changes)


def speed(run: Training, gpu: str = "a100-80") -> Speed:
    return predict_speed(count_work(run), GPUS[gpu], 3e11)


def test_flops_of_lora_with_checkpointing() -> None:
    """Two forward passes and one backward pass to the inputs; four products of an adapter."""
    work = count_work(training(autocast=True))
    assert work.half_flops == 6 * LINEAR * TOKENS + HEAD + 8 * LORA * TOKENS
    assert work.float_flops == 0


def test_flops_without_checkpointing() -> None:
    work = count_work(training(autocast=True, checkpointing=False))
    assert work.half_flops == 4 * LINEAR * TOKENS + HEAD + 6 * LORA * TOKENS


def test_flops_of_all_weights_have_their_gradients() -> None:
    work = count_work(training(autocast=True, rank=0, targets=()))
    assert work.half_flops == 8 * LINEAR * TOKENS + HEAD + HEAD / 2


def test_without_autocast_float32_weights_are_multiplied_in_float32() -> None:
    adapters = 8 * LORA * TOKENS
    assert count_work(training()).float_flops == adapters
    assert count_work(training(stream=4)).float_flops == adapters + HEAD
    assert count_work(training(trained_bytes=2)).float_flops == 0


def test_a_token_meets_its_experts_only_but_all_are_dequantised() -> None:
    dense = count_work(training(autocast=True, weights=NF4))
    mixture = count_work(training(autocast=True, weights=NF4, base=make_base(MIXTURE)))
    mlp = LAYERS * 3 * HIDDEN * INNER
    assert mixture.half_flops - dense.half_flops == 6 * mlp * TOKENS
    assert mixture.dequantised - dense.dequantised == 3 * 7 * mlp * 2.5


def test_eager_attention_does_twice_the_products_and_moves_the_scores() -> None:
    sdpa, eager = (count_work(training(attention=name)) for name in ("sdpa", "eager"))
    assert eager.attention_flops == 2 * sdpa.attention_flops
    assert eager.traffic > sdpa.traffic


def test_fsdp_gathers_the_other_gpus_weights_in_each_pass() -> None:
    work = count_work(training(gpus=4, sharded=True))
    assert work.gathered == 3 * 2 * LINEAR * 3 / 4
    assert count_work(training()).gathered == 0


def test_the_parts_add_up() -> None:
    work = Work(
        tokens=1000,
        half_flops=220e12,
        float_flops=0.0,
        attention_flops=0.0,
        traffic=0.8 * 2039e9,
        dequantised=0.5 * 2039e9,
        dequantisation=0.5,
        launches=10,
        gathered=62e9,
    )
    found = predict_speed(work, GPUS["a100-80"], 3e11)
    assert found.middle == pytest.approx(1000 / 4)
    assert found.low == pytest.approx(1000 / (3 * 1.2 + 2 * 1))
    assert found.high == pytest.approx(1000 / (3 / 1.2))
    assert found.seconds["launch"] == pytest.approx(0.016)
    assert found.reason.endswith("gathering may hide behind computing, or take 2 times as long")


def test_few_tokens_wait_for_python() -> None:
    small = replace(mistral(), batch=1, sequence=64)
    found = speed(small)
    assert found.middle == pytest.approx(64 / found.seconds["launch"])
    rates = [speed(replace(small, sequence=length)).middle for length in (64, 128, 1024)]
    assert rates[0] < rates[1] < rates[2]


def test_quantised_weights_and_a_float32_stream_cost_time() -> None:
    plain = speed(mistral())
    quantised = speed(mistral(weights=NF4))
    stock = speed(mistral(weights=NF4, stream=4))
    assert stock.middle < quantised.middle < plain.middle


def test_a_gpu_that_nobody_measured_is_uncertain() -> None:
    known, unknown = speed(mistral()), speed(mistral(), "rtx5090")
    assert not known.is_uncertain
    assert unknown.is_uncertain
    assert unknown.reason.startswith("uncertain: nobody has published")
    assert unknown.high / unknown.low > known.high / known.low


def test_a_gpu_of_few_rows_has_a_wider_interval() -> None:
    found = speed(mistral(), "h100-sxm")
    assert found.high / found.low == pytest.approx(1.35**2)
    assert not found.is_uncertain


def test_names_are_matched_whole() -> None:
    """An L40S is no L40."""
    assert speed(mistral(), "l40s").is_uncertain
    assert not speed(mistral(), "l40").is_uncertain
