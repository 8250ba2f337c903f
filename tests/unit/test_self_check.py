"""The check of a layout at the start of a run: if it is wrong, rows are padded with a warning."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from support import decided
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

from orpo_ray.data.pairs import TokenPair
from orpo_ray.training import attention
from orpo_ray.training.pair_model import PairModel
from orpo_ray.training.plan import PACKED, PADDED, SHARED_PREFIX
from orpo_ray.training.runs import ALL_BEFORE
from orpo_ray.training.self_check import settle_layout
from orpo_ray.training.world import World

VOCABULARY = 97
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


class Table(list[TokenPair]):
    """A table of pairs, as far as the check reads it."""

    @property
    def lengths(self) -> Any:
        return np.array([[len(p.prompt), len(p.chosen), len(p.rejected)] for p in self])


def pairs() -> Any:
    """A table of some pairs, of which the last is the longest."""
    rng = np.random.default_rng(0)
    lengths = [(5, 3, 7), (9, 6, 1), (1, 2, 4), (3, 3, 3), (12, 15, 5)]
    draw = [
        [rng.integers(4, VOCABULARY, length, dtype=np.int32) for length in three]
        for three in lengths
    ]
    return Table(TokenPair.of_answers(str(i), *sides) for i, sides in enumerate(draw))


def llama() -> PairModel:
    torch.manual_seed(0)
    return PairModel(LlamaForCausalLM(LlamaConfig(**SIZES)))


def settled(model: PairModel, layout: str, **options: Any) -> list[str]:
    said: list[str] = []
    decisions = decided(options.pop("budget", 4096), layout=layout)
    settle_layout(model, decisions, pairs(), 0, said.append, **options)
    return said


@pytest.mark.parametrize("layout", [PADDED, PACKED, SHARED_PREFIX])
def test_a_layout_that_fits_is_taken_without_a_word(layout: str) -> None:
    model = llama()
    assert settled(model, layout) == []
    assert model.layout == layout


class DeafToPositions(LlamaRotaryEmbedding):
    """Counts tokens itself, as a model may that does not know of several answers in a row."""

    def forward(self, x: Any, position_ids: Any) -> Any:
        return super().forward(x, torch.arange(x.shape[1], device=x.device)[None])


def test_other_log_probs_have_the_run_fall_back_loudly() -> None:
    layout, model = SHARED_PREFIX, llama()
    inner = model.causal_model.base_model
    inner.rotary_emb = DeafToPositions(inner.config)
    (line,) = settled(model, layout)
    assert line.startswith(
        f"WARNING: layout {layout} is not right for this model, falling back to padded rows: "
    )
    assert "log-probs of some pairs differ by" in line
    assert model.layout == PADDED


class Biased(LlamaAttention):
    """Like layers whose scores depend on more than queries and keys."""

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        return super().forward(*arguments, position_bias=torch.ones(1), **keywords)


def test_attention_that_is_not_computed_has_it_fall_back_too() -> None:
    model = llama_with(Biased)
    (line,) = settled(model, SHARED_PREFIX)
    assert "Biased computes attention with position_bias; use padded" in line
    assert model.layout == PADDED


def test_a_window_that_only_the_longest_pair_meets_is_checked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As if a family told its window in a way of its own. The longest pair has 27 tokens."""
    torch.manual_seed(0)
    model = PairModel(MistralForCausalLM(MistralConfig(**SIZES, sliding_window=16)))
    assert settled(model, SHARED_PREFIX) == []
    monkeypatch.setattr(attention, "_reach", lambda module, window: ALL_BEFORE)
    for budget in (4096, 8):
        (line,) = settled(model, SHARED_PREFIX, budget=budget)
        assert "log-probs of some pairs differ by" in line


@dataclass(frozen=True)
class WithAnother(World):
    """A world of two processes; the other one found a problem."""

    def gather(self, value: Any) -> list[Any]:
        return [value, "log-probs of some pairs differ by 2"]


def test_all_processes_settle_on_the_same() -> None:
    model = llama()
    (line,) = settled(model, SHARED_PREFIX, world=WithAnother(rank=0, size=2, local_rank=0))
    assert line.endswith("differ by 2") and model.layout == PADDED


class KeepsToItself(LlamaAttention):
    """Like layers that pass only what they know on to their attention."""

    def forward(self, *arguments: Any, runs: Any = None, **keywords: Any) -> Any:
        return super().forward(*arguments, **keywords)


def failing(error: Exception) -> type[LlamaAttention]:
    """Like layers that expect other rows, or that run out of memory."""

    class Fails(LlamaAttention):
        def forward(self, *arguments: Any, runs: Any = None, **keywords: Any) -> Any:
            if runs is not None:
                raise error
            return super().forward(*arguments, **keywords)

    return Fails


def llama_with(attention: type[LlamaAttention]) -> PairModel:
    model = llama()
    for layer in model.causal_model.base_model.layers:
        layer.self_attn.__class__ = attention
    return model


@pytest.mark.parametrize(
    ("attention", "reason"),
    [
        (KeepsToItself, "KeepsToItself does not get the runs of tokens of a row"),
        (failing(RuntimeError("view size is not\ncompatible")), "view size is not"),
        (failing(AssertionError()), "AssertionError"),
    ],
)
def test_a_model_whose_code_fails_in_a_layout_falls_back_too(attention: Any, reason: str) -> None:
    model = llama_with(attention)
    (line,) = settled(model, SHARED_PREFIX)
    assert reason in line and "\n" not in line
    assert model.layout == PADDED


def test_missing_memory_says_nothing_of_the_layout() -> None:
    model = llama_with(failing(RuntimeError("DefaultCPUAllocator: can't allocate memory")))
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        settled(model, SHARED_PREFIX)


def test_no_more_pairs_are_compared_than_a_micro_batch_holds() -> None:
    """The longest takes 27 tokens, a padded pair 54."""
    model, seen = llama(), []
    model.register_forward_pre_hook(lambda module, given: seen.append(len(given[0].chosen_tokens)))
    for budget in (1, 108, 4096):
        settled(model, SHARED_PREFIX, budget=budget)
    assert seen == [1, 1, 2, 2, 4, 4]
