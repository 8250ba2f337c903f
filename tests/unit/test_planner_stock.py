"""Memory terms of the stock engine, by hand for a tiny base."""

from dataclasses import replace
from typing import Any

import pytest

from orpo_ray.errors import ConfigError
from orpo_ray.planner.published import base_of_size, find_base, make_base
from orpo_ray.planner.stock import (
    CUBLAS_WORKSPACE,
    GPTQ,
    LITGPT,
    NF4,
    NF4_DOUBLE,
    SIXTEEN_BITS,
    STOCK,
    STOCK_2024,
    Peak,
    Training,
    device_bytes,
    predict_peak,
    reserved_bytes,
    weight_bytes,
)

LAYERS, HIDDEN, INNER, VOCABULARY = 3, 8, 20, 50
SIZES: dict[str, Any] = {
    "layers": LAYERS,
    "hidden": HIDDEN,
    "intermediate": INNER,
    "heads": 2,
    "kv_heads": 1,
    "vocabulary": VOCABULARY,
    "tied": False,
}
LINEAR = LAYERS * (2 * 8 * 8 + 2 * 8 * 4 + 3 * 8 * 20)
OTHERS = 2 * 50 * 8 + (2 * LAYERS + 1) * 8
RANK = 4
LORA = RANK * LAYERS * (2 * (8 + 8) + 2 * (8 + 4))
BATCH, SEQUENCE = 40, 5
TOKENS = BATCH * SEQUENCE
MIXTURE = SIZES | {"experts": 8, "active_experts": 2}


def training(**changes: Any) -> Training:
    """LoRA on attention in 16 bits, float32 adapters, no autocast, checkpointing, SDPA."""
    usual = Training(
        base=make_base(SIZES),
        stack=STOCK,
        weights=SIXTEEN_BITS,
        rank=RANK,
        targets=("q_proj", "k_proj", "v_proj", "o_proj"),
        batch=BATCH,
        sequence=SEQUENCE,
        checkpointing=True,
        attention="sdpa",
        stream=2,
        autocast=False,
        trained_bytes=4,
        state_bytes=8,
    )
    return replace(usual, **changes)


def test_counts_of_a_base() -> None:
    base = make_base(SIZES)
    assert (base.linear, base.others, base.total) == (LINEAR, OTHERS, LINEAR + OTHERS)
    assert base.active == LINEAR
    assert base.head == 400
    assert base.lora(RANK, ("q_proj", "k_proj", "v_proj", "o_proj")) == LORA


def test_one_token_passes_two_of_eight_experts() -> None:
    base, dense = make_base(MIXTURE), make_base(SIZES)
    mlp = LAYERS * 3 * 8 * 20
    assert base.linear == dense.linear + 7 * mlp
    assert base.active == dense.linear + mlp


@pytest.mark.parametrize(
    ("model", "billions"),
    [
        ("mistralai/Mistral-7B-v0.1", 7.241732),
        ("mistralai/Mixtral-8x7B-Instruct-v0.1", 46.702793),
        ("meta-llama/Llama-2-70b-hf", 68.976648),
        ("meta-llama/Llama-3.2-3B", 3.21275),
        ("HuggingFaceTB/SmolLM2-135M", 0.134515),
        ("Qwen/Qwen-14B-Chat", 14.167291),
    ],
)
def test_the_table_has_the_published_numbers_of_parameters(model: str, billions: float) -> None:
    base = find_base(model)
    assert base is not None
    assert base.total / 1e9 == pytest.approx(billions, rel=2e-3)


def test_a_base_of_unknown_sizes_has_its_number_of_parameters() -> None:
    assert base_of_size(5e9).total == pytest.approx(5e9, rel=1e-3)
    assert find_base("someone/unknown") is None


def test_a_target_that_names_no_layer_is_refused() -> None:
    with pytest.raises(ConfigError, match="targets: c_attn is none of q_proj"):
        make_base(SIZES).lora(RANK, ("c_attn",))


@pytest.mark.parametrize(
    ("weights", "stream", "expected"),
    [
        (SIXTEEN_BITS, 2, 2 * LINEAR + 2 * OTHERS),
        (NF4, 4, LINEAR * (1 / 2 + 4 / 64) + 4 * OTHERS),
        (NF4_DOUBLE, 2, LINEAR * (1 / 2 + 1 / 64 + 4 / 64 / 256) + 2 * OTHERS),
        (GPTQ, 2, LINEAR * (1 / 2 + 2 / 128 + 1 / 2 / 128) + 2 * OTHERS),
    ],
)
def test_weights(weights: Any, stream: int, expected: float) -> None:
    assert weight_bytes(training(weights=weights, stream=stream)) == pytest.approx(expected)


def test_what_is_there_all_the_time() -> None:
    peak = predict_peak(training())
    weights = 2 * (LINEAR + OTHERS)
    assert peak.resident == weights + LORA * (4 + 8) + CUBLAS_WORKSPACE


@pytest.mark.parametrize(("stream", "a_logit"), [(2, 14), (4, 16)])
def test_a_loop_that_keeps_the_logits_needs_14_or_16_bytes_each(stream: int, a_logit: int) -> None:
    """k = 3.5 and k = 4 of the published law; the last norm keeps its input in float32."""
    peak = predict_peak(training(stream=stream))
    assert peak.inputs == LAYERS * TOKENS * HIDDEN * stream
    assert peak.loss == a_logit * TOKENS * VOCABULARY + 4 * TOKENS * HIDDEN


def test_the_trainer_of_2024_dropped_the_logits_and_had_tables() -> None:
    positions = 32
    base = make_base(SIZES | {"positions": positions})
    newer, older = (predict_peak(training(base=base, stack=each)) for each in (STOCK, STOCK_2024))
    assert older.loss == 12 * TOKENS * VOCABULARY + 4 * TOKENS * HIDDEN
    assert older.resident - newer.resident == LAYERS * positions * 4 * 2 * 2


def test_autocast_has_16_bit_copies_of_the_adapter_at_the_loss() -> None:
    plain, autocast = predict_peak(training()), predict_peak(training(autocast=True))
    assert autocast.loss - plain.loss == 2 * LORA


def test_the_backward_pass_of_one_layer() -> None:
    """By tensors, in bytes a token."""
    norms = 2 * 4 * HIDDEN
    attention = 2 * 4 * HIDDEN  # Query, output, and key and value for as many heads.
    adapters = 3 * 4 * HIDDEN + 4 * HIDDEN  # Float32 copies for query, key, value; output.
    mlp = 3 * 2 * INNER
    work = 3 * 2 * INNER
    ends = 2 * 2 * HIDDEN
    logits = 2 * VOCABULARY
    gradients = 4 * LORA / LAYERS
    expected = TOKENS * (norms + attention + adapters + mlp + work + ends + logits) + gradients
    assert predict_peak(training()).layer == pytest.approx(expected)


def test_only_flash_attention_keeps_keys_for_few_heads() -> None:
    sdpa, flash = (predict_peak(training(attention=name)).layer for name in ("sdpa", "flash2"))
    assert sdpa - flash == TOKENS * 2 * (2 * HIDDEN - 2 * HIDDEN // 2)


@pytest.mark.parametrize(("stream", "a_score"), [(2, 14), (4, 16)])
def test_eager_attention_needs_14_or_16_bytes_a_score(stream: int, a_score: int) -> None:
    """At lengths where it is the largest moment."""
    lengths = (4000, 8000)
    runs = [training(attention="eager", stream=stream, sequence=length) for length in lengths]
    short, long = (predict_peak(run).layer for run in runs)
    scores = [BATCH * 2 * length**2 for length in lengths]
    assert (long - short) / (scores[1] - scores[0]) == pytest.approx(a_score, rel=0.02)


def test_without_checkpointing_every_layer_keeps_all_that_it_saves() -> None:
    norms, attention, mlp = 2 * 4 * HIDDEN, 2 * 4 * HIDDEN, 3 * 2 * INNER
    adapters = 3 * 4 * HIDDEN + 4 * HIDDEN
    peak = predict_peak(training(checkpointing=False))
    assert peak.inputs == LAYERS * TOKENS * (norms + attention + mlp + adapters)


def test_litgpt_keeps_more_of_a_quantised_base() -> None:
    runs = [training(stack=LITGPT, checkpointing=False, weights=each) for each in (NF4, GPTQ)]
    bitsandbytes, gptq = (predict_peak(run).inputs for run in runs)
    copies = 2 * HIDDEN + 2 * HIDDEN + 2 * INNER  # Before query, MLP and its end, in 16 bits.
    assert bitsandbytes - gptq == LAYERS * TOKENS * copies


def test_experts_work_one_after_the_other() -> None:
    dense = predict_peak(training()).layer
    mixture = predict_peak(training(base=make_base(MIXTURE))).layer
    saved = 2 * (3 * 2 * INNER + 2 * HIDDEN) - 3 * 2 * INNER
    work = 3 * 2 * INNER * 2 * 2 / 8 - 3 * 2 * INNER
    assert mixture - dense == pytest.approx(TOKENS * (saved + work))


def test_fsdp_shares_out_what_is_packed_and_gathers_a_layer() -> None:
    run = training(weights=NF4, gpus=2, sharded=True)
    packed, scales, gathered = LINEAR / 2, LINEAR * 4 / 64, LINEAR / 2 / LAYERS + 2 * OTHERS
    own = (4 + 8) * LORA
    shared = (packed + 2 * OTHERS + own) / 2
    peak = predict_peak(run)
    assert peak.resident == pytest.approx(shared + scales + gathered + CUBLAS_WORKSPACE)
    alone = predict_peak(replace(run, sharded=False))
    held = (LAYERS - 1) * TOKENS * HIDDEN * 2
    gradients = 4 * LORA / 2 - 4 * LORA / LAYERS
    assert peak.layer - alone.layer == pytest.approx(held + gradients)


def test_offloading_leaves_weights_and_states_to_the_cpu() -> None:
    run = training(gpus=2, sharded=True, offloaded=True)
    gathered = 2 * LINEAR / LAYERS + 2 * OTHERS
    assert predict_peak(run).resident == pytest.approx(gathered + CUBLAS_WORKSPACE)


def test_a_base_that_is_loaded_whole_peaks_before_the_first_step() -> None:
    run = training(weights=GPTQ, gpus=8, sharded=True, loads_whole=True, batch=1, sequence=1)
    peak = predict_peak(run)
    assert peak.allocated == peak.loading > peak.resident


def test_training_all_weights_in_16_bits_takes_10_bytes_each() -> None:
    """fms' Mistral 7B: 72,972 MB, whatever the batch: weights, two averages, gradient, roots."""
    run = training(rank=0, targets=(), trained_bytes=2, state_bytes=4, batch=1, sequence=1)
    assert predict_peak(run).allocated == 10 * (LINEAR + OTHERS) + CUBLAS_WORKSPACE


def test_the_device_holds_free_blocks_and_a_context() -> None:
    peak = Peak(resident=1e9, inputs=1e9, loss=2e9, layer=1e9, optimizer=0.0, loading=0.0)
    run = training()
    assert reserved_bytes(run, peak) == pytest.approx(4e9 + 0.2 * 3e9)
    assert reserved_bytes(replace(run, attention="eager"), peak) == pytest.approx(4e9 + 0.34 * 3e9)
    context = device_bytes(run, peak, "t4", 16e9) - reserved_bytes(run, peak)
    assert context == 141 * 2**20
    assert device_bytes(run, peak, "l4", 4.2e9) == 4.2e9
    several = replace(run, gpus=2)
    assert device_bytes(several, peak, "l4", 16e9) > device_bytes(run, peak, "l4", 16e9)


def test_the_end_of_the_backward_pass_has_all_gradients_and_no_inputs() -> None:
    run = training(rank=0, targets=(), trained_bytes=2, state_bytes=4, autocast=True)
    peak, first = predict_peak(run), predict_peak(replace(run, trained_bytes=0))
    gradients = 2 * (LINEAR + OTHERS)
    assert peak.layer - first.layer == pytest.approx(gradients / LAYERS)
    few = replace(run, batch=1)
    difference = predict_peak(few).layer - predict_peak(replace(few, trained_bytes=0)).layer
    assert difference == pytest.approx(gradients - predict_peak(few).inputs)
