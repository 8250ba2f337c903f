"""A YAML of Axolotl in our words; its preference methods are computed by TRL's trainers."""

from collections.abc import Mapping
from typing import Any

from orpo_ray.config.foreign import lora, method, sources, trainer
from orpo_ray.config.foreign.draft import Draft, as_names, is_unset
from orpo_ray.config.foreign.recognise import AXOLOTL

_KNOWN_ROWS = "the shape of the rows is recognised here; type has no counterpart"
_ROW_KEYS = (
    "ds_type",
    "name",
    "type",
    "path",
    "data_files",
    "split",
    "revision",
    "trust_remote_code",
)


def read_axolotl(foreign: Mapping[str, Any], stem: str) -> Draft:
    """The settings, and what differs. `stem` is the file's name."""
    draft = Draft(AXOLOTL, foreign)
    trainer.put_place(draft, stem)
    _put_model(draft)
    _put_objective(draft)
    _put_adapter(draft)
    _put_data(draft)
    _put_training(draft)
    return draft


def _put_model(draft: Draft) -> None:
    trainer.put_base(draft, "base_model", "revision_of_model")
    trainer.put_format(draft)
    trainer.put_attention(draft, _attention(draft))
    template = draft.take("chat_template")
    inline = draft.take("chat_template_jinja")
    sources.put_template(draft, "chat_template", template if inline is None else inline)


def _attention(draft: Draft) -> Any:
    written = draft.take("attn_implementation")
    flags = {
        "flash_attention": "flash_attention_2",
        "sdp_attention": "sdpa",
        "eager_attention": "eager",
        "xformers_attention": "xformers",
    }
    on = [ours for key, ours in flags.items() if draft.flag(key)]
    if not on and draft.is_set("flash_attention"):
        on = ["sdpa"]  # the file switches flash attention off, and auto might choose it
    return written if written is not None or not on else on[0]


def _put_objective(draft: Draft) -> None:
    rl, inner = draft.take("rl"), draft.take("trl")
    beta = draft.number("rl_beta", inner.get("beta") if isinstance(inner, dict) else None)
    others = [key for key in inner if key != "beta"] if isinstance(inner, dict) else []
    if others:
        draft.remark("objective.kind", f"trl: {', '.join(others)}: not here")
    found = "sft" if rl is None or rl is False else str(rl).lower()
    if found not in ("sft", "dpo", "ipo", "orpo", "kto", "simpo"):
        raise method.refuse_method(f"rl: {rl}")
    if found == "orpo":
        weight = draft.number("orpo_alpha", 0.1)
        named = "orpo_alpha" if beta is None else "rl_beta"
        method.put_orpo(draft, weight if beta is None else beta, named, nll_on="full")
        return
    beta = 0.1 if beta is None else beta
    if found == "sft":
        method.put_sft(draft, "full" if draft.flag("train_on_inputs") else "response")
        method.put_all_turns(draft, "roles_to_train has every assistant turn unless it is set")
    elif found == "kto":
        weights = (
            draft.number("kto_desirable_weight", 1),
            draft.number("kto_undesirable_weight", 1),
        )
        method.put_kto(draft, beta, *weights)
    elif found == "simpo":
        gamma = draft.number("simpo_gamma", 0.5)
        named = f"simpo_gamma {gamma} / rl_beta {beta}"
        method.put_simpo(draft, beta, gamma / beta, named, draft.number("cpo_alpha", 1))
    else:
        _put_dpo(draft, found, beta)


def _put_dpo(draft: Draft, found: str, beta: float) -> None:
    written = as_names(draft.take("dpo_loss_type"))
    losses = ["ipo"] if found == "ipo" else written
    method.put_dpo(draft, losses, beta, draft.number("dpo_label_smoothing", 0))
    method.put_mixed_losses(draft, losses, "dpo_loss_weights")
    method.put_nll(draft, draft.number("rpo_alpha", 0), "rpo_alpha")


def _put_adapter(draft: Draft) -> None:
    adapter = draft.take("adapter")
    bits = 4 if draft.flag("load_in_4bit") or adapter == "qlora" else None
    bits = 8 if draft.flag("load_in_8bit") and bits is None else bits
    if adapter is None:
        lora.put_full(draft, "without adapter all weights are trained")
        lora.give_kto_an_adapter(draft)
        return
    lora.put_quantization(draft, bits)
    rank = draft.number("lora_r", 8)
    lora.put_lora(draft, rank, draft.number("lora_alpha", 16), draft.flag("peft_use_rslora"))
    if adapter not in ("lora", "qlora"):
        draft.remark("adapter.kind", f"adapter: {adapter}: not here; lora is the nearest")
    lora.put_dropout(draft, draft.number("lora_dropout", 0))
    named = draft.take("lora_target_modules")
    linear = draft.flag("lora_target_linear")
    unset = "" if linear else "no layers are named there"
    lora.put_targets(draft, "all-linear" if linear else named, unset)
    if linear and named:
        draft.remark("adapter.targets", "lora_target_modules: lora_target_linear has them all")
    lora.put_init(draft, draft.take("peft_init_lora_weights"))
    if draft.flag("peft_use_dora"):
        draft.put("adapter.dora", True)
    if draft.is_set("lora_model_dir"):
        draft.put("adapter.init_from", draft.take("lora_model_dir"))


def _put_data(draft: Draft) -> None:
    train, held_out = _datasets(draft, "datasets"), _datasets(draft, "test_datasets")
    sources.put_sources(draft, train, held_out)
    for entry in [*_entries(draft, "datasets"), *_entries(draft, "test_datasets")]:
        _put_columns(draft, entry)
    sources.put_held_out(draft, "val_set_size", draft.number("val_set_size"))
    whole = draft.number("sequence_len")
    if whole is None:
        draft.put_default("data.max_length", 512, "sequence_len")
        whole = 512
    prompt = draft.number("max_prompt_len")
    sources.put_lengths(draft, whole, prompt, cut="")
    draft.put("data.overlong", "drop")


def _datasets(draft: Draft, key: str) -> list[dict[str, Any]]:
    ours = "data.train" if key == "datasets" else "data.eval"
    found = []
    for entry in _entries(draft, key):
        name = entry.get("path")
        if not is_unset(entry.get("type", entry.get("ds_type"))):
            draft.remark(ours, f"{name}: type: {_type_of(entry)}: {_KNOWN_ROWS}")
        more = {"config": entry.get("name"), "revision": entry.get("revision")}
        for file in sources.files_of(name, entry.get("data_files")):
            found.append(sources.source(file, entry.get("split"), **more))
    return found


def _entries(draft: Draft, key: str) -> list[Mapping[str, Any]]:
    written = draft.take(key, [])
    entries = written if isinstance(written, list) else [written]
    return [entry if isinstance(entry, dict) else {"path": str(entry)} for entry in entries]


def _type_of(entry: Mapping[str, Any]) -> str:
    """A dataset's type in a word: it may be a section of its own."""
    written = entry.get("type", entry.get("ds_type"))
    return "a section" if isinstance(written, dict) else str(written)


def _put_columns(draft: Draft, entry: Mapping[str, Any]) -> None:
    """Put the columns of a pair, if a dataset names all of them. A remark names its other keys."""
    name, custom = entry.get("path"), entry.get("type")
    named = {**entry, **custom} if isinstance(custom, dict) else entry
    prompt = named.get("field_messages") or named.get("field_prompt")
    columns = {
        "prompt": prompt,
        "chosen": named.get("field_chosen"),
        "rejected": named.get("field_rejected"),
    }
    used = ["field_messages", "field_prompt", "field_chosen", "field_rejected"]
    if all(columns.values()):
        if named.get("field_system"):
            columns["system"] = named["field_system"]
            used.append("field_system")
        if draft.settings.get("data.columns", columns) == columns:
            draft.put("data.columns", columns)
        else:
            draft.remark("data.columns", f"{name}: has columns of its own; all sources share these")
    others = [key for key in named if key not in (*_ROW_KEYS, *used) and not is_unset(named[key])]
    if others:
        told = "not read; the usual names of roles and texts are recognised without them"
        draft.remark("data.train", f"{name}: {', '.join(others)}: {told}")


def _put_training(draft: Draft) -> None:
    trainer.put_rate(draft, 2.0e-4)
    _put_batch(draft)
    trainer.put_length(draft, "num_epochs", 1)
    trainer.put_schedule(draft, "lr_scheduler", "cosine")
    if draft.is_set("cosine_min_lr_ratio"):
        ratio = draft.take("cosine_min_lr_ratio")
        draft.remark("training.schedule", f"cosine_min_lr_ratio: {ratio}: the rate falls to 0 here")
    trainer.put_warmup(draft, "lr_scheduler")
    trainer.put_optimizer(draft, "optimizer")
    trainer.put_regularisation(draft)
    trainer.put_checkpointing(draft)
    _put_events(draft)
    _put_trackers(draft)
    trainer.put_deepspeed(draft)


def _put_batch(draft: Draft) -> None:
    """Axolotl's batch_size is that of one GPU over all accumulation steps."""
    if draft.is_set("batch_size") and not draft.is_set("gradient_accumulation_steps"):
        size = draft.number("batch_size")
        told = f"batch_size {size}: {trainer.OF_ONE_GPU}"
        draft.put("training.pairs_per_step", max(1, size), told)
        draft.take("micro_batch_size")
    else:
        trainer.put_batch(draft, "micro_batch_size", 1)
        draft.take("batch_size")


def _put_events(draft: Draft) -> None:
    for name, ours in (("saves_per_epoch", "checkpoint_every"), ("evals_per_epoch", "eval_every")):
        times = draft.number(name)
        if times:
            trainer.put_every_epoch(draft, f"training.{ours}", f"{name}: {times}", times)
    if draft.is_set("saves_per_epoch"):
        draft.take("save_strategy")
        draft.take("save_steps")
    trainer.put_saving(draft)
    trainer.evaluates(draft)


def _put_trackers(draft: Draft) -> None:
    trackers = []
    if draft.is_set("wandb_project") or draft.flag("use_wandb"):
        trackers.append("wandb")
        project = draft.take("wandb_project")
        draft.remark("training.trackers", f"set the variable WANDB_PROJECT={project}")
    if draft.is_set("mlflow_tracking_uri") or draft.flag("use_mlflow"):
        trackers.append("mlflow")
        place = draft.take("mlflow_tracking_uri")
        draft.remark("training.trackers", f"set the variable MLFLOW_TRACKING_URI={place}")
    draft.put("training.trackers", trackers)
