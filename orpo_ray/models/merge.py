"""Merges an adapter into the weights of its base, one weight after the other.

W' = W + (alpha / r) B A (Hu et al. 2021, arXiv 2106.09685), and DoRA's rescaling of it (Liu et al.
2024, arXiv 2402.09353). PEFT's own layers compute it in float32, and the sum is rounded once to the
base's number format. Nothing is ever written in 4 or 8 bits.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, rename_source_key
from transformers.pytorch_utils import Conv1D

from orpo_ray.config.model import ModelConfig
from orpo_ray.errors import ConfigError, ResourceError
from orpo_ray.models.adapter import load_adapter
from orpo_ray.models.base import QUANTISED
from orpo_ray.models.placement import free_memory
from orpo_ray.models.size import model_without_numbers
from orpo_ray.models.trained import find_adapter
from orpo_ray.models.weights import SHARD_BYTES, Weights, shape_like, write_weights

_INT8_STEPS = 127


@dataclass(frozen=True)
class AsTrained:
    """Weights as they are in training: rounded to 4 or 8 bits, and computed with in 16 or 32."""

    quantised: "Quantised"
    quantization: str
    dtype: torch.dtype
    device: str

    def __call__(self, name: str, weight: Tensor) -> Tensor:
        """The weight that training computed with."""
        if name in self.quantised.turned:
            return self._rounded(weight.T).T
        return self._rounded(weight) if name in self.quantised.names else weight

    def _rounded(self, weight: Tensor) -> Tensor:
        given = weight.to(self.device, self.dtype).contiguous()
        if self.quantization == "nf4":
            packed, state = bnb.quantize_4bit(given, quant_type="nf4", compress_statistics=True)
            restored: Tensor = bnb.dequantize_4bit(packed, state)
            return restored.to("cpu")
        packed, scale, _ = bnb.int8_vectorwise_quant(given.half())
        unpacked: Tensor = packed.float() * (scale.float() / _INT8_STEPS)[:, None]
        return unpacked.to("cpu", self.dtype)


def as_published(name: str, weight: Tensor) -> Tensor:
    """The weight as it is."""
    return weight


Into = Callable[[str, Tensor], Tensor]
"""What becomes of a weight before the adapter is merged into it: `as_published` or AsTrained."""


@dataclass(frozen=True)
class Quantised:
    """Which weights of a loaded model are quantised, by the names that the model has for them."""

    names: frozenset[str]
    turned: frozenset[str]
    """Those that are stored [in, out], as GPT-2's, and quantised [out, in]."""


def quantised_in(model: PreTrainedModel) -> Quantised:
    """The quantised weights of a loaded model. An adapter around a layer is left out of its name.

    transformers notes in `source_cls` which kind of layer it has replaced.
    """
    found = {
        f"{name.removesuffix('.base_layer')}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, QUANTISED)
    }
    turned = {
        name
        for name, module in found.items()
        if issubclass(getattr(module, "source_cls", nn.Linear), Conv1D)
    }
    return Quantised(frozenset(found), frozenset(turned))


def write_copy(source: Weights, folder: Path, dtype: torch.dtype) -> None:
    """Write the weights of a whole model in one number format."""

    def cast(tensor: Tensor) -> torch.dtype:
        return dtype if tensor.dtype.is_floating_point else tensor.dtype

    shapes = {name: shape_like(each, cast(each)) for name, each in source.shapes.items()}
    write_weights(
        folder,
        shapes,
        lambda name: source.read(name).to(shapes[name].dtype),
        min(SHARD_BYTES, source.largest_file),
    )


def write_merged(
    config: ModelConfig, base: Weights, adapter: str, into: Into, folder: Path
) -> None:
    """Write a base with an adapter merged into it, in the base's own number format.

    One shard's merged weights are in memory at a time, if the base stores each adapted weight as
    the model has it. Some mixtures of experts are stored expert by expert: these are merged as a
    whole. Raises ResourceError if there is no room in memory for that.
    """
    merging = Merging(config, adapter)
    if not merging.fits(base):
        _write_whole(config, base, adapter, into, folder)
        return

    def read(name: str) -> Tensor:
        return merging.merged(name, base.read(name), into)

    write_weights(folder, base.shapes, read, min(SHARD_BYTES, base.largest_file))


class Merging:
    """An adapter on a base without numbers, of which one layer at a time gets its numbers.

    Raises ConfigError if the adapter does not fit the base.
    """

    def __init__(self, config: ModelConfig, adapter: str) -> None:
        self._folder = find_adapter(adapter)
        model = model_without_numbers(config)
        self._names = StoredNames(model)
        lora = LoraConfig.from_pretrained(str(self._folder))
        lora.inference_mode = True
        try:
            adapted = PeftModel(model, lora, low_cpu_mem_usage=True)
        except ValueError as error:
            raise self._unfit(str(error).splitlines()[0]) from error
        self._give_numbers(adapted)
        inner: Any = adapted.get_base_model()
        layers = {
            name: module
            for name, module in inner.named_modules()
            if isinstance(module, BaseTunerLayer)
        }
        self._has_parameters = any(isinstance(each, ParamWrapper) for each in layers.values())
        self._layers: dict[str, Any] = {f"{name}.weight": each for name, each in layers.items()}

    def fits(self, base: Weights) -> bool:
        """Whether the base stores each adapted weight as the model has it."""
        stored = {self._names.in_model(name) for name in base.shapes}
        return not self._has_parameters and set(self._layers) <= stored

    def merged(self, stored_as: str, weight: Tensor, into: Into) -> Tensor:
        """One weight of the base with what the adapter adds to it, in the weight's own format."""
        name = self._names.in_model(stored_as) or stored_as
        layer = self._layers.get(name)
        changed = into(name, weight)
        if layer is None:
            return changed.to(weight.dtype)
        below = layer.get_base_layer()
        below.weight = nn.Parameter(changed.to(torch.float32, copy=True), requires_grad=False)
        layer.merge()
        merged: Tensor = below.weight.detach().to(weight.dtype)
        below.weight = nn.Parameter(below.weight.to("meta"), requires_grad=False)
        return merged

    def _give_numbers(self, adapted: PeftModel) -> None:
        """Load the adapter's own tensors."""
        stored = load_file(self._folder / "adapter_model.safetensors")
        wanted = {_in_file(name): name for name in adapted.state_dict() if ".lora_" in name}
        if wanted.keys() != stored.keys():
            odd = sorted(wanted.keys() ^ stored.keys())[0]
            raise self._unfit(f"{odd} is only in one of the two")
        adapted.load_state_dict(
            {wanted[name]: tensor.float() for name, tensor in stored.items()},
            strict=False,
            assign=True,
        )

    def _unfit(self, why: str) -> ConfigError:
        return ConfigError(f"{self._folder}: this adapter does not fit the base: {why}")


class StoredNames:
    """The names that a model gives to the tensors of its files."""

    def __init__(self, model: PreTrainedModel) -> None:
        changes = get_model_conversion_mapping(model)
        self._converters = [each for each in changes if isinstance(each, WeightConverter)]
        self._renamings: Any = [each for each in changes if not isinstance(each, WeightConverter)]
        self._prefix = model.base_model_prefix
        self._known = model.state_dict()

    def in_model(self, stored_as: str) -> str | None:
        """The name in the model; None for a tensor that is only a part of one of the model's."""
        name, part_of = rename_source_key(
            stored_as, self._renamings, self._converters, self._prefix, self._known
        )
        return str(name) if part_of is None else None


def _in_file(name: str) -> str:
    """The name in an adapter's file of a tensor of the adapter named "default"."""
    head, _, tail = name.rpartition(".default")
    return head if "lora_magnitude_vector" in head else head + tail


def _write_whole(
    config: ModelConfig, base: Weights, adapter: str, into: Into, folder: Path
) -> None:
    """Merge with the whole base in memory."""
    free = free_memory("cpu")
    if base.bytes > free:
        raise ResourceError(
            f"no room in memory: the files of {config.base} hold the weights in other parts than "
            f"the model, as experts one by one, so it is merged as a whole, which takes "
            f"{base.bytes / 1e9:.1f} GB; {free / 1e9:.1f} GB are free"
        )
    dtype = max((each.dtype for each in base.shapes.values()), key=lambda each: each.itemsize)
    model = AutoModelForCausalLM.from_pretrained(
        str(base.folder), dtype=dtype, trust_remote_code=False, use_safetensors=True
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(into(name, weight))
    adapted: Any = load_adapter(model, adapter, trainable=False)
    whole = adapted.merge_and_unload()
    whole.save_pretrained(folder, max_shard_size=min(SHARD_BYTES, base.largest_file))
