"""Models with random weights: speed and memory do not depend on what a model has learned."""

from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

PAD_ID, BOS_ID, EOS_ID = 0, 1, 2
_POSITIONS = 8192

_SMALL_LAYERS = 4
_WIDE: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
BASES: dict[str, tuple[type[Any], type[Any], dict[str, Any]]] = {
    # Mistral 7B as v0.3, without a window. v0.1 has one of 4096. Both have 32k ids.
    "mistral-7b": (
        MistralForCausalLM,
        MistralConfig,
        {**_WIDE, "vocab_size": 32000, "sliding_window": None},
    ),
    "llama-3-8b": (
        LlamaForCausalLM,
        LlamaConfig,
        {**_WIDE, "vocab_size": 128256, "rope_theta": 500000.0},
    ),
    # Five of six layers have a window, and the head is the embedding.
    "gemma-3-4b": (
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        {
            "vocab_size": 262144,
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "num_hidden_layers": 34,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "sliding_window": 1024,
            "query_pre_attn_scalar": 256,
        },
    ),
}
_TINY: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
}


def small_llama(
    hidden: int, vocabulary: int, layers: int = _SMALL_LAYERS, window: int | None = None
) -> PreTrainedModel:
    """A float32 Llama for CPUs, with heads of 64 and grouped queries.

    With a window it is a Mistral of the same sizes, all of whose layers have that window.
    """
    heads = max(1, hidden // 64)
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden * 2 // 3 // 8 * 8,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 2),
        "max_position_embeddings": _POSITIONS,
        "pad_token_id": PAD_ID,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
    }
    if window is None:
        return LlamaForCausalLM(LlamaConfig(**settings))
    return MistralForCausalLM(MistralConfig(**settings, sliding_window=window))


def quantised_base(
    name: str, device: str, window: int | None = None, *, tiny: bool = False
) -> PreTrainedModel:
    """A model of BASES in NF4 with double quantisation, and bfloat16 for all other weights.

    `tiny` is the same family with six narrow layers. On a CPU the other weights are float32.
    """
    model_type, config_type, settings = BASES[name]
    if tiny:
        settings = {key: _TINY.get(key, value) for key, value in settings.items()}
    if window is not None:
        settings = {**settings, "sliding_window": window}
    dtype = number_format(device)
    config = config_type(
        **settings,
        max_position_embeddings=_POSITIONS,
        pad_token_id=PAD_ID,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        dtype=dtype,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model: PreTrainedModel = model_type._from_config(config, dtype=dtype)
    head = model.get_output_embeddings()
    for parent in list(model.modules()):
        for child, linear in list(parent.named_children()):
            if type(linear) is nn.Linear and linear is not head:
                setattr(parent, child, in_nf4(linear, device))
    return model


def number_format(device: str) -> torch.dtype:
    """What is measured in on a device."""
    return torch.bfloat16 if device == "cuda" else torch.float32


def in_nf4(linear: nn.Linear, device: str) -> Linear4bit:
    """The layer without bias in NF4, which computes in the format that it had."""
    quantised = Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=False,
        compute_dtype=linear.weight.dtype,
        quant_type="nf4",
    )
    quantised.weight = Params4bit(
        linear.weight.data.cpu(), requires_grad=False, quant_type="nf4", compress_statistics=True
    )
    return quantised.to(device)


def with_adapter(base: PreTrainedModel) -> PeftModel:
    """The frozen base with LoRA of rank 16 on all linear layers, without dropout.

    The B matrices are not zero, so that every gradient is nonzero. NF4 layers get PEFT's adapters
    for them, as in training.
    """
    lora = LoraConfig(
        task_type="CAUSAL_LM", r=16, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear"
    )
    made: Any = base
    made.is_loaded_in_4bit = any(isinstance(module, Linear4bit) for module in base.modules())
    model = get_peft_model(base, lora)
    # Seeing this, TRL's DPO would turn the adapters of both sides into bfloat16.
    del made.is_loaded_in_4bit
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.01 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return model
