"""What a micro-batch computes, by hand: the numbers of a base, times its tokens."""

from dataclasses import replace

import pytest

from orpo_ray.planner.engine import Engine
from orpo_ray.planner.hardware import find_gpus
from orpo_ray.planner.memory import Method, MicroBatch
from orpo_ray.planner.shapes import known_shape
from orpo_ray.planner.speed import DEQUANTISED_BYTES

SHAPE = known_shape("meta-llama/Llama-3.1-8B")
assert SHAPE is not None
LAYERS, HIDDEN, INNER, KEYS, VOCABULARY = 32, 4096, 14336, 1024, 128256
LINEAR = LAYERS * (2 * HIDDEN * HIDDEN + 2 * HIDDEN * KEYS + 3 * HIDDEN * INNER)
ADAPTER = LAYERS * 16 * (4 * HIDDEN + 2 * (HIDDEN + KEYS) + 3 * (HIDDEN + INNER))
TOKENS, SCORED, SEEN = 4096, 1500, 2_000_000
BATCH = MicroBatch(tokens=TOKENS, scored=SCORED, seen=SEEN)
SCORES = 4 * HIDDEN * LAYERS * SEEN
"""Queries times keys, and probabilities times values: two products of two flops each."""
(RTX4090,) = find_gpus("rtx4090")


def engine(**changes: object) -> Engine:
    assert SHAPE is not None
    return Engine(SHAPE, replace(Method(checkpointing=False), **changes))  # type: ignore[arg-type]


def test_the_base_has_the_numbers_that_the_hand_counts():
    assert SHAPE is not None
    assert (SHAPE.linear, SHAPE.active, SHAPE.head) == (LINEAR, LINEAR, HIDDEN * VOCABULARY)
    assert SHAPE.lora(16, "all-linear") == ADAPTER


def test_a_frozen_base_is_multiplied_forward_and_backward():
    """No weight gradients: 2 N forward and 2 N backward; the head sees the scored tokens."""
    work = engine().work(BATCH)
    head = 4 * HIDDEN * VOCABULARY * SCORED
    assert work.half_flops == 4 * LINEAR * TOKENS + 6 * ADAPTER * TOKENS + head
    assert work.float_flops == 0
    assert work.attention_flops == 3.5 * SCORES
    assert work.dequantised == 2 * LINEAR * DEQUANTISED_BYTES
    assert work.launches == 3 * LAYERS


def test_recomputing_is_one_more_forward_pass_of_the_layers():
    kept, again = engine().work(BATCH), engine(checkpointing=True).work(BATCH)
    assert again.half_flops - kept.half_flops == 2 * (LINEAR + ADAPTER) * TOKENS
    assert again.attention_flops - kept.attention_flops == SCORES
    assert again.launches == 4 * LAYERS
    assert again.traffic > kept.traffic


def test_whole_training_has_the_gradients_of_weights_besides():
    """6 N for each token, 8 N with recomputing; the loss makes a trained head's logits again."""
    whole = {"rank": None, "quantization": "none"}
    head = 2 * 4 * HIDDEN * VOCABULARY * SCORED
    assert engine(**whole).work(BATCH).half_flops == 6 * LINEAR * TOKENS + head
    again = engine(**whole, checkpointing=True).work(BATCH).half_flops
    assert again == 8 * LINEAR * TOKENS + head
    assert engine(**whole).work(BATCH).dequantised == 0


@pytest.mark.parametrize("checkpointing", [True, False])
def test_the_forward_pass_alone_is_one_product_of_each(checkpointing):
    work = engine(checkpointing=checkpointing).work(BATCH, training=False)
    head = 2 * HIDDEN * VOCABULARY * SCORED
    assert work.half_flops == 2 * (LINEAR + ADAPTER) * TOKENS + head
    assert (work.attention_flops, work.launches) == (SCORES, LAYERS)
    assert work.dequantised == LINEAR * DEQUANTISED_BYTES


def test_float32_is_counted_at_the_rate_of_float32_and_takes_longer():
    half, whole = engine(quantization="none"), engine(quantization="none", half=False)
    assert whole.work(BATCH).half_flops == 0
    assert whole.work(BATCH).float_flops == half.work(BATCH).half_flops
    assert whole.seconds(BATCH, RTX4090).middle > 1.5 * half.seconds(BATCH, RTX4090).middle


def test_seconds_go_from_the_fast_end_to_the_slow_one_and_grow_with_tokens():
    took = engine().seconds(BATCH, RTX4090)
    assert 0 < took.low < took.middle < took.high
    double = MicroBatch(tokens=2 * TOKENS, scored=2 * SCORED, seen=2 * SEEN)
    more = engine().seconds(double, RTX4090)
    assert took.middle < more.middle <= 2 * took.middle
    assert engine().seconds(BATCH, RTX4090, training=False).middle < took.middle / 2


def test_the_optimizer_moves_28_bytes_a_number_and_zero_shares_them_out():
    assert engine().step_seconds(RTX4090) == 28 * ADAPTER / RTX4090.bandwidth
    shared = engine(workers=4, stage=2).step_seconds(RTX4090)
    assert shared == pytest.approx(engine().step_seconds(RTX4090) / 4)
    assert engine(workers=4, stage=0).step_seconds(RTX4090) == engine().step_seconds(RTX4090)


def test_the_reason_says_whether_anyone_has_measured_the_gpu():
    assert not engine().reason(RTX4090)[1]
    reason, is_unmeasured = engine().reason(find_gpus("b200")[0])
    assert is_unmeasured and "uncertain" in reason
