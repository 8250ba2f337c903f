"""What the machine can compute with, and the number format and attention that a run takes."""

import importlib.util
from collections.abc import Collection
from dataclasses import dataclass

import torch

from orpo_ray.config.model import ModelConfig
from orpo_ray.errors import ResourceError, SetupError
from orpo_ray.models.traits import ATTENTIONS

# Compute capability that flash-attn 2 needs: Ampere and later.
_FLASH_ATTENTION_FROM = (8, 0)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """What one process computes on.

    `device` is "cpu" or "cuda". `flash_attention` says whether the flash-attn package is installed
    and runs on it. `memory` is that of a GPU, in bytes; None on a CPU.
    """

    device: str
    name: str
    bfloat16: bool
    flash_attention: bool
    memory: int | None = None


CPU = Hardware(device="cpu", name="CPU", bfloat16=False, flash_attention=False)


@dataclass(frozen=True)
class Numerics:
    """Number format and attention of a run, with the reasons to announce."""

    dtype: str
    attention: str
    reasons: tuple[str, ...]


def probe_hardware() -> Hardware:
    """Look at the machine: the first GPU if there is one, else the CPU."""
    if not torch.cuda.is_available():
        return CPU
    return Hardware(
        device="cuda",
        name=torch.cuda.get_device_name(),
        bfloat16=torch.cuda.is_bf16_supported(including_emulation=False),
        flash_attention=torch.cuda.get_device_capability() >= _FLASH_ATTENTION_FROM
        and importlib.util.find_spec("flash_attn") is not None,
        memory=torch.cuda.get_device_properties().total_memory,
    )


def choose_numerics(
    config: ModelConfig, hardware: Hardware, known: Collection[str] = ATTENTIONS
) -> Numerics:
    """Decide dtype and attention; the base knows the attentions in `known`.

    Raises ResourceError if the config names what the machine cannot do.
    """
    on_gpu = hardware.device != "cpu"
    dtype: str = config.dtype
    why_dtype = "as configured"
    if dtype == "auto":
        dtype = _best_dtype(hardware)
        why_dtype = f"the best that {hardware.name} computes"
    if dtype == "float16" and not on_gpu:
        raise ResourceError(
            "model.dtype: float16 trains only on a GPU, and there is none here; use float32 or auto"
        )
    if dtype == "bfloat16" and on_gpu and not hardware.bfloat16:
        raise SetupError(f"model.dtype: {hardware.name} has no bfloat16; use float16 or auto")
    attention: str = config.attention
    why_attention = "as configured"
    flash_fits = hardware.flash_attention and dtype != "float32"
    if attention == "auto":
        attention, why_attention = _best_attention(flash_fits, known)
    if attention == "flash_attention_2" and not flash_fits:
        raise ResourceError(
            "model.attention: flash_attention_2 needs a GPU, a 16-bit dtype and the flash-attn "
            "package; use auto"
        )
    return Numerics(
        dtype, attention, (f"dtype {dtype}: {why_dtype}", f"attention {attention}: {why_attention}")
    )


def _best_dtype(hardware: Hardware) -> str:
    """The format of 16 bits that a GPU has; a CPU computes in float32."""
    if hardware.device == "cpu":
        return "float32"
    return "bfloat16" if hardware.bfloat16 else "float16"


def _best_attention(flash_fits: bool, known: Collection[str]) -> tuple[str, str]:
    """The best attention that both machine and base have, and why."""
    if flash_fits and "flash_attention_2" in known:
        return "flash_attention_2", "flash-attn is installed"
    if "sdpa" in known:
        return "sdpa", "torch's own attention"
    return "eager", "the base knows no other that is here"
