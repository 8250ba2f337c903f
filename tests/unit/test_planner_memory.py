"""The planner's memory, compared with the tensors that a step really holds on this CPU."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from orpo_ray.bench.pairs import pairs_of_shape
from orpo_ray.bench.sides import Ours
from orpo_ray.planner.memory import (
    LOGITS_PER_TILE,
    Method,
    MicroBatch,
    bytes_of_batch,
    computed,
    held,
    micro_batch,
)
from orpo_ray.planner.shapes import read_shape
from orpo_ray.training import logprobs
from orpo_ray.training.memory import CpuMemory
from orpo_ray.training.pair_model import PairModel
from orpo_ray.training.plan import PACKED, PADDED, SHARED_PREFIX, Layout

SMALL = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
}


@dataclass(frozen=True)
class Case:
    """A small base, and how it is trained."""

    family: str = "llama"
    changes: dict[str, Any] = field(default_factory=dict)
    layout: Layout = SHARED_PREFIX
    checkpointing: bool = True
    half: bool = False
    rank: int | None = 16
    dropout: float = 0.0
    dora: bool = False
    tensors: float = 0.05
    """How far all tensors may be off."""
    step: float = 0.08
    """How far those that come and go may be off."""


CASES = {
    "plain": Case(),
    "gqa, kept": Case(changes={"num_key_value_heads": 1}, checkpointing=False),
    "tied": Case(changes={"tie_word_embeddings": True}, layout=PADDED),
    "tied, kept": Case(
        changes={"tie_word_embeddings": True, "vocab_size": 49152},
        layout=PADDED,
        checkpointing=False,
    ),
    "128k": Case(
        changes={
            "vocab_size": 128256,
            "hidden_size": 128,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
        },
        layout=PACKED,
    ),
    "262k": Case(
        changes={
            "vocab_size": 262144,
            "hidden_size": 128,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
        },
        checkpointing=False,
    ),
    "wide": Case(changes={"hidden_size": 512, "intermediate_size": 2752, "vocab_size": 2000}),
    "dropout": Case(changes={"vocab_size": 2000}, dropout=0.05),
    "dropout, kept": Case(
        changes={"vocab_size": 2000, "num_hidden_layers": 8}, dropout=0.05, checkpointing=False
    ),
    "half": Case(half=True),
    "half, kept": Case(half=True, layout=PADDED, checkpointing=False),
    "half, dropout": Case(changes={"vocab_size": 2000}, half=True, dropout=0.05),
    "dora": Case(changes={"vocab_size": 2000}, dora=True),
    "dora, kept": Case(dora=True, checkpointing=False),
    "full": Case(rank=None, checkpointing=False),
    "full, tied": Case(changes={"tie_word_embeddings": True}, rank=None),
    "full, half": Case(rank=None, half=True, checkpointing=False),
    "qwen2": Case(family="qwen2", changes={"num_key_value_heads": 2}),
    "qwen3": Case(family="qwen3", changes={"head_dim": 64}, checkpointing=False),
    "mistral": Case(family="mistral", changes={"num_key_value_heads": 2}, checkpointing=False),
    "phi3": Case(family="phi3", checkpointing=False),
    "gemma3": Case(family="gemma3_text", changes={"head_dim": 64}, checkpointing=False),
    "gemma2": Case(family="gemma2", changes={"head_dim": 64}),
    "gemma2, half": Case(
        family="gemma2",
        changes={"head_dim": 64, "vocab_size": 2000, "num_key_value_heads": 2},
        half=True,
        checkpointing=False,
    ),
    "gemma2, packed": Case(
        family="gemma2",
        changes={"head_dim": 64, "vocab_size": 2000},
        layout=PACKED,
        checkpointing=False,
    ),
    "olmo2": Case(family="olmo2", checkpointing=False),
}


@pytest.mark.parametrize("name", CASES)
def test_tensors_of_a_step_are_predicted(name: str) -> None:
    case = CASES[name]
    config = AutoConfig.for_model(case.family, **{**SMALL, **case.changes}, pad_token_id=0)
    model = _model(case, config)
    pairs = pairs_of_shape((128, 128, 128), 4, 0.6, config.vocab_size)
    autocast = torch.bfloat16 if case.half else None
    ours = Ours(PairModel(model, autocast), [pairs], "orpo", case.layout)
    ours.step(0)  # gradients exist from here on, as in all but the first micro-batch
    measured = CpuMemory().peak_of(lambda: ours.step(0))
    assert measured is not None
    fixed = sum(p.nbytes * (2 if p.requires_grad else 1) for p in model.parameters())

    shape, method = read_shape(config.to_dict()), _method(case)
    lengths = np.array([[len(p.prompt), len(p.chosen), len(p.rejected)] for p in pairs])
    batch = micro_batch(lengths, case.layout, score_prompt=True)
    predicted = bytes_of_batch(shape, method, batch)
    parts = held(shape, method)
    resident = parts["weights"] + parts["adapter"] + parts["gradients"]

    assert resident == pytest.approx(fixed, rel=1e-6)
    assert predicted == pytest.approx(measured, rel=case.step), computed(shape, method, batch)
    assert predicted + resident == pytest.approx(measured + fixed, rel=case.tensors)


def _model(case: Case, config: Any) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    if case.rank is not None:
        model.requires_grad_(False)
        model = model.to(torch.bfloat16 if case.half else torch.float32)
        model = get_peft_model(
            model,
            LoraConfig(
                task_type="CAUSAL_LM",
                r=case.rank,
                lora_dropout=case.dropout,
                use_dora=case.dora,
                target_modules="all-linear",
            ),
        )
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    if case.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def _method(case: Case) -> Method:
    return Method(
        quantization="none",
        half=case.half,
        rank=case.rank,
        dropout=case.dropout,
        dora=case.dora,
        checkpointing=case.checkpointing,
        on_gpu=False,
        flash=False,
        layout=case.layout,
    )


def test_the_head_has_tiles_of_the_size_that_training_takes() -> None:
    assert LOGITS_PER_TILE == logprobs.LOGITS_PER_TILE


def test_a_micro_batch_counts_each_layout() -> None:
    lengths = np.array([[10, 4, 2], [6, 3, 5]])
    padded = micro_batch(lengths, PADDED)
    packed = micro_batch(lengths, PACKED)
    shared = micro_batch(lengths, SHARED_PREFIX, score_prompt=True)
    assert padded.tokens == 4 * 14 and padded.masked == 4 * 14 * 14
    assert packed.tokens == 14 + 12 + 9 + 11
    assert shared.tokens == 16 + 14 and shared.repeated == 16
    assert packed.scored == 14 and shared.scored == 14 + 9 + 5
    # Each token sees half of its side; the prompt's own half is computed once.
    assert packed.seen == (14**2 + 12**2 + 9**2 + 11**2) // 2
    assert shared.seen == packed.seen - (10**2 + 6**2) // 2


def test_answers_alone_are_one_side() -> None:
    alone = micro_batch(np.array([[10, 4, 2]]), PACKED, with_rejected=False)
    assert alone == MicroBatch(tokens=14, scored=4, seen=98, scores=196)


@pytest.mark.parametrize("layout", [PACKED, SHARED_PREFIX])
def test_a_window_hides_tokens_and_layers_without_one_see_all(layout: Layout) -> None:
    """Against counted masks, in which a token sees itself, too."""
    lengths = np.array([[300, 40, 90], [20, 70, 60]])
    counted = []
    for window in (64, 4096):
        seen = 0.0
        for prompt, *answers in lengths.tolist():
            for rejected, answer in enumerate(answers):
                mask = np.tril(np.triu(np.ones((prompt + answer, prompt + answer)), 1 - window))
                first = prompt if layout is SHARED_PREFIX and rejected else 0
                seen += mask[first:].sum()
        counted.append(seen)
    found = micro_batch(lengths, layout, windows=(64, None, None)).seen
    assert found == pytest.approx((counted[0] + 2 * counted[1]) / 3, rel=0.02)
    assert micro_batch(lengths, layout).seen == pytest.approx(counted[1], rel=0.02)


def test_nf4_takes_half_a_byte_and_its_scales() -> None:
    shape = read_shape({**_LLAMA, "num_hidden_layers": 2})
    kept = held(shape, Method())["weights"]
    scales = shape.linear * (1 / 64 + 4 / (64 * 256))
    assert kept == pytest.approx(shape.linear / 2 + scales + 2 * shape.others)


def test_zero_shares_out_what_is_trained() -> None:
    shape = read_shape(_LLAMA)
    trained = 4.0 * shape.lora(16)
    alone = held(shape, Method())
    ddp, two, three = (
        held(shape, Method(quantization="none", workers=4, stage=stage)) for stage in (None, 2, 3)
    )
    assert alone["optimizer"] == 2 * trained
    assert ddp["gradients"] == 2 * trained  # DDP's buckets are a copy
    assert two["gradients"] == trained / 4 and two["optimizer"] == trained / 2
    assert three["weights"] == ddp["weights"] / 4 and three["adapter"] == trained / 4


_LLAMA = {**SMALL, "model_type": "llama"}
