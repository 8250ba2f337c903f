"""What the planner counts from a config.json is what transformers and PEFT build from it."""

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

import orpo_ray.planner
from orpo_ray.config.model import AdapterConfig, ModelConfig
from orpo_ray.errors import CannotTellError, ConfigError
from orpo_ray.models.adapter import attach_adapter
from orpo_ray.models.size import count_parameters
from orpo_ray.planner.families import FAMILIES
from orpo_ray.planner.shapes import Shape, known_shape, read_shape

TABLE: list[dict[str, Any]] = yaml.safe_load(
    (Path(orpo_ray.planner.__file__).parent / "shapes.yaml").read_text(encoding="utf-8")
)["bases"]
RANK = 3


def on_meta(config: dict[str, Any]) -> PreTrainedModel:
    """The base that transformers builds from a config.json, without numbers."""
    settings = copy.deepcopy(config)
    found = AutoConfig.for_model(settings.pop("model_type"), **settings)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(found)
    return model


def linears(model: PreTrainedModel) -> Iterator[nn.Module]:
    """What bitsandbytes replaces: linear layers, and GPT-2's of another name."""
    head = model.get_output_embeddings()
    for module in model.modules():
        if (type(module) is nn.Linear or isinstance(module, Conv1D)) and module is not head:
            yield module


def trained(model: PreTrainedModel, targets: str | tuple[str, ...], dora: bool = False) -> int:
    """The numbers of the adapter that a run attaches."""
    with torch.device("meta"):
        adapted = attach_adapter(
            model,
            AdapterConfig(r=RANK, alpha=RANK, dropout=0.0, targets=targets, dora=dora),
            lambda said: None,
        )
    return sum(each.numel() for each in adapted.parameters() if each.requires_grad)


def windows(text: PreTrainedConfig) -> tuple[int | None, ...]:
    """How far back the layers that transformers builds see."""
    window = getattr(text, "sliding_window", None) or None
    if text.model_type in ("mistral", "mixtral", "phi3", "starcoder2", "qwen3_moe"):
        return (window,) * text.num_hidden_layers
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    assert set(kinds) <= {"full_attention", "sliding_attention"}
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def check(config: dict[str, Any]) -> tuple[Shape, PreTrainedModel]:
    """The shape and the model of a config.json, once both are found to agree."""
    shape, model = read_shape(config), on_meta(config)
    text = model.config.get_text_config()
    assert shape.total == sum(each.numel() for each in model.parameters())
    assert shape.linear == sum(each.weight.numel() for each in linears(model))
    assert shape.others == shape.total - shape.linear
    assert shape.head == model.get_output_embeddings().weight.numel()
    assert (shape.layers, shape.hidden) == (text.num_hidden_layers, text.hidden_size)
    assert (shape.tied, shape.positions) == (text.tie_word_embeddings, text.max_position_embeddings)
    assert shape.windows == windows(text)
    layer = max(
        sum(each.numel() for each in module.parameters())
        for name, module in model.get_decoder().named_modules()
        if name.split(".")[:-1] in (["layers"], ["h"])
    )
    assert shape.largest_layer == layer
    return shape, model


def check_adapter(shape: Shape, model: PreTrainedModel) -> None:
    assert shape.lora(RANK) == RANK * shape.widths == trained(model, "all-linear")


@pytest.mark.parametrize("entry", TABLE, ids=lambda entry: entry["ids"][0])
def test_a_common_base_has_its_published_count_and_the_layers_that_transformers_builds(entry):
    shape, _ = check(entry["config"])
    assert shape.total == entry["parameters"]
    assert known_shape(entry["ids"][-1]) == read_shape(entry["config"], entry["ids"][-1])


def test_an_id_stands_once_in_the_table():
    ids = [each for entry in TABLE for each in entry["ids"]]
    assert len(ids) == len(set(ids)) > 150


# Small bases of every family, each with what its families can switch.
SMALL = {
    "vocab_size": 128,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
SMALL_OF = {"gpt2": {"vocab_size": 128, "n_embd": 48, "n_layer": 3, "n_head": 6, "n_positions": 64}}
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "llama": [{"attention_bias": True, "mlp_bias": True}, {"head_dim": 16}],
    "mistral": [{"head_dim": 12, "sliding_window": 7}, {"sliding_window": None}],
    "mixtral": [{"num_local_experts": 4, "num_experts_per_tok": 1}],
    "qwen2": [{"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}],
    "qwen2_moe": [
        {"num_experts": 5, "moe_intermediate_size": 16, "mlp_only_layers": [1], "qkv_bias": False},
        {"num_experts": 4, "decoder_sparse_step": 2, "shared_expert_intermediate_size": 24},
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2},
    ],
    "qwen3": [{"attention_bias": True, "head_dim": 16}],
    "qwen3_moe": [
        {"num_experts": 4, "moe_intermediate_size": 16, "mlp_only_layers": [0], "head_dim": 16},
        {"num_experts": 4, "decoder_sparse_step": 2, "attention_bias": True},
    ],
    "gemma": [{"head_dim": 16, "attention_bias": True}],
    "gemma2": [{"head_dim": 16, "sliding_window": 7}],
    "gemma3_text": [{"head_dim": 16, "sliding_window": 7}],
    "phi3": [{"sliding_window": 7}, {"tie_word_embeddings": True}],
    "olmo": [{"attention_bias": True}],
    "olmo2": [{"attention_bias": True}],
    "olmo3": [{"sliding_window": 7, "num_hidden_layers": 5}],
    "smollm3": [
        {"use_sliding_window": True, "sliding_window": 7, "no_rope_layers": [1, 0, 1]},
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    ],
    "granite": [{"attention_bias": True, "mlp_bias": True}],
    "starcoder2": [{"use_bias": False}],
    "gpt2": [{"n_inner": 80}],
    "gpt_neox": [{"attention_bias": False}],
}


def small(family: str, **settings: Any) -> dict[str, Any]:
    return {"model_type": family, **SMALL_OF.get(family, SMALL), **settings}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_counted_with_and_without_a_tied_head(family, tied):
    shape, model = check(small(family, tie_word_embeddings=tied))
    assert (shape.family, shape.tied) == (family, tied)
    check_adapter(shape, model)


@pytest.mark.parametrize(
    ("family", "settings"), [(family, each) for family in VARIANTS for each in VARIANTS[family]]
)
def test_what_a_family_can_switch_is_counted(family, settings):
    check_adapter(*check(small(family, **settings)))


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gpt2"])
def test_it_counts_what_a_run_counts_of_a_folder(family, tmp_path):
    """A run counts GPT-2's layers as no linear ones, and adapters on experts not at all."""
    config = small(family)
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    shape, counted = read_shape(config), count_parameters(ModelConfig(base=str(tmp_path)))
    assert (shape.linear, shape.others) == (counted.linear, counted.others)
    assert shape.adapts_experts or shape.lora(RANK) == counted.adapter(RANK)


def with_images(**settings: Any) -> dict[str, Any]:
    """A small base that sees images, too."""
    text = {**SMALL, "head_dim": 16, "sliding_window": 7, **settings}
    vision = {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 4,
        "vision_use_head": False,
    }
    return {"model_type": "gemma3", "text_config": text, "vision_config": vision}


def test_a_vision_tower_is_held_but_neither_adapted_nor_passed_by_text():
    shape, model = check(with_images())
    check_adapter(shape, model)
    body = sum(each.weights for layer in shape.body for each in layer.linears)
    assert shape.active == body < shape.linear


def test_a_tower_with_a_head_of_its_own_is_not_guessed():
    config = with_images()
    config["vision_config"]["vision_use_head"] = True
    with pytest.raises(CannotTellError, match="vision_use_head"):
        read_shape(config)


@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("llama", ("q_proj", "v_proj")),
        ("llama", ("self_attn.o_proj", "gate_proj")),
        ("llama", ("model.layers.1.mlp.down_proj", "0.self_attn.k_proj")),
        ("llama", ("embed_tokens", "lm_head", "up_proj")),
        ("phi3", ("qkv_proj", "down_proj")),
        ("gpt2", ("c_proj",)),
        ("gpt_neox", ("query_key_value", "gpt_neox.layers.2.mlp.dense_4h_to_h")),
        ("qwen2_moe", ("q_proj", "down_proj", "shared_expert_gate")),
        ("mixtral", ("q_proj", "k_proj")),
        ("gemma3", ("q_proj", "model.language_model.layers.0.mlp.up_proj")),
    ],
)
def test_named_targets_are_counted_as_peft_attaches_them(family, targets):
    config = with_images() if family == "gemma3" else small(family)
    assert read_shape(config).lora(RANK, targets) == trained(on_meta(config), targets) > 0


@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "down_proj")])
def test_dora_trains_a_number_an_output_more(targets):
    config = small("qwen2")
    counted = read_shape(config).lora(RANK, targets, dora=True)
    assert counted == trained(on_meta(config), targets, dora=True)
    assert counted > read_shape(config).lora(RANK, targets)


@pytest.mark.parametrize(
    ("config", "target", "says"),
    [
        (small("llama"), "q_prj", "has no layer q_prj; did you mean q_proj?"),
        (small("phi3"), "wide", "its linear layers are qkv_proj, o_proj, gate_up_proj, down_proj"),
        (small("gemma"), "lm_head", "lm_head of the base is tied: model.embed_tokens and lm_head"),
        (with_images(), "fc1", "has no layer fc1"),
    ],
)
def test_a_wrong_target_is_refused(config, target, says):
    with pytest.raises(ConfigError, match=re.escape(says)):
        read_shape(config).lora(8, [target])


def test_named_experts_are_not_guessed():
    with pytest.raises(CannotTellError, match="PEFT takes w1 of the base as its experts"):
        read_shape(small("mixtral")).lora(8, ["w1"])


def test_a_token_passes_some_experts_only():
    """Mixtral's attention, router, and two of eight experts of each layer, by hand."""
    shape = known_shape("mistralai/Mixtral-8x7B-v0.1")
    attention = 2 * 4096 * 4096 + 2 * 4096 * 1024
    expert = 3 * 4096 * 14336
    assert (shape.experts, shape.active_experts) == (8, 2)
    assert shape.active == 32 * (attention + 4096 * 8 + 2 * expert)
    assert shape.in_experts == 32 * 8 * expert
    assert shape.linear == 32 * attention


def test_what_the_planner_does_not_know_is_said():
    with pytest.raises(CannotTellError, match="mamba-2 is of the family mamba2, whose layers"):
        read_shape({"model_type": "mamba2"}, "mamba-2")
    with pytest.raises(CannotTellError, match=r"config\.json of the base has no num_hidden_layers"):
        read_shape({key: value for key, value in small("llama").items() if "layers" not in key})
    with pytest.raises(CannotTellError, match="has no n_layer"):
        read_shape({"model_type": "gpt2", "vocab_size": 9, "n_embd": 8, "n_head": 2})
    with pytest.raises(CannotTellError, match="qk_layernorm: True"):
        read_shape(small("phi", qk_layernorm=True))
    assert CannotTellError.exit_code == 3


def test_a_base_that_is_not_in_the_table_has_no_known_shape():
    assert known_shape("nobody/nothing") is None
