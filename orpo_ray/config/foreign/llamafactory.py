"""A YAML of LLaMA-Factory in our words."""

from collections.abc import Mapping
from typing import Any

from orpo_ray.config.foreign import lora, method, sources, trainer
from orpo_ray.config.foreign.draft import Draft, as_names
from orpo_ray.config.foreign.recognise import LLAMA_FACTORY

_ATTENTION = {
    "auto": "auto",
    "disabled": "eager",
    "eager": "eager",
    "sdpa": "sdpa",
    "fa2": "flash_attention_2",
}
_CUTS = "LLaMA-Factory cuts prompt and answers that are too long; here the pair is dropped"
_REGISTER = "look this name up in dataset_info.json, and write its file or its name on the hub"
_LIKELIHOOD = "its likelihood is the mean over pairs there, over tokens here"
_ONLINE = ("ONLINE", "REMOTE")
_GALORE = {
    "rank": ("galore_rank", 16),
    "update_every": ("galore_update_interval", 200),
    "scale": ("galore_scale", 2.0),
}
"""Our settings of GaLore, with its own names and defaults for them."""


def read_llamafactory(foreign: Mapping[str, Any], stem: str) -> Draft:
    """The settings, and what differs. `stem` is the file's name."""
    draft = Draft(LLAMA_FACTORY, foreign)
    trainer.put_place(draft, stem)
    _put_model(draft)
    _put_objective(draft)
    _put_adapter(draft)
    _put_data(draft)
    trainer.put_training(draft, default_rate=5.0e-5)
    if draft.flag("use_galore"):
        named = {ours: draft.number(key, default) for ours, (key, default) in _GALORE.items()}
        trainer.put_galore(draft, "use_galore", "galore-adamw", named)
    return draft


def _put_model(draft: Draft) -> None:
    trainer.put_base(draft, "model_name_or_path", "model_revision")
    trainer.put_format(draft)
    written = draft.take("flash_attn")
    trainer.put_attention(draft, _ATTENTION.get(str(written), written))
    sources.put_template(draft, "template", draft.take("template"))


def _put_objective(draft: Draft) -> None:
    stage, loss = str(draft.take("stage", "sft")), str(draft.take("pref_loss", "sigmoid"))
    if stage not in ("sft", "dpo", "kto"):
        raise method.refuse_method(f"stage: {stage}")
    beta = draft.number("pref_beta", 0.1)
    if stage == "sft":
        method.put_sft(draft, "full" if draft.flag("train_on_prompt") else "response")
        if not draft.flag("mask_history"):
            method.put_all_turns(draft, "without mask_history earlier turns are trained, too")
    elif stage == "kto":
        weights = (draft.number("kto_chosen_weight", 1), draft.number("kto_rejected_weight", 1))
        method.put_kto(draft, beta, *weights)
    elif loss == "orpo":
        method.put_orpo(draft, beta, "pref_beta of ORPO", nll_on="response")
        draft.remark("objective.lambda", _LIKELIHOOD)
    elif loss == "simpo":
        gamma = draft.number("simpo_gamma", 0.5)
        method.put_simpo(
            draft, beta, gamma / beta, f"simpo_gamma {gamma} / pref_beta {beta}", nll=0
        )
    else:
        method.put_dpo(draft, [loss], beta, draft.number("dpo_label_smoothing", 0))
    if stage == "dpo":
        method.put_nll(draft, draft.number("pref_ftx", 0), "pref_ftx")


def _put_adapter(draft: Draft) -> None:
    tuning, bits = str(draft.take("finetuning_type", "lora")), draft.number("quantization_bit")
    quant_type = draft.take("quantization_type")
    if tuning == "full":
        lora.put_full(draft)
        lora.give_kto_an_adapter(draft)
        return
    lora.put_quantization(draft, bits, quant_type)
    rank = draft.number("lora_rank", 8)
    lora.put_lora(draft, rank, draft.number("lora_alpha", 2 * rank), draft.flag("use_rslora"))
    if not draft.is_set("lora_alpha"):
        draft.remark("adapter.alpha", f"lora_alpha: not set; {draft.project} takes twice the rank")
    if tuning != "lora":
        draft.remark("adapter.kind", f"finetuning_type: {tuning}: not here; lora or none")
    lora.put_dropout(draft, draft.number("lora_dropout", 0))
    lora.put_targets(draft, draft.take("lora_target"), "")
    if draft.flag("pissa_init"):
        lora.put_init(draft, "pissa")
    if draft.flag("use_dora"):
        draft.put("adapter.dora", True)
    start = as_names(draft.take("adapter_name_or_path"))
    if start:
        told = "only the last of several adapters can be named" if len(start) > 1 else ""
        draft.put("adapter.init_from", start[-1], told)


def _put_data(draft: Draft) -> None:
    limit = draft.number("max_samples")
    train = _named(draft, "dataset", limit)
    sources.put_sources(draft, train, _named(draft, "eval_dataset", limit))
    if draft.is_set("interleave_probs"):
        told = f"interleave_probs: {draft.take('interleave_probs')}: here each source has a weight"
        draft.remark("data.train", told)
    sources.put_held_out(draft, "val_size", draft.number("val_size"))
    whole = draft.number("cutoff_len")
    if whole is None:
        draft.put_default("data.max_length", 2048, "cutoff_len")
        whole = 2048
    sources.put_lengths(draft, whole, None, _CUTS)


def _named(draft: Draft, key: str, limit: Any) -> list[dict[str, Any]]:
    """Datasets by their names in dataset_info.json, a file in LLaMA-Factory's data folder."""
    folder = str(draft.take("dataset_dir", "data")).rstrip("/")
    found = []
    for name in as_names(draft.take(key)):
        if name.startswith("REMOTE:"):
            written = name.removeprefix("REMOTE:")
        elif folder in _ONLINE or "/" in name:
            written = name
        elif sources.is_file(name):
            written = f"{folder}/{name}"
        else:
            written = f"{folder}/{name}.json"
            draft.remark(
                "data.train" if key == "dataset" else "data.eval", f"{key}: {name}: {_REGISTER}"
            )
        found.append(sources.source(written, limit=limit))
    return found
