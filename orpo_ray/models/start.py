"""How a new adapter starts, in place of a random A and a B of zeros.

PEFT computes PiSSA, OLoRA and EVA. LoftQ is computed here, because PEFT's own asks for CUDA, leaves
out the scale of the adapter, and does not know the names under which some bases store a weight.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import EvaConfig, PeftModel, initialize_lora_eva_weights
from peft.tuners.lora import Linear, LoraLayer
from peft.utils.integrations import dequantize_module_weight
from safetensors.torch import load_file
from torch import Tensor

from orpo_ray.config.model import AdapterConfig, ModelConfig
from orpo_ray.errors import ConfigError
from orpo_ray.models.base import QUANTISED, fetch_base
from orpo_ray.models.merge import StoredNames, quantised_in
from orpo_ray.models.size import model_without_numbers
from orpo_ray.models.trained import ADAPTER_CONFIG
from orpo_ray.models.weights import Weights
from orpo_ray.runs.console import Announce

_NAME = "default"
_PISSA = "pissa_niter_16"
"""PiSSA by a randomised decomposition, which the paper finds as good at 16 iterations."""
_WHAT = {
    "loftq": "what 4 bits round away, by a singular value decomposition",
    "olora": "the base's weights, by a QR decomposition",
    "pissa": "the base's weights, by a singular value decomposition",
}

Start = dict[str, Tensor]
"""A and B that were taken out of the base, by the names that PEFT's model has for them."""


def start_adapter(
    model: PeftModel,
    adapter: AdapterConfig,
    base: ModelConfig,
    announce: Announce,
    resumed: Path | None = None,
) -> Start:
    """Give a new adapter its start on the weights of its base; returns what was taken out of them.

    `resumed` is the folder of an adapter that a checkpoint of the run saved. The same part is then
    taken out once more, and an adapter that leaves its base as it is gets no start, because its
    weights will be loaded. EVA's start needs pairs, and follows with `start_from_inputs`.
    """
    if not adapter.starts_elsewhere or (resumed and not adapter.takes_base_apart):
        return {}
    layers = dict(_layers(model))
    _refuse_layers(adapter, layers)
    if resumed is not None:
        return _taken_again(model, layers, resumed)
    announce(f"the adapter of {len(layers)} layers starts from {_WHAT[adapter.init]}")
    if adapter.init == "loftq":
        _make_up_for_rounding(model, layers, base)
        return {}
    for layer in layers.values():
        if adapter.init == "olora":
            layer.olora_init(_NAME)
        else:
            layer.pissa_init(_NAME, _PISSA)
    return {
        name: parameter.detach().to("cpu", copy=True)
        for name, parameter in model.named_parameters()
        if ".lora_A." in name or ".lora_B." in name
    }


def start_from_inputs(
    model: PeftModel,
    adapter: AdapterConfig,
    batches: Sequence[dict[str, Tensor]],
    read: Callable[[dict[str, Tensor]], object],
) -> None:
    """Give A the directions in which the inputs of its layer vary most (EVA, arXiv:2410.07170).

    `read` has the model read a batch. Ranks are not moved from one layer to another (rho is 1), so
    that every process makes an adapter of the same shape.
    """
    settings: Any = model.peft_config[_NAME]
    _refuse_layers(adapter, dict(_layers(model)))
    _refuse_few_tokens(adapter.r, batches)
    targets = settings.target_modules
    settings.init_lora_weights, settings.eva_config = "eva", EvaConfig(rho=1.0)
    initialize_lora_eva_weights(
        model,
        batches,
        forward_fn=lambda _, batch: read(batch),
        gather_distributed_inputs=False,
        show_progress_bar=False,
    )
    settings.init_lora_weights, settings.eva_config = True, None
    settings.target_modules = targets


def for_the_whole_base(weights: dict[str, Tensor], start: Start) -> dict[str, Tensor]:
    """An adapter for the base as it was before `start` was taken out of it.

    (W - s B0 A0) + s B A = W + s [B, -B0] [A; A0], at twice the rank and the same scale s.
    """
    joined = dict(weights)
    for name, taken in start.items():
        is_a = ".lora_A." in name
        parts = [weights[name], taken if is_a else -taken]
        joined[name] = torch.cat(parts, dim=0 if is_a else 1).contiguous()
    return joined


def write_saved_shape(folder: Path, adapter: AdapterConfig) -> None:
    """Write rank and alpha of `for_the_whole_base` into the adapter_config.json that PEFT wrote."""
    file = folder / ADAPTER_CONFIG
    settings = json.loads(file.read_text(encoding="utf-8"))
    saved = adapter.saved_shape
    settings |= {"r": saved["r"], "lora_alpha": saved["alpha"]}
    file.write_text(json.dumps(settings, indent=2, sort_keys=True), encoding="utf-8")


def _layers(model: PeftModel) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


def _refuse_layers(adapter: AdapterConfig, layers: dict[str, Any]) -> None:
    """Raise ConfigError for layers that the start does not fit."""
    for name, layer in layers.items():
        below = layer.get_base_layer()
        if not isinstance(layer, Linear) and not isinstance(below, QUANTISED):
            raise ConfigError(
                f"adapter.init: {adapter.init} starts adapters of linear layers, and {name} is "
                "none; leave it out of adapter.targets, or set adapter.init=default"
            )
        outputs = [] if adapter.init == "eva" else [layer.out_features]
        narrow = min([layer.in_features, *outputs])
        if adapter.r > narrow:
            raise ConfigError(
                f"adapter.r: {adapter.init} takes at most {narrow} directions from {name}; set "
                f"adapter.r={narrow} or less, or adapter.init=default"
            )
        if adapter.init == "olora" and getattr(layer, "fan_in_fan_out", False):
            raise ConfigError(
                "adapter.init: PEFT's olora mistakes the turned weights of this base; set "
                "adapter.init=pissa or default"
            )


def _refuse_few_tokens(rank: int, batches: Sequence[dict[str, Tensor]]) -> None:
    """Raise ConfigError if a batch has fewer tokens than directions are wanted."""
    fewest = min((int(batch["attention_mask"].sum()) for batch in batches), default=0)
    if fewest < rank:
        raise ConfigError(
            f"adapter.init: eva finds {rank} directions in {fewest} tokens of the training pairs; "
            "lower adapter.r, or set adapter.init=default"
        )


def _taken_again(model: PeftModel, layers: dict[str, Any], resumed: Path) -> Start:
    """Take out of the base what the run took out of it at its start, to the last bit.

    A saved adapter has it in its second half. To decompose the weights again might give another
    part of nearly the same size, on which the trained A and B are none.
    """
    saved = load_file(resumed / "adapter_model.safetensors")
    start: Start = {}
    with torch.no_grad():
        for name, layer in layers.items():
            halves: dict[str, Tensor] = {}
            for part, turned in (("lora_A", 1), ("lora_B", -1)):
                parameter = getattr(layer, part)[_NAME].weight
                half = saved[f"{name}.{part}.weight"].chunk(2, dim=0 if part == "lora_A" else 1)[1]
                halves[part] = turned * half.contiguous()
                parameter.copy_(halves[part])
                start[f"{name}.{part}.{_NAME}.weight"] = halves[part]
            _take_out(layer)
    return start


def _take_out(layer: Any) -> None:
    """Subtract the adapter from the weight below it, as PEFT does."""
    below = layer.get_base_layer()
    turn = layer.fan_in_fan_out
    weight = below.weight.data.to(torch.float32)
    a, b = layer.lora_A[_NAME].weight, layer.lora_B[_NAME].weight
    rest = (weight.T if turn else weight) - layer.scaling[_NAME] * b @ a
    below.weight.data = (rest.T if turn else rest).to(below.weight.dtype)


def _make_up_for_rounding(model: PeftModel, layers: dict[str, Any], base: ModelConfig) -> None:
    """LoftQ (arXiv:2310.08659): A and B are the best of their rank for what rounding took away."""
    inner: Any = model.get_base_model()
    names, quantised = StoredNames(model_without_numbers(base)), quantised_in(inner)
    published = Weights(fetch_base(base))
    stored_as = {names.in_model(name): name for name in published.shapes}
    prefix = "base_model.model."
    for name, layer in layers.items():
        own = f"{name.removeprefix(prefix)}.weight"
        if own not in stored_as:
            raise ConfigError(
                f"adapter.init: loftq reads the weights of the base one by one, and {own} is none "
                "of its files'; set adapter.init=default"
            )
        below = layer.get_base_layer()
        weight = published.read(stored_as[own]).to(below.weight.device, torch.float32)
        weight = weight.T if own in quantised.turned else weight
        lost = weight - dequantize_module_weight(below).to(torch.float32)
        _fit(layer, lost)


def _fit(layer: Any, wanted: Tensor) -> None:
    """The A and B whose scaled product is nearest to a matrix (Eckart and Young 1936)."""
    rank, scale = layer.r[_NAME], layer.scaling[_NAME]
    left, sizes, right = torch.linalg.svd(wanted, full_matrices=False)
    root = (sizes[:rank] / scale).sqrt()
    with torch.no_grad():
        layer.lora_A[_NAME].weight.copy_(root[:, None] * right[:rank])
        layer.lora_B[_NAME].weight.copy_(left[:, :rank] * root)
