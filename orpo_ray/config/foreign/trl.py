"""A YAML of TRL's scripts, or of the alignment handbook's on top of them, in our words."""

from collections.abc import Mapping
from typing import Any

from orpo_ray.config.foreign import lora, method, sources, trainer
from orpo_ray.config.foreign.draft import Draft, as_names, as_number, is_unset
from orpo_ray.config.foreign.recognise import TRL
from orpo_ray.errors import ConfigError

_TRUNCATES = (
    "TRL cuts long prompts on the left; an answer that is too long is dropped here, not cut"
)
_CUTS_ENDS = "TRL cuts the ends of pairs that are too long; here they are dropped"
_PEFT_CHOOSES = (
    "lora_target_modules: not set; PEFT then chooses by architecture, often q_proj and v_proj alone"
)
_NO_TRAINER = "the file does not say which trainer reads it"
_DEFAULT_RATES = {"sft": 2.0e-5}
_DEFAULT_RATE = 1.0e-6


def read_trl(foreign: Mapping[str, Any], stem: str) -> Draft:
    """The settings, and what differs. `stem` is the file's name, which may name the method."""
    draft = Draft(TRL, foreign)
    trainer.put_place(draft, stem)
    _put_model(draft)
    _put_objective(draft, stem)
    _put_adapter(draft)
    evaluated = _put_training(draft)
    _put_data(draft, evaluated)
    return draft


def _put_model(draft: Draft) -> None:
    trainer.put_base(draft, "model_name_or_path", "model_revision")
    if "lora" in str(draft.settings["model.base"]).lower():
        told = "if this is an adapter, name its base here, and the adapter as adapter.init_from"
        draft.remark("model.base", told)
    trainer.put_format(draft)
    trainer.put_attention(draft, draft.take("attn_implementation"))
    sources.put_template(draft, "chat_template", draft.take("chat_template"))


def _put_objective(draft: Draft, stem: str) -> None:
    losses = as_names(draft.take("loss_type"))
    found, because = _trainer_of(draft, losses, stem)
    beta = draft.number("beta", 0.1)
    if found == "orpo":
        method.put_orpo(draft, beta, "beta of TRL's ORPO", nll_on="full")
    elif found == "kto":
        weights = (draft.number("desirable_weight", 1), draft.number("undesirable_weight", 1))
        method.put_kto(draft, beta, *weights)
    elif found == "simpo":
        _put_simpo(draft, beta)
    elif found == "cpo":
        loss = losses[0] if losses else "sigmoid"
        method.put_cpo(draft, beta, draft.number("cpo_alpha", 1), loss)
    elif found == "sft":
        method.put_sft(draft)
    else:
        losses = losses or ([found] if found == "ipo" else [])
        method.put_dpo(draft, losses, beta, draft.number("label_smoothing", 0))
        method.put_mixed_losses(draft, losses, "loss_weights")
        method.put_nll(draft, draft.number("rpo_alpha", 0), "rpo_alpha")
    if found in ("orpo", "kto", "sft") and losses and losses != [found]:
        told = f"loss_type: {', '.join(losses)}: not here for {found}, whose own loss is taken"
        draft.remark("objective.kind", told)
    draft.remark("objective.kind", because)


def _put_simpo(draft: Draft, beta: float) -> None:
    if draft.is_set("gamma_beta_ratio"):
        ratio, named = draft.number("gamma_beta_ratio"), ""
    else:
        gamma = draft.number("simpo_gamma", draft.number("gamma", 0.5))
        ratio, named = gamma / beta, f"simpo_gamma {gamma} / beta {beta}"
    # SimPO's own script adds no likelihood; TRL's CPO trainer does.
    own = draft.is_set("gamma_beta_ratio")
    method.put_simpo(draft, beta, ratio, named, draft.number("cpo_alpha", 0 if own else 1))


def _trainer_of(draft: Draft, losses: list[str], stem: str) -> tuple[str, str]:
    """The method, and how it was found if no key says it."""
    if "simpo" in losses or draft.is_set("gamma_beta_ratio") or draft.is_set("simpo_gamma"):
        return "simpo", ""
    if draft.is_set("cpo_alpha"):
        return "cpo", ""
    if (
        draft.is_set("desirable_weight")
        or draft.is_set("undesirable_weight")
        or losses[:1] == ["kto"]
    ):
        return "kto", ""
    with_beta = bool(losses) or draft.is_set("beta")
    named = [name for name in method.METHODS if name != "sft" or not with_beta]
    for key in ("trainer_type", "output_dir", "hub_model_id", "run_name", "its name"):
        text = stem if key == "its name" else str(draft.foreign.get(key, ""))
        # A path such as sft-dpo ends with the last stage.
        last = max(named, key=text.lower().rfind)
        if last in text.lower():
            return last, f"{_NO_TRAINER}; {key} says {last}"
    if with_beta:
        return (
            "dpo",
            f"{_NO_TRAINER}; beta or loss_type is set, so DPO is assumed. If it was ORPO, write "
            "beta as objective.lambda",
        )
    return "sft", f"{_NO_TRAINER}; without a beta it is sft"


def _put_adapter(draft: Draft) -> None:
    bits = 4 if draft.flag("load_in_4bit") else None
    bits = 8 if draft.flag("load_in_8bit") else bits
    quant_type = draft.take("bnb_4bit_quant_type")
    if not draft.flag("use_peft"):
        lora.put_full(draft, "use_peft is not set, so all weights are trained, without LoRA")
        if bits:
            told = f"load_in_{bits}bit: quantised weights are not trained; use_peft adds an adapter"
            draft.remark("model.quantization", told)
        lora.give_kto_an_adapter(draft)
        for key in ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "use_dora"):
            draft.lack(key, "has no effect there without use_peft")
        return
    lora.put_quantization(draft, bits, quant_type)
    rank, alpha = draft.number("lora_r", 16), draft.number("lora_alpha", 32)
    lora.put_lora(draft, rank, alpha, draft.flag("use_rslora"))
    lora.put_dropout(draft, draft.number("lora_dropout", 0.05))
    lora.put_targets(draft, draft.take("lora_target_modules"), _PEFT_CHOOSES)
    lora.put_init(draft, draft.take("init_lora_weights"))
    if draft.flag("use_dora"):
        draft.put("adapter.dora", True)


def _put_data(draft: Draft, evaluated: bool) -> None:
    size = draft.number("test_split_size")
    if draft.is_set("dataset_mixer"):
        train, held_out = _mixer(draft)
    elif draft.is_set("dataset_mixture") or draft.is_set("datasets"):
        train, held_out, inside = _mixture(draft)
        size = inside if size is None else size
    else:
        train, held_out = _one_dataset(draft)
    sources.put_sources(draft, train, held_out if evaluated else [])
    sources.put_held_out(draft, "test_split_size", size)
    prompt = draft.number("max_prompt_length")
    cut = _TRUNCATES if prompt is not None else _CUTS_ENDS
    whole = draft.take_first("max_length", "max_seq_length")
    if whole is None:
        draft.put_default("data.max_length", 1024, "max_length")
        whole = 1024
    sources.put_lengths(draft, whole, prompt, cut)


def _one_dataset(draft: Draft) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    name = draft.take("dataset_name")
    splits = (draft.take("dataset_train_split", "train"), draft.take("dataset_test_split", "test"))
    if name is None:
        return [], []
    config = draft.take("dataset_config")
    train, held_out = (sources.source(name, split, config=config) for split in splits)
    return [train], [held_out]


def _mixer(draft: Draft) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The handbook's older form: a share of each dataset, and splits that hold for all."""
    shares = draft.take("dataset_mixer")
    splits = as_names(draft.take("dataset_splits", ["train", "test"]))
    names = as_names(list(shares) if isinstance(shares, dict) else shares)
    weights = shares if isinstance(shares, dict) else {}
    train, held_out = [], []
    for name in names:
        weight = weights.get(name, 1)
        for split in splits:
            if "test" in split:
                held_out.append(sources.source(name, split))
            else:
                train.append(sources.source(name, split, weight=weight))
    return train, held_out


def _mixture(draft: Draft) -> tuple[list[dict[str, Any]], list[dict[str, Any]], Any]:
    """Datasets that are put together, and the size of the part that evaluation takes of them."""
    key = "dataset_mixture" if draft.is_set("dataset_mixture") else "datasets"
    written = draft.take(key)
    mixture = written if isinstance(written, dict) else {"datasets": written}
    entries = mixture.get("datasets") or []
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ConfigError(f"{key}: must be a list of datasets, each a section with id or path")
    train = []
    for entry in entries:
        name = entry.get("id") or entry.get("path")
        config = entry.get("config") or entry.get("name")
        weight = entry.get("weight", entry.get("fraction"))
        for file in sources.files_of(name, entry.get("data_files")):
            train.append(sources.source(file, entry.get("split"), config=config, weight=weight))
    if len(entries) > 1 and any("test" in str(entry.get("split")) for entry in entries):
        told = f"{key}: its test splits are trained on, too: all rows are put together, then split"
        draft.remark("data.train", told)
    if not is_unset(mixture.get("seed")):
        draft.remark(
            "data.train", f"{key}: seed: {mixture['seed']}: training.seed is for all draws"
        )
    return train, [], as_number(f"{key}.test_split_size", mixture.get("test_split_size"))


def _put_training(draft: Draft) -> bool:
    """Put the settings of the training. Returns whether TRL evaluates during training."""
    kind = str(draft.settings["objective.kind"])
    return trainer.put_training(draft, _DEFAULT_RATES.get(kind, _DEFAULT_RATE))
