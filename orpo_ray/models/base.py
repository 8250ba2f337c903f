"""The base model: loaded, quantised if the config says so, and frozen."""

from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from orpo_ray.config.model import ModelConfig
from orpo_ray.errors import ConfigError, ResourceError
from orpo_ray.models.hardware import DTYPES
from orpo_ray.models.tokenizer import base_location, explain_load_error
from orpo_ray.runs.console import SILENT, Announce

QUANTISED = (Linear4bit, Linear8bitLt)
"""The layers that hold quantised weights."""

# Files with the same weights once more, in another layout or for other programs.
_NOT_FILES = ["consolidated*", "*/*"]
_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]


def load_base(
    config: ModelConfig,
    device: str,
    dtype: str,
    attention: str,
    *,
    trainable: bool,
    announce: Announce = SILENT.announce,
) -> PreTrainedModel:
    """The causal language model on its device, without dropout of its own.

    A frozen base has the run's dtype. If every weight is trained, the weights are float32, because
    the optimizer needs full precision.
    """
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            base_location(config),
            config=_without_dropout(config, announce),
            revision=config.revision,
            dtype=torch.float32 if trainable else DTYPES[dtype],
            attn_implementation=attention,
            quantization_config=_quantization(config, DTYPES[dtype]),
            device_map={"": _numbered(device)},
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, with the name of the tensor
        )
    except torch.OutOfMemoryError as error:
        raise ResourceError(
            f"model.base: {config.base} does not fit into the memory of {device}"
        ) from error
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ConfigError(explain_load_error(config.base, "model", error)) from error
    model: PreTrainedModel = loaded[0]
    _refuse_incomplete(config.base, model, loaded[1])
    _keep_training_format(model)
    model.requires_grad_(trainable)
    return model


def _numbered(device: str) -> str:
    """The device, with the number of this process's GPU.

    The threads that load weights would take "cuda" for the first GPU.
    """
    return f"cuda:{torch.cuda.current_device()}" if device == "cuda" else device


def _without_dropout(config: ModelConfig, announce: Announce) -> PreTrainedConfig:
    """The base's configuration with its dropout at 0.

    Reference log-probs are computed without dropout, and the policy must start from the same model.
    """
    found: PreTrainedConfig = AutoConfig.from_pretrained(
        base_location(config), revision=config.revision, trust_remote_code=False
    )
    rates = {
        name: value
        for name, value in vars(found).items()
        if ("dropout" in name or name.endswith("pdrop")) and isinstance(value, float) and value > 0
    }
    for name in rates:
        setattr(found, name, 0.0)
    if rates:
        announce(f"the base's own dropout is switched off: {', '.join(sorted(rates))}")
    return found


def _refuse_incomplete(base: str, model: torch.nn.Module, loading: dict[str, Any]) -> None:
    """Raise ConfigError if weights are missing or have another shape.

    transformers would take random weights in their place.
    """
    absent = sorted(loading["missing_keys"])
    absent += sorted(str(entry[0]) for entry in loading["mismatched_keys"])
    absent += [name for name, module in model.named_modules() if _has_other_shape(module)]
    if absent:
        more = f" (and {len(absent) - 1} more)" if len(absent) > 1 else ""
        raise ConfigError(
            f"model.base: the weights of {base} lack {absent[0]} or have it in another shape than "
            f"config.json says{more}"
        )


def _has_other_shape(module: torch.nn.Module) -> bool:
    """Whether a quantised layer holds weights of another shape; transformers does not check."""
    if isinstance(module, Linear4bit):
        # None if the weight is missing from the file: it is then among the missing keys.
        state = getattr(module.weight, "quant_state", None)
        shape = state.shape if state else module.weight.shape
    elif isinstance(module, Linear8bitLt):
        shape = module.weight.shape
    else:
        return False
    return tuple(shape) != (module.out_features, module.in_features)


def fetch_base(config: ModelConfig) -> Path:
    """Download the base's files to this server, unless they are there; returns their folder.

    Otherwise each of the processes that load the base would download them.
    """
    folder = Path(base_location(config))
    if folder.is_dir():
        return folder
    try:
        found = snapshot_download(
            base_location(config),
            revision=config.revision,
            allow_patterns=_FILES,
            ignore_patterns=_NOT_FILES,
        )
    except (OSError, ValueError) as error:
        raise ConfigError(explain_load_error(config.base, "model", error)) from error
    return Path(found)


def count_quantized(model: torch.nn.Module) -> int:
    """How many modules of a model hold quantised weights."""
    return sum(isinstance(module, QUANTISED) for module in model.modules())


def _keep_training_format(model: torch.nn.Module) -> None:
    """Have bitsandbytes compute in the same way in training and in evaluation.

    On a CPU with AVX512-BF16 it repacks 4-bit weights at the first evaluation. The repacked form
    computes in bfloat16 and has no backward pass: gradients below it would be lost without an
    error. 8-bit layers quantise activations in evaluation only: reference log-probs would not be
    those of the policy at step 0.
    """
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
        elif isinstance(module, Linear8bitLt):
            module.register_forward_pre_hook(_compute_as_in_training)


def _compute_as_in_training(module: torch.nn.Module, inputs: object) -> None:
    module.training = True


def _quantization(config: ModelConfig, compute_dtype: torch.dtype) -> BitsAndBytesConfig | None:
    if config.quantization == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute_dtype,
        )
    if config.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return None
