"""What is trained, and in which format the frozen base is held."""

from typing import Any

from orpo_ray.config.foreign.draft import Draft, as_names

_ALL_LINEAR = ("all", "all-linear", "all_linear")


def put_full(draft: Draft, *remarks: str) -> None:
    """All weights of the base are trained."""
    draft.put("adapter.kind", "none", *remarks)
    draft.put("model.quantization", "none")


def put_lora(draft: Draft, rank: Any, alpha: Any, rank_stabilised: bool) -> None:
    """The adapter's size, its scale, and the learning rate of its B (LoRA+)."""
    draft.put("adapter.kind", "lora")
    draft.put("adapter.r", rank)
    draft.put("adapter.alpha", alpha)
    if rank_stabilised:
        draft.put("adapter.rslora", True)
    ratio = draft.number("loraplus_lr_ratio")
    if ratio is not None and ratio >= 1:
        draft.put("adapter.lora_plus_ratio", ratio)
    elif ratio is not None:
        draft.remark("adapter.kind", f"loraplus_lr_ratio: {ratio}: not here below 1; left out")


def put_init(draft: Draft, written: Any) -> None:
    """How the adapter starts, after its format and dropout were put."""
    if written is None or str(written).lower() in ("true", "false"):
        return
    name = str(written).lower().partition("_")[0]
    held = draft.settings["model.quantization"]
    fits = {"eva": True, "loftq": held == "nf4"} | dict.fromkeys(("olora", "pissa"), held == "none")
    if name not in fits:
        draft.remark("adapter.kind", f"the start {written}: not here; A is random and B zero")
    elif not fits[name]:
        draft.remark("adapter.kind", f"the start {written}: not here on a base held in {held}")
    else:
        draft.put("adapter.init", name)
        if name in ("olora", "pissa") and draft.settings.get("adapter.dropout"):
            told = f"the start {written}: dropout would leave out a part of the weights"
            draft.put("adapter.dropout", 0.0, told)


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
