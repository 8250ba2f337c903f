"""What is trained, and in which format the frozen base is held."""

import math
from typing import Any

from orpo_ray.config.foreign.draft import Draft, as_names

_ALL_LINEAR = ("all", "all-linear", "all_linear")


def put_full(draft: Draft, *remarks: str) -> None:
    """All weights of the base are trained."""
    draft.put("adapter.kind", "none", *remarks)
    draft.put("model.quantization", "none")


def put_lora(draft: Draft, rank: Any, alpha: Any, rank_stabilised: bool) -> None:
    """The adapter's size; its scale is alpha / r here, alpha / sqrt(r) with rank stabilisation."""
    draft.put("adapter.kind", "lora")
    draft.put("adapter.r", rank)
    if rank_stabilised:
        scaled = round(alpha * math.sqrt(rank), 4)
        draft.put("adapter.alpha", scaled, f"{alpha} x sqrt(r): the scale of rank-stabilised LoRA")
    else:
        draft.put("adapter.alpha", alpha)


def put_dropout(draft: Draft, rate: float) -> None:
    """LoRA's dropout. TRL's preference trainers set it to 0 unless disable_dropout is false."""
    switched_off = draft.flag("disable_dropout", default=draft.settings["objective.kind"] != "sft")
    if switched_off and rate:
        named = rate if draft.is_set("lora_dropout") else f"{rate} by default"
        remark = f"lora_dropout: {named}; but the trainer there sets it to 0 (disable_dropout)"
        draft.put("adapter.dropout", 0.0, remark)
    else:
        draft.put("adapter.dropout", rate)


def put_targets(draft: Draft, written: Any, unset: str) -> None:
    """The layers that LoRA adapts; `unset` says what the project does if none are named."""
    names = as_names(written)
    if not names:
        draft.put("adapter.targets", "all-linear", unset)
    elif any(name in _ALL_LINEAR for name in names):
        draft.put("adapter.targets", "all-linear")
    else:
        draft.put("adapter.targets", names)


def put_quantization(draft: Draft, bits: int | None, quant_type: Any = None) -> None:
    """The format of the frozen base."""
    if bits is None:
        draft.put("model.quantization", "none")
    elif bits == 8:
        draft.put("model.quantization", "int8")
    elif bits == 4 and quant_type in (None, "nf4"):
        draft.put("model.quantization", "nf4")
    else:
        told = f"{bits} bits" if bits != 4 else f"{bits} bits as {quant_type}"
        draft.put("model.quantization", "nf4", f"{told}: not here; nf4 is the nearest")


def give_kto_an_adapter(draft: Draft) -> None:
    """Put an adapter for KTO: its reference is the model without the adapter, so it needs one."""
    if draft.settings["objective.kind"] == "kto" and draft.settings["adapter.kind"] == "none":
        draft.put(
            "adapter.kind",
            "lora",
            "KTO needs an adapter here: the model without it is the reference",
        )
