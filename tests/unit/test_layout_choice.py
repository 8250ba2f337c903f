"""Which layout a run takes: `auto` says why, and what a base cannot take is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from support import BASE

from orpo_ray.config import ModelConfig
from orpo_ray.errors import ConfigError
from orpo_ray.models.read_traits import read_traits
from orpo_ray.models.traits import Traits
from orpo_ray.training.layout_choice import choose_layout, kept_layout
from orpo_ray.training.plan import PACKED, PADDED, SHARED_PREFIX

LENGTHS = np.array([[30, 20, 10], [40, 5, 60]])
"""The longest row has 100 tokens; sharing prompts saves 70 of 235."""
FREE = Traits()
OBSTACLES = {
    "recurrent": (Traits(recurrent=True), "carry a state"),
    "own attention": (Traits(own_attention=True), "computes its attention in its own way"),
    "positions": (
        Traits(stretches_beyond=99),
        "a pair of more than 99 tokens changes the positions of all",
    ),
}


def choose(
    asked: str, traits: Traits = FREE, lengths: Any = LENGTHS, with_rejected: bool = True
) -> tuple[str, str]:
    layout = choose_layout(asked, traits, lengths, with_rejected=with_rejected)
    return layout.layout, layout.reason


def test_auto_shares_prompts_if_nothing_forbids_it() -> None:
    assert choose("auto") == (
        SHARED_PREFIX,
        "each prompt is computed once, which saves 30% of the tokens; no padding",
    )


@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_auto_pads_if_answers_cannot_be_in_one_row(obstacle: str) -> None:
    traits, reason = OBSTACLES[obstacle]
    name, why = choose("auto", traits)
    assert name == PADDED and reason in why


@pytest.mark.parametrize("asked", [PACKED, SHARED_PREFIX])
@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_a_single_row_is_refused_there(obstacle: str, asked: str) -> None:
    traits, reason = OBSTACLES[obstacle]
    with pytest.raises(
        ConfigError, match=rf"^training\.layout: {asked} does not fit this run: .*{reason}"
    ):
        choose(asked, traits)


def test_a_loss_of_the_router_keeps_prompts_apart() -> None:
    traits = Traits(router_loss=True)
    assert choose("auto", traits) == (
        PACKED,
        "no padding; prompts are not shared, as the base asks for its router's loss, which is a "
        "mean over tokens",
    )
    assert choose(PACKED, traits)[0] == PACKED
    with pytest.raises(ConfigError, match="the base asks for its router's loss"):
        choose(SHARED_PREFIX, traits)


def test_one_answer_a_pair_shares_what_prompts_begin_with() -> None:
    assert choose("auto", with_rejected=False) == (
        SHARED_PREFIX,
        "no padding; the objective computes one answer a pair, so prompts share only what they "
        "begin with",
    )
    assert choose("auto", Traits(router_loss=True), with_rejected=False)[0] == PACKED


def test_pairs_that_a_run_has_not_read_take_its_layout_if_the_base_can() -> None:
    traits, lengths = Traits(stretches_beyond=12), np.array([[5, 4, 0], [5, 7, 0]])
    for layout in (SHARED_PREFIX, PACKED, PADDED):
        assert kept_layout(layout, traits, lengths) == layout
        assert kept_layout(layout, traits, lengths + 1) == PADDED


def test_sharing_that_saves_next_to_nothing_is_left() -> None:
    name, why = choose("auto", lengths=np.array([[1, 100, 100]]))
    assert (
        name == PACKED and why == "no padding; sharing prompts would save only 0.5% of the tokens"
    )


@pytest.mark.parametrize("asked", [PADDED, PACKED, SHARED_PREFIX])
def test_what_was_asked_for_is_taken(asked: str) -> None:
    assert choose(asked) == (asked, "as configured")


# --- what a configuration says --------------------------------------------------------------------

NO_SDPA = ("flash_attention_2", "eager")
SIZES = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
BASES: dict[str, tuple[dict[str, Any], Traits]] = {
    "Llama": ({}, Traits()),
    "GPT2": ({}, Traits()),
    "Mistral": ({"sliding_window": 64}, Traits()),
    "Qwen2": ({"use_sliding_window": False, "sliding_window": 64}, Traits()),
    "Gemma2": (
        {"sliding_window": 32, "head_dim": 8},
        Traits(attentions=NO_SDPA),
    ),
    "Gemma3Text": (
        {"sliding_window": 32, "head_dim": 8, "num_hidden_layers": 6},
        Traits(),
    ),
    "Mixtral": ({"output_router_logits": True, "sliding_window": None}, Traits(router_loss=True)),
    "GptOss": (
        {"sliding_window": 32, "head_dim": 8, "num_local_experts": 2},
        Traits(attentions=("eager",)),
    ),
    "Bloom": ({}, Traits(own_attention=True, attentions=("eager",))),
    "Phi3": (
        {
            "max_position_embeddings": 64,
            "original_max_position_embeddings": 32,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "original_max_position_embeddings": 32,
                "long_factor": [2.0] * 4,
                "short_factor": [1.0] * 4,
            },
            "pad_token_id": 0,
        },
        Traits(stretches_beyond=32),
    ),
    "Mamba": ({}, Traits(own_attention=True, recurrent=True, attentions=("eager",))),
    "Qwen3Next": ({}, Traits(own_attention=True, recurrent=True)),
}


@pytest.mark.parametrize("family", BASES)
def test_traits_are_read_off_the_configuration(family: str, tmp_path: Path) -> None:
    own, expected = BASES[family]
    getattr(transformers, f"{family}Config")(**(SIZES | own)).save_pretrained(tmp_path)
    assert read_traits(ModelConfig(base=str(tmp_path))) == expected


def test_the_demo_shares_its_prompts() -> None:
    assert read_traits(ModelConfig(base=str(BASE))) == FREE


def test_an_encoder_with_a_decoder_is_no_base(tmp_path: Path) -> None:
    transformers.T5Config().save_pretrained(tmp_path)
    with pytest.raises(
        ConfigError, match=r"^model\.base: .* is of type t5, which is no causal language model$"
    ):
        read_traits(ModelConfig(base=str(tmp_path)))


def test_a_folder_that_is_no_base_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^model\.base: "):
        read_traits(ModelConfig(base=str(tmp_path)))
