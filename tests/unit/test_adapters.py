"""Adapters: what is trained, what an earlier adapter fits, and what is refused and why."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from support import BASE, run_config
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
)

from orpo_ray.config import AdapterConfig
from orpo_ray.config.model import ModelConfig
from orpo_ray.errors import ConfigError
from orpo_ray.models.adapter import attach_adapter, load_adapter
from orpo_ray.models.size import refuse_unknown_targets
from orpo_ray.models.tokenizer import base_location
from orpo_ray.models.trained import find_adapter, missing_base
from orpo_ray.training.pair_model import PairModel

LAYERS, LINEAR = 2, ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def tiny_base(hidden: int = 16) -> PreTrainedModel:
    """A frozen model of two layers; the same weights at every call."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=hidden,
        intermediate_size=24,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
    )
    return LlamaForCausalLM(config).requires_grad_(False)


def attach(
    base: PreTrainedModel | None = None, said: list[str] | None = None, **settings: Any
) -> Any:
    announce = [] if said is None else said
    return attach_adapter(
        base or tiny_base(), AdapterConfig(**{"r": 4, "alpha": 8, **settings}), announce.append
    )


def trained_names(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A trained adapter on disk: its B matrices are not zero."""
    torch.manual_seed(1)
    model = attach(dropout=0.3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


# --- fresh ----------------------------------------------------------------------------------------


def test_all_linear_is_every_linear_layer_of_the_body_and_nothing_else() -> None:
    names = trained_names(attach())
    assert len(names) == LAYERS * len(LINEAR) * 2
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in names} == set(LINEAR)


def test_named_targets_are_taken_as_named() -> None:
    names = trained_names(attach(targets=("q_proj", "v_proj")))
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in names} == {"q_proj", "v_proj"}


def test_a_router_that_returns_a_pair_gets_no_adapter() -> None:
    config = Llama4TextConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        intermediate_size_mlp=24,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=2,
        pad_token_id=0,
    )
    said: list[str] = []
    model = attach(Llama4ForCausalLM(config).requires_grad_(False), said)
    assert not any("router" in name for name in trained_names(model)) and not said
    pair_model = PairModel(model)
    pair_model.check_scorer(torch.arange(1, 9), 1e-3)
    assert pair_model.body is pair_model.causal_model.model


def test_a_base_without_an_inner_model_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_base()
    monkeypatch.setattr(type(base), "base_model_prefix", "")
    monkeypatch.setattr(base, "children", lambda: iter(()))
    with pytest.raises(ConfigError, match=r"^model\.base: LlamaForCausalLM has no inner model"):
        PairModel(base).body  # noqa: B018


def test_a_vision_tower_gets_no_adapter() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2}
    text = {**sizes, **heads, "vocab_size": 32, "num_key_value_heads": 2, "head_dim": 8}
    vision = {**sizes, **heads, "image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=1)
    model = Gemma3ForConditionalGeneration(config).requires_grad_(False)
    for targets in ("all-linear", ["q_proj"]):
        said: list[str] = []
        names = trained_names(attach(copy.deepcopy(model), said, targets=targets))
        assert names and all("language_model" in name for name in names)
        assert "layers that no text reaches get no adapter, such as " in said[0]


def test_a_state_space_model_gets_an_adapter_where_peft_takes_one() -> None:
    config = MambaConfig(vocab_size=32, hidden_size=16, state_size=4, num_hidden_layers=2)
    said: list[str] = []
    names = trained_names(attach(MambaForCausalLM(config).requires_grad_(False), said))
    assert any("in_proj" in name for name in names)
    assert not any("out_proj" in name for name in names)
    assert said[0].startswith("2 layers get no adapter, such as backbone.layers.0.mixer.out_proj")


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens", "model.embed_tokens"])
def test_a_tied_target_is_refused_before_a_weight_is_loaded(tmp_path: Path, target: str) -> None:
    config = run_config(tmp_path, adapter={"targets": ["q_proj", target]})
    with pytest.raises(ConfigError, match=rf"^adapter\.targets: {target} of .* is tied: "):
        refuse_unknown_targets(config)
    refuse_unknown_targets(run_config(tmp_path, adapter={"targets": ["q_proj"]}))


def test_an_adapter_as_base_is_answered_with_its_setting(saved: Path, tmp_path: Path) -> None:
    for place in (saved, saved.parent):
        told = missing_base(str(place))
        assert told is not None and told.startswith(f"model.base: {place} holds an adapter; set ")
        assert f"adapter.init_from={place}" in told
    assert missing_base(str(BASE)) is None and missing_base("owner/name") is None


def test_a_relative_base_is_kept_by_its_absolute_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(BASE.parent)
    assert base_location(ModelConfig(base=BASE.name)) == str(BASE)
    assert base_location(ModelConfig(base="owner/name")) == "owner/name"


def test_unknown_targets_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^adapter\.targets: .*c_attn"):
        attach(targets=("c_attn",))


def test_dora_has_magnitudes_too() -> None:
    names = trained_names(attach(dora=True))
    assert len([name for name in names if "lora_magnitude_vector" in name]) == LAYERS * len(LINEAR)


def test_a_fresh_adapter_leaves_the_model_as_it_is() -> None:
    ids = torch.arange(10)[None]
    expected = tiny_base()(ids).logits
    assert torch.equal(attach().eval()(ids).logits, expected)


def test_kind_none_is_the_base_itself() -> None:
    base = tiny_base()
    assert attach_adapter(base, AdapterConfig(kind="none"), lambda line: None) is base


# --- from an earlier one --------------------------------------------------------------------------


def test_an_adapter_starts_from_the_weights_of_an_earlier_one(saved: Path) -> None:
    said: list[str] = []
    model = attach(said=said, init_from=str(saved), dropout=0.1)
    assert said == [f"adapter starts from {saved}"]
    assert trained_names(model) == trained_names(attach())
    stored = load_file(saved / "adapter_model.safetensors")
    found = {
        name.replace(".default", ""): p for name, p in model.named_parameters() if "lora_" in name
    }
    assert found.keys() == stored.keys()
    assert all(torch.equal(found[name], stored[name]) for name in stored)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_dropout_is_that_of_this_run(dropout: float, saved: Path) -> None:
    model = attach(init_from=str(saved), dropout=dropout)
    rates = {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)}
    assert rates == ({dropout} if dropout else set())


def test_a_finished_run_may_be_named_instead_of_its_adapter(saved: Path) -> None:
    assert find_adapter(str(saved)) == saved
    assert find_adapter(str(saved.parent)) == saved


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"r": 8}, "adapter.r: 8 here, but init_from {folder} has 4"),
        ({"alpha": 4}, "adapter.alpha: 4.0 here, but init_from {folder} has 8.0"),
        ({"dora": True}, "adapter.dora: True here, but init_from {folder} has False"),
        ({"rslora": True}, "adapter.rslora: True here, but init_from {folder} has False"),
        (
            {"targets": ("q_proj",)},
            r"adapter.targets: \['q_proj'\] here, but init_from {folder} has others",
        ),
    ],
)
def test_another_shape_is_refused_by_its_key(
    settings: dict[str, Any], complaint: str, saved: Path
) -> None:
    with pytest.raises(ConfigError, match=f"^{complaint.format(folder=saved)}"):
        attach(init_from=str(saved), **settings)


def test_targets_that_are_those_of_the_earlier_adapter_are_accepted(
    saved: Path, tmp_path: Path
) -> None:
    """PEFT may have written the whole paths of targets, or the names from the config."""
    assert trained_names(attach(init_from=str(saved), targets=LINEAR)) == trained_names(attach())
    attach(targets=("q_proj", "v_proj")).save_pretrained(tmp_path / "two")
    assert (
        len(trained_names(attach(init_from=str(tmp_path / "two"), targets=("v_proj", "q_proj"))))
        == LAYERS * 4
    )
    with pytest.raises(ConfigError, match=r"^adapter\.targets: "):
        attach(init_from=str(tmp_path / "two"), targets=("v_proj", "q_proj", "o_proj"))


def test_an_adapter_of_another_base_is_refused(saved: Path) -> None:
    with pytest.raises(
        ConfigError, match=f"^{saved}: this adapter does not fit the base: "
    ) as caught:
        attach(tiny_base(hidden=32), init_from=str(saved))
    assert "\n" not in str(caught.value)


def test_a_folder_without_an_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=f"^{tmp_path}: no adapter_config.json here or in its folder adapter/"
    ):
        attach(init_from=str(tmp_path))


def test_a_pickled_adapter_is_refused(saved: Path) -> None:
    weights = saved / "adapter_model.safetensors"
    torch.save(load_file(weights), saved / "adapter_model.bin")
    weights.unlink()
    with pytest.raises(
        ConfigError, match=f"^{saved}: no adapter_model.safetensors; only safetensors"
    ):
        attach(init_from=str(saved))


def test_an_unreadable_adapter_config_is_refused(saved: Path) -> None:
    (saved / "adapter_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ConfigError, match=f"^{saved}: adapter_config.json cannot be read: "):
        attach(init_from=str(saved))


def test_an_adapter_that_is_no_lora_is_refused(saved: Path) -> None:
    path = saved / "adapter_config.json"
    path.write_text(
        json.dumps({"peft_type": "IA3", "target_modules": ["q_proj"]}), encoding="utf-8"
    )
    with pytest.raises(ConfigError, match=f"^{saved}: an adapter of type IA3; only LoRA"):
        attach(init_from=str(saved))


def test_an_adapter_to_look_at_is_not_trained(saved: Path) -> None:
    model = load_adapter(tiny_base(), str(saved), trainable=False)
    assert isinstance(model, PeftModel)
    assert trained_names(model) == set()
    ids = torch.arange(10)[None]
    assert not torch.allclose(model(ids).logits, tiny_base()(ids).logits)
