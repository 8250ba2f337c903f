"""Families whose layers look back a window, cap their scores or have sinks, in the fast layouts.

Log-probs, loss and gradients are those of padded rows, whose masks transformers makes.
"""

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from orpo_ray.data.pairs import TokenPair
from orpo_ray.training.layout import PROMPT, collate
from orpo_ray.training.pair_model import PairModel
from orpo_ray.training.plan import PACKED, PADDED, SHARED_PREFIX, Layout

SIZES = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attn_implementation": "eager",
}
HALF = {"layer_types": ["sliding_attention", "full_attention"]}
WINDOWED: dict[str, dict[str, Any]] = {
    "Mistral": {},
    "Ministral": {**HALF, "head_dim": 8},
    "Mixtral": {"num_local_experts": 2},
    "Starcoder2": {},
    "Phi3": {},
    "Phimoe": {"num_local_experts": 2},
    "Qwen2": {**HALF, "use_sliding_window": True},
    "Qwen2Moe": {
        **HALF,
        "use_sliding_window": True,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
    "Qwen3": {**HALF, "use_sliding_window": True, "head_dim": 8},
    "Gemma2": {**HALF, "head_dim": 8, "attn_logit_softcapping": 0.05, "query_pre_attn_scalar": 8},
    "Gemma3Text": {**HALF, "head_dim": 8, "query_pre_attn_scalar": 8},
    "Cohere2": HALF,
    "Olmo3": HALF,
    "Exaone4": HALF,
    "VaultGemma": {**HALF, "head_dim": 8, "attn_logit_softcapping": 0.05},
    "SmolLM3": {**HALF, "use_sliding_window": True},
    "Qwen3Moe": {
        "use_sliding_window": True,
        "head_dim": 8,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 16,
    },
    "Ministral3": {"head_dim": 8},
    "Cwm": {**HALF, "head_dim": 8},
    "Afmoe": {
        **HALF,
        "head_dim": 8,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 16,
        "num_dense_layers": 1,
    },
    "ExaoneMoe": {
        **HALF,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
    },
    "GptOss": {**HALF, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1},
}
LENGTHS = {
    0: [(9, 5, 7), (3, 12, 1), (1, 2, 6), (14, 1, 1)],
    # The second prompt is nothing but what all begin with.
    5: [(9, 5, 7), (5, 12, 1), (6, 2, 6), (14, 1, 1)],
}
"""Lengths of prompt, chosen and rejected, by how many tokens all prompts have in common."""


def model_of(family: str, **config: Any) -> PairModel:
    torch.manual_seed(0)
    made: Any = getattr(transformers, f"{family}Config")(**(SIZES | config))
    model = transformers.AutoModelForCausalLM.from_config(made)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 and "sinks" in name:
            torch.nn.init.normal_(parameter)
    return PairModel(model.float().eval())


def pairs(common: int) -> list[TokenPair]:
    rng = np.random.default_rng(0)
    made = []
    for i, lengths in enumerate(LENGTHS[common]):
        sides = [rng.integers(3, 48, size=length, dtype=np.int32) for length in lengths]
        sides[0][:common] = np.arange(20, 20 + common)
        made.append(TokenPair.of_answers(str(i), *sides))
    return made


def outcome(
    model: PairModel, layout: Layout, common: int
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Log-probs in one order, their weighted sum as a loss, and its gradients."""
    model.use_layout(layout)
    # Prompts that begin alike are scored, too: these log-probs belong to several pairs.
    batch = collate(pairs(common), layout, 0, score_prompt=common > 0)
    order = torch.argsort(batch.part * len(LENGTHS[common]) + batch.pair, stable=True)
    assert (batch.part == PROMPT).any() == (common > 0)
    assert layout is not SHARED_PREFIX or (batch.runs and batch.runs.common == common)
    log_probs = model(batch)[order]
    loss = (log_probs * torch.linspace(0.5, 1.5, len(log_probs))).mean()
    model.zero_grad()
    loss.backward()
    gradients = {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return log_probs.detach(), loss.detach(), gradients


def assert_same_as_padded(model: PairModel) -> None:
    for common in LENGTHS:
        _, loss, gradients = outcome(model, PADDED, common)
        size = max(gradient.abs().max() for gradient in gradients.values())
        for layout in (PACKED, SHARED_PREFIX):
            _, found, ours = outcome(model, layout, common)
            assert abs(found - loss) <= 1e-6 * abs(loss)
            assert ours.keys() == gradients.keys()
            for name, gradient in gradients.items():
                difference = (ours[name] - gradient).abs().max() / size
                assert difference <= 1e-5, f"{layout}, {common} in common: {name}: {difference:.2g}"


@pytest.mark.parametrize("window", [1, 4, 10], ids=["one token", "an answer", "a prompt"])
@pytest.mark.parametrize("family", WINDOWED)
def test_a_window_is_exact(family: str, window: int) -> None:
    model = model_of(family, **WINDOWED[family], sliding_window=window)
    assert_same_as_padded(model)


@pytest.mark.parametrize("family", WINDOWED)
def test_the_window_of_the_test_matters(family: str) -> None:
    """So that a layout which forgets it fails above."""
    with_one, without = (
        outcome(model_of(family, **WINDOWED[family], sliding_window=window), PADDED, 0)[0]
        for window in (4, 64)
    )
    assert (with_one - without).abs().max() > 1e-3


@pytest.mark.parametrize("floor_scale", [3, 8192])
@pytest.mark.parametrize("chunk", [2, 7, 10])
def test_chunks_of_llama_4_are_exact(chunk: int, floor_scale: int) -> None:
    """Its layers without rotation scale their queries by the place in the row, too."""
    model = model_of(
        "Llama4Text",
        intermediate_size_mlp=48,
        num_local_experts=2,
        attention_chunk_size=chunk,
        layer_types=["chunked_attention", "full_attention"],
        no_rope_layers=[1, 0],
        attn_temperature_tuning=True,
        floor_scale=floor_scale,
        head_dim=8,
    )
    assert_same_as_padded(model)
