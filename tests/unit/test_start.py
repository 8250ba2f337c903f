"""How adapters start: as PEFT starts them, on the right weights, and for the base as it is."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.integrations import dequantize_module_weight
from support import BASE
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    set_seed,
)

from orpo_ray.config import AdapterConfig
from orpo_ray.config.model import ModelConfig
from orpo_ray.errors import ConfigError
from orpo_ray.models.adapter import attach_adapter, load_adapter
from orpo_ray.models.base import load_base
from orpo_ray.models.start import (
    for_the_whole_base,
    start_adapter,
    start_from_inputs,
    write_saved_shape,
)
from orpo_ray.runs.console import SILENT

IDS = torch.arange(24).reshape(2, 12)
MODEL = ModelConfig(base=str(BASE))


def llama() -> PreTrainedModel:
    """A frozen model of two layers; the same weights at every call."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config = LlamaConfig(vocab_size=32, num_attention_heads=2, **sizes)
    return LlamaForCausalLM(config).requires_grad_(False).eval()


def gpt2() -> PreTrainedModel:
    """A base that stores its weights turned."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    return GPT2LMHeadModel(config).requires_grad_(False).eval()


def adapter(init: str, **settings: Any) -> AdapterConfig:
    return AdapterConfig(**{"r": 4, "alpha": 8, "dropout": 0, "init": init, **settings})


def started(
    config: AdapterConfig,
    base: PreTrainedModel | None = None,
    resumed: Path | None = None,
    model: ModelConfig = MODEL,
) -> tuple[Any, dict[str, Tensor]]:
    """A base with a new adapter on it, and what was taken out of the base."""
    set_seed(1)
    made = attach_adapter(base or llama(), config, SILENT.announce)
    assert isinstance(made, PeftModel)
    start = start_adapter(made.eval(), config, model, SILENT.announce, resumed)
    return made, start


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS % 32).logits
    return found


def deltas(model: Any) -> dict[str, Tensor]:
    """What the adapter adds to each weight."""
    return {
        name: module.get_delta_weight("default")
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


# --- PiSSA and OLoRA ------------------------------------------------------------------------------

TAKING = [
    pytest.param(llama, adapter("pissa"), id="pissa"),
    pytest.param(llama, adapter("olora"), id="olora"),
    pytest.param(llama, adapter("pissa", rslora=True), id="pissa-rslora"),
    pytest.param(llama, adapter("olora", dora=True), id="olora-dora"),
    pytest.param(gpt2, adapter("pissa"), id="pissa-turned"),
]


@pytest.mark.parametrize(("base", "config"), TAKING)
def test_at_the_start_base_and_adapter_are_the_base(base: Any, config: AdapterConfig) -> None:
    model, start = started(config, base())
    assert (logits(model) - logits(base())).abs().max() < 1e-5
    with model.disable_adapter():
        assert (logits(model) - logits(base())).abs().max() > 1e-3, "nothing was taken out"
    assert len(start) == 2 * len(deltas(model))


def test_olora_starts_as_in_peft() -> None:
    model, _ = started(adapter("olora"))
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights="olora")
    expected = deltas(get_peft_model(llama(), lora))
    assert all(torch.equal(delta, expected[name]) for name, delta in deltas(model).items())


def test_pissa_leaves_as_little_as_a_part_of_its_rank_can() -> None:
    """What it leaves is at most a hundredth above the best (Eckart and Young); OLoRA leaves more.

    These random weights are the worst case: their singular values are nearly equal.
    """
    base = dict(llama().named_parameters())
    left_over: dict[str, list[float]] = {}
    for init in ("pissa", "olora"):
        for name, delta in deltas(started(adapter(init))[0]).items():
            weight = base[f"{name.removeprefix('base_model.model.')}.weight"]
            best = torch.linalg.svdvals(weight)[4:].norm()
            left_over.setdefault(init, []).append(((weight - delta).norm() / best).item())
    assert max(left_over["pissa"]) < 1.01 and min(left_over["olora"]) > 1.02


def train_a_little(model: Any) -> None:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def save(model: Any, start: dict[str, Tensor], config: AdapterConfig, folder: Path) -> None:
    """As training saves an adapter."""
    weights = {name: p.detach() for name, p in model.named_parameters() if "lora_" in name}
    state = for_the_whole_base(weights, start)
    model.save_pretrained(str(folder), state_dict=state, save_embedding_layers=False)
    write_saved_shape(folder, config)


@pytest.mark.parametrize(("base", "config"), TAKING)
def test_what_is_saved_fits_the_base_as_it_was(
    base: Any, config: AdapterConfig, tmp_path: Path
) -> None:
    """PEFT loads it by itself, and so do we."""
    model, start = started(config, base())
    train_a_little(model)
    expected = logits(model)
    assert (expected - logits(base())).abs().max() > 1e-2
    save(model, start, config, tmp_path)
    by_peft = PeftModel.from_pretrained(base(), tmp_path).eval()
    assert (logits(by_peft) - expected).abs().max() < 1e-5
    ours = load_adapter(base(), str(tmp_path), trainable=False).eval()
    assert (logits(ours) - expected).abs().max() < 1e-5
    shape = config.saved_shape
    again = AdapterConfig(
        r=int(shape["r"]),
        alpha=shape["alpha"],
        rslora=config.rslora,
        dora=config.dora,
        dropout=0,
        init_from=str(tmp_path),
    )
    continued = attach_adapter(base(), again, SILENT.announce).eval()
    assert (logits(continued) - expected).abs().max() < 1e-5


@pytest.mark.parametrize(("base", "config"), TAKING)
def test_a_resume_takes_the_same_out_to_the_last_bit(
    base: Any, config: AdapterConfig, tmp_path: Path
) -> None:
    """Even if the decomposition would come out otherwise, as it may on another machine."""
    first, start = started(config, base())
    before = {name: p.detach().clone() for name, p in first.named_parameters()}
    train_a_little(first)
    save(first, start, config, tmp_path)
    torch.manual_seed(77)
    again, same = started(config, base(), resumed=tmp_path)
    assert same.keys() == start.keys()
    assert all(torch.equal(same[name], start[name]) for name in start)
    for name, parameter in again.named_parameters():
        if "magnitude" not in name:
            assert torch.equal(parameter, before[name]), name


# --- LoftQ ----------------------------------------------------------------------------------------


def nf4() -> PreTrainedModel:
    return load_base(MODEL, "cpu", "float32", "sdpa", trainable=False).eval()


@pytest.mark.parametrize(
    "settings",
    [{"alpha": 32, "r": 32}, {"alpha": 8, "r": 32}, {"alpha": 8, "r": 32, "rslora": True}],
)
def test_loftq_is_the_best_of_its_rank_for_what_rounding_took(settings: dict[str, Any]) -> None:
    """With alpha = r it is PEFT's, and another scale does not change it."""
    model, start = started(adapter("loftq", **settings), nf4())
    assert not start
    published = dict(AutoModelForCausalLM.from_pretrained(BASE).named_parameters())
    for name, module in model.named_modules():
        if not hasattr(module, "get_delta_weight"):
            continue
        weight = published[f"{name.removeprefix('base_model.model.')}.weight"].detach()
        lost = weight - dequantize_module_weight(module.get_base_layer())
        left, sizes, right = torch.linalg.svd(lost, full_matrices=False)
        best = (left[:, :32] * sizes[:32]) @ right[:32]
        a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
        assert (module.scaling["default"] * b @ a - best).abs().max() < 1e-5
    exact = logits(AutoModelForCausalLM.from_pretrained(BASE).eval())
    assert (logits(model) - exact).abs().mean() < 0.9 * (logits(nf4()) - exact).abs().mean()


def test_loftq_and_eva_are_not_computed_again_on_a_resume(tmp_path: Path) -> None:
    model, start = started(adapter("loftq"), nf4(), resumed=tmp_path)
    assert not start and all(delta.abs().max() == 0 for delta in deltas(model).values())


# --- EVA ------------------------------------------------------------------------------------------


def batches(rows: int = 4, width: int = 12) -> list[dict[str, Tensor]]:
    torch.manual_seed(3)
    ids = [torch.randint(0, 32, (rows, width)) for _ in range(3)]
    return [{"input_ids": one, "attention_mask": torch.ones_like(one)} for one in ids]


def test_eva_starts_from_the_directions_in_which_inputs_vary_most() -> None:
    config = adapter("eva")
    model, _ = started(config)
    inner = model.get_base_model()
    read: dict[str, list[Tensor]] = {}
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "get_delta_weight")}
    targets = set(model.peft_config["default"].target_modules)
    start_from_inputs(model, config, batches(), lambda batch: inner.model(**batch))
    hooks = [
        layer.register_forward_hook(
            lambda _, given, out, name=name: read.setdefault(name, []).append(
                given[0].flatten(0, 1)
            )
        )
        for name, layer in layers.items()
    ]
    for batch in batches():
        inner.model(**batch)
    for hook in hooks:
        hook.remove()
    for name, layer in layers.items():
        a, inputs = layer.lora_A["default"].weight, torch.cat(read[name])
        assert (layer.lora_B["default"].weight == 0).all()
        assert a.shape[0] == 4
        centred = inputs - inputs.mean(0)
        _, sizes, _ = torch.linalg.svd(centred, full_matrices=False)
        kept = (centred @ a.T).norm() / a.norm(dim=1).mean()
        assert kept > 0.9 * sizes[:4].norm(), name
    assert torch.equal(logits(model), logits(llama()))
    settings = model.peft_config["default"]
    assert settings.init_lora_weights is True and settings.eva_config is None
    assert set(settings.target_modules) == targets


def test_eva_is_the_same_in_every_process() -> None:
    config = adapter("eva")
    made = []
    for _ in range(2):
        model, _ = started(config)
        inner = model.get_base_model()
        start_from_inputs(model, config, batches(), lambda batch, inner=inner: inner.model(**batch))
        made.append({name: p.detach() for name, p in model.named_parameters()})
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])


# --- what does not fit ----------------------------------------------------------------------------


def test_a_rank_above_what_a_layer_has_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^adapter\.r: pissa takes at most 16 directions from "):
        started(adapter("pissa", r=17))


def test_a_layer_that_is_not_linear_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^adapter\.init: pissa starts adapters of linear "):
        started(adapter("pissa", targets=("q_proj", "embed_tokens")))


def test_olora_on_turned_weights_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^adapter\.init: PEFT's olora mistakes the turned"):
        started(adapter("olora"), gpt2())


def test_eva_on_too_few_tokens_is_refused() -> None:
    config = adapter("eva")
    model, _ = started(config)
    with pytest.raises(ConfigError, match=r"^adapter\.init: eva finds 4 directions in 3 tokens"):
        start_from_inputs(model, config, batches(rows=1, width=3), lambda batch: None)


def test_the_scale_of_rank_stabilised_lora() -> None:
    """alpha / sqrt(r), arXiv:2312.03732."""
    for rslora, scale in ((True, 8 / 4**0.5), (False, 8 / 4)):
        model, _ = started(adapter("default", rslora=rslora))
        layers = [m for m in model.modules() if hasattr(m, "get_delta_weight")]
        assert {layer.scaling["default"] for layer in layers} == {scale}
