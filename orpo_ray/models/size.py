"""How large a base is and which layers it has, by its configuration: no weight is loaded."""

from dataclasses import dataclass

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from orpo_ray.config import RunConfig
from orpo_ray.config.model import ModelConfig
from orpo_ray.config.near import near_name
from orpo_ray.errors import ConfigError
from orpo_ray.models.hardware import DTYPES
from orpo_ray.models.tokenizer import base_location, explain_load_error

# NF4 with double quantisation: half a byte, and an 8-bit scale for each block of 64.
_BYTES = {"nf4": 0.5 + 1 / 64, "int8": 1.0}


@dataclass(frozen=True)
class Parameters:
    """Counts of a model's parameters.

    `linear` counts those of the linear layers but the head: they can be quantised. `others` counts
    all others. `widths` is the sum of the input and output sizes of those linear layers.
    """

    linear: int
    others: int
    widths: int

    @property
    def total(self) -> int:
        """The number of all parameters."""
        return self.linear + self.others

    def bytes(self, quantization: str, dtype: str) -> int:
        """Bytes that the frozen weights take in memory."""
        plain = DTYPES[dtype].itemsize
        return int(self.linear * _BYTES.get(quantization, plain) + self.others * plain)

    def adapter(self, rank: int) -> int:
        """Parameters of a LoRA adapter of that rank on every linear layer but the head."""
        return rank * self.widths


def count_parameters(config: ModelConfig) -> Parameters:
    """Count a base's parameters on torch's meta device, which holds no numbers."""
    model = model_without_numbers(config)
    linears = _linear_layers(model).values()
    linear = sum(m.weight.numel() for m in linears)
    total = sum(p.numel() for p in model.parameters())
    return Parameters(linear, total - linear, sum(m.in_features + m.out_features for m in linears))


def refuse_unknown_targets(config: RunConfig) -> None:
    """Raise ConfigError if one of `adapter.targets` names no layer of the base.

    A target is the last part of a layer's name, or several parts of it.
    """
    model = model_without_numbers(config.model)
    names = [name for name, _ in model.named_modules() if name]
    linear = dict.fromkeys(name.rpartition(".")[2] for name in _linear_layers(model))
    for target in config.adapter.targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            near = near_name(target, linear)
            hint = f"did you mean {near}?" if near else f"its linear layers are {', '.join(linear)}"
            raise ConfigError(f"adapter.targets: {config.model.base} has no layer {target}; {hint}")
    _refuse_tied(config, model)


def _refuse_tied(config: RunConfig, model: PreTrainedModel) -> None:
    """Raise ConfigError for a target whose weights another layer shares.

    Merging an adapter on one of them would change both.
    """
    if not model.config.get_text_config().tie_word_embeddings:
        return
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    tied = [name for name, module in model.named_modules() if module in ends]
    for target in config.adapter.targets:
        if any(name == target or name.endswith(f".{target}") for name in tied):
            raise ConfigError(
                f"adapter.targets: {target} of {config.model.base} is tied: {' and '.join(tied)} "
                "share their weights, and merging the adapter would change both; remove it"
            )


def _linear_layers(model: PreTrainedModel) -> dict[str, torch.nn.Linear]:
    """The linear layers but the head, by name."""
    head = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }


def model_without_numbers(config: ModelConfig) -> PreTrainedModel:
    """The base on torch's meta device."""
    try:
        found = AutoConfig.from_pretrained(
            base_location(config), revision=config.revision, trust_remote_code=False
        )
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                found, trust_remote_code=False
            )
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(explain_load_error(config.base, "configuration", error)) from error
    return model
