"""Puts settings that the three projects share, because all of them use transformers' Trainer."""

import re
from typing import Any

from orpo_ray.config.foreign.draft import Draft, as_names, as_number
from orpo_ray.config.storage import is_url

_SCHEDULES = {
    "cosine": "cosine",
    "linear": "linear",
    "constant": "constant",
    "constant_with_warmup": "constant",
}
_NEAREST_SCHEDULES = {
    "inverse_sqrt": "linear",
    "polynomial": "linear",
    "rex": "linear",
    "greedy": "constant",
    "reduce_lr_on_plateau": "constant",
    "warmup_stable_decay": "constant",
}
"""The nearest of our schedules to one that we do not have; for all others it is cosine."""
_OPTIMIZERS = {
    "adamw": "adamw",
    "adamw_hf": "adamw",
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_8bit": "adamw-8bit",
    "adamw_bnb_8bit": "adamw-8bit",
    "paged_adamw": "paged-adamw",
    "paged_adamw_32bit": "paged-adamw",
    "paged_adamw_8bit": "paged-adamw-8bit",
    "lion_32bit": "lion",
    "lion_8bit": "lion-8bit",
    "paged_lion_32bit": "paged-lion",
    "paged_lion_8bit": "paged-lion-8bit",
    "ademamix": "ademamix",
    "ademamix_8bit": "ademamix-8bit",
    "paged_ademamix_32bit": "paged-ademamix",
    "paged_ademamix_8bit": "paged-ademamix-8bit",
    "schedule_free_adamw": "schedule-free-adamw",
    "galore_adamw": "galore-adamw",
    "galore_adamw_8bit": "galore-adamw-8bit",
}
_DIFFERS = {
    "lion": "beta2 is 0.99 here, as in Lion's paper; transformers takes AdamW's 0.999",
    "ademamix": "its slow average comes in over the whole run here, as in its paper",
    "schedule-free": "it has a warm-up of its own and no other schedule here",
}
"""What differs for a family of optimizers."""
_OF_GALORE = {
    "rank": ("rank", 128),
    "update_every": ("update_proj_gap", 200),
    "scale": ("scale", 0.25),
}
"""Our settings of GaLore, with transformers' names and defaults for them."""
OF_ONE_GPU = "the batch of one GPU; multiply by the number of GPUs it was written for"
_GPUS = ("ray_num_workers", "num_processes", "num_gpus", "n_gpu", "nproc_per_node", "world_size")
_FORBIDDEN = re.compile(r"[^A-Za-z0-9._-]+")
_RESERVED = ("artifacts", "references")


def put_place(draft: Draft, stem: str) -> None:
    """Put name and storage: output_dir of the foreign file becomes <storage>/<name>."""
    written = str(draft.take("output_dir", "")).rstrip("/")
    folder, _, last = written.rpartition("/")
    run_name = draft.take("run_name")
    name = as_run_name(str(run_name or last or stem))
    if not written:
        draft.put("name", name)
        return
    if is_url(written) and not written.startswith("s3://"):
        draft.put("name", name, f"output_dir: {written}: a run is kept in a folder or in s3://")
        return
    storage = folder.removeprefix("./")
    storage = "runs" if storage in ("", ".") else storage
    draft.put("name", name)
    draft.put("storage", storage, f"output_dir: {written}; here it is <storage>/<name>")


def as_run_name(text: str) -> str:
    """A text as the name of a run."""
    name = _FORBIDDEN.sub("-", text).strip("._-")
    return name if name and name not in _RESERVED else f"run-{name}".rstrip("-")


def put_base(draft: Draft, key: str, revision_key: str) -> None:
    """The base, which a file may leave to the command line."""
    draft.put("model.base", draft.take(key, "some/model"))
    if not draft.is_set(key):
        draft.remark("model.base", "no base is named there; write yours")
    revision = draft.take(revision_key, "main")
    if revision != "main":
        draft.put("model.revision", str(revision))


def put_format(draft: Draft) -> None:
    """Put the number format of computation (bf16, fp16), else that of loading (torch_dtype)."""
    bf16, fp16 = draft.take("bf16"), draft.flag("fp16")
    pure, loaded = draft.flag("pure_bf16"), draft.take_first("torch_dtype", "dtype")
    if pure or str(bf16).lower() == "true":
        draft.put("model.dtype", "bfloat16")
    elif fp16:
        draft.put("model.dtype", "float16")
    elif loaded in ("bfloat16", "float16", "float32"):
        draft.put("model.dtype", loaded)
    elif bf16 is False and draft.is_set("fp16"):
        draft.put("model.dtype", "float32", "bf16 and fp16: false")
    elif bf16 == "auto":
        draft.put("model.dtype", "auto")


def put_attention(draft: Draft, written: Any) -> None:
    """The attention that the base is loaded with."""
    if written in ("eager", "sdpa", "flash_attention_2", "auto"):
        draft.put("model.attention", written)
    elif written is not None:
        draft.put(
            "model.attention", "auto", f"{written}: not here; auto takes the fastest that fits"
        )


def put_training(draft: Draft, default_rate: float) -> bool:
    """Put what transformers' Trainer reads. Returns whether it evaluates during training."""
    put_rate(draft, default_rate)
    put_batch(draft, "per_device_train_batch_size", 8)
    put_length(draft, "num_train_epochs", 3)
    put_schedule(draft, "lr_scheduler_type", "linear")
    put_warmup(draft, "lr_scheduler_type")
    put_optimizer(draft, "optim")
    put_regularisation(draft)
    put_checkpointing(draft)
    put_saving(draft)
    put_trackers(draft)
    put_deepspeed(draft)
    return evaluates(draft)


def put_batch(draft: Draft, per_device: str, default: int) -> None:
    """Put the pairs of a step; unlike the foreign keys, ours is not per GPU."""
    size = draft.number(per_device, default)
    parts = draft.number("gradient_accumulation_steps", 1)
    gpus = next((draft.number(key) for key in _GPUS if draft.is_set(key)), None)
    rows = int(size * parts * (gpus or 1))
    told = f"{per_device} {size} x gradient_accumulation_steps {parts}"
    if gpus is None:
        told += f": {OF_ONE_GPU}"
    else:
        told += f" x {gpus} GPUs"
    counted = ""
    if draft.settings.get("objective.kind") == "kto":
        counted = "a row of one labelled answer counts as a pair; of real pairs take half as many"
    draft.put("training.pairs_per_step", max(1, rows), told, counted)


def put_rate(draft: Draft, default: float) -> None:
    """The learning rate."""
    written = as_number("learning_rate", draft.take_first("learning_rate", "lr"))
    if written is not None:
        draft.put("training.learning_rate", written)
    else:
        draft.put_default("training.learning_rate", default, "learning_rate")


def put_length(draft: Draft, epochs_key: str, default: float) -> None:
    """How long the run is: epochs, or steps, which win if both are set."""
    epochs, steps = draft.number(epochs_key), draft.number("max_steps")
    if steps is not None and steps > 0:
        both = f"{epochs_key}: {epochs}: max_steps wins there" if epochs is not None else ""
        draft.put("training.max_steps", int(steps), both)
    elif epochs is not None:
        draft.put("training.epochs", epochs)
    else:
        draft.put_default("training.epochs", default, epochs_key)


def put_schedule(draft: Draft, key: str, default: str) -> None:
    """The schedule of the learning rate, without its warm-up."""
    written = draft.take(key)
    if written is None:
        draft.put_default("training.schedule", default, key)
        return
    schedule = _SCHEDULES.get(str(written))
    if schedule is not None:
        draft.put("training.schedule", schedule)
        return
    nearest = _NEAREST_SCHEDULES.get(str(written), "cosine")
    end = "stays at its height" if nearest == "constant" else "falls to 0 at the end"
    draft.put(
        "training.schedule",
        nearest,
        f"{key}: {written}: not here; {nearest} is the nearest, and {end}",
    )


def put_warmup(draft: Draft, schedule_key: str) -> None:
    """Steps of warm-up, or their share of the run; steps win if both are set."""
    ratio, steps = draft.number("warmup_ratio"), draft.number("warmup_steps")
    if draft.foreign.get(schedule_key) == "constant" and (ratio or steps):
        draft.put("training.warmup", 0, f"{schedule_key}: constant has no warm-up there")
    elif steps:
        both = f"warmup_ratio: {ratio}: warmup_steps wins there" if ratio else ""
        draft.put("training.warmup", steps, both)
    else:
        draft.put("training.warmup", ratio or 0)


def put_optimizer(draft: Draft, key: str) -> None:
    """The optimizer, after the adapter and the schedule were put."""
    written = str(draft.take(key, "adamw_torch"))
    ours = _OPTIMIZERS.get(written)
    if ours is None:
        nearest = "adamw-8bit" if "8bit" in written else "adamw"
        remark = f"{key}: {written}: not here; with AdamW choose the learning rate anew"
        draft.put("training.optimizer", nearest, remark)
    elif ours.startswith("galore"):
        given = _settings(str(draft.take("optim_args", "")))
        named = {
            name: as_number(theirs, given.get(theirs, default))
            for name, (theirs, default) in _OF_GALORE.items()
        }
        put_galore(draft, f"{key}: {written}", ours, named)
    else:
        differs = next((told for part, told in _DIFFERS.items() if part in ours), "")
        draft.put("training.optimizer", ours, f"{key}: {written}: {differs}" if differs else "")
        if ours.startswith("schedule-free"):
            draft.put("training.schedule", "constant")


def put_galore(draft: Draft, told: str, ours: str, settings: dict[str, Any]) -> None:
    """GaLore, which trains whole weights here. `told` is what the file says of it."""
    if draft.settings.get("adapter.kind") != "none":
        remark = f"{told}: GaLore trains whole weights here, and the file trains an adapter"
        draft.put("training.optimizer", "adamw", remark)
        return
    targets = draft.take_first("optim_target_modules", "galore_target")
    remark = f"{targets}: here GaLore takes every linear layer of the body" if targets else ""
    draft.put("training.optimizer", ours, remark)
    draft.put("training.galore", settings)
    if draft.settings.get("training.weight_decay"):
        draft.put("training.weight_decay", 0.0, "GaLore decays no weights here")


def _settings(written: str) -> dict[str, str]:
    """Transformers' optim_args, such as `rank=64, scale=0.1`."""
    parts = (part.partition("=") for part in written.split(","))
    return {name.strip(): value.strip() for name, _, value in parts if value}


def put_regularisation(draft: Draft) -> None:
    """Weight decay, clipping and the seed, if they are set: the defaults are the same."""
    if draft.is_set("weight_decay"):
        decay = draft.number("weight_decay")
        galore = str(draft.settings.get("training.optimizer", "")).startswith("galore")
        told = f"weight_decay: {decay}: transformers leaves it out for GaLore" if galore else ""
        draft.put("training.weight_decay", 0.0 if galore else decay, told if decay else "")
    if draft.is_set("max_grad_norm"):
        draft.put("training.max_grad_norm", draft.number("max_grad_norm"))
    if draft.is_set("seed"):
        draft.put("training.seed", draft.number("seed"))


def put_checkpointing(draft: Draft) -> None:
    """Whether activations are recomputed."""
    if draft.flag("disable_gradient_checkpointing"):
        draft.put("training.gradient_checkpointing", False)
    elif draft.is_set("gradient_checkpointing"):
        written = draft.take("gradient_checkpointing")
        kept = written if isinstance(written, bool) else True
        remark = (
            "" if written is kept else f"gradient_checkpointing: {written}: nothing is offloaded"
        )
        draft.put("training.gradient_checkpointing", kept, remark)


def put_saving(draft: Draft) -> None:
    """How often a checkpoint is saved, and how many are kept."""
    strategy = draft.take("save_strategy", "steps")
    if is_no(strategy):
        draft.remark(
            "training.checkpoint_every",
            "save_strategy: no: checkpoints are always saved, for a resume",
        )
        draft.put("training.checkpoint_every", 0.1)
        draft.take("save_steps")
    elif strategy == "epoch":
        put_every_epoch(draft, "training.checkpoint_every", "save_strategy: epoch")
    elif draft.is_set("save_steps"):
        draft.put("training.checkpoint_every", as_every(draft.number("save_steps")))
    if draft.is_set("save_total_limit"):
        draft.put("training.keep", max(1, int(draft.number("save_total_limit"))))
    if draft.flag("load_best_model_at_end"):
        _put_best(draft)


def _put_best(draft: Draft) -> None:
    """Take the adapter of the best checkpoint; it and the newest are kept."""
    metric = draft.take("metric_for_best_model", "the loss")
    told = f"{metric} tells the best there, eval/accuracy here"
    draft.put("training.adapter_from", "best", told)
    if draft.settings.get("training.keep", 2) < 2:
        remark = "save_total_limit: 1: the best and the newest are two"
        draft.put("training.keep", 2, remark)


def evaluates(draft: Draft) -> bool:
    """Put how often the model is evaluated. Returns whether it is."""
    strategy = draft.take_first("eval_strategy", "evaluation_strategy")
    if strategy is None:
        strategy = "steps" if draft.is_set("eval_steps") else "no"
    if is_no(strategy):
        draft.take("eval_steps")
        return False
    if strategy == "epoch":
        put_every_epoch(draft, "training.eval_every", "eval_strategy: epoch")
    elif draft.is_set("eval_steps"):
        draft.put("training.eval_every", as_every(draft.number("eval_steps")))
    return True


def put_every_epoch(draft: Draft, key: str, named: str, times: float = 1) -> None:
    """An event that comes so many times an epoch, as a share of the run."""
    epochs = draft.settings.get("training.epochs")
    if epochs is None:
        draft.put(key, 0.1, f"{named}: here it is steps, or a share of the run")
        return
    share = 1 / (epochs * times)
    draft.put(key, min(1.0, round(share, 6)), f"{named}: here it is steps, or a share of the run")


def as_every(number: float) -> float:
    """Steps if whole, else a share of the run, as both sides write it; 1 is a step."""
    return max(1, number) if isinstance(number, int) else min(1.0, number)


def is_no(value: Any) -> bool:
    """Whether a strategy is none; YAML reads a bare `no` as false."""
    return value is False or str(value).lower() in ("no", "none")


def put_trackers(draft: Draft) -> None:
    """The trackers that get the metrics, besides TensorBoard."""
    named = [name for name in as_names(draft.take("report_to")) if not is_no(name)]
    found = [name for name in named if name in ("wandb", "mlflow")]
    others = [name for name in named if name not in ("wandb", "mlflow", "tensorboard")]
    remark = f"report_to: {', '.join(others)}: not here; wandb and mlflow are" if others else ""
    draft.put("training.trackers", found, remark)


def put_deepspeed(draft: Draft) -> None:
    """The ZeRO stage, from DeepSpeed's section, or from the name of its file."""
    written = draft.take("deepspeed")
    if written is None:
        return
    inside = written.get("zero_optimization", {}) if isinstance(written, dict) else {}
    stage = str(inside.get("stage", "")) if isinstance(inside, dict) else ""
    named = re.search(r"z(?:ero)?[-_]?(?:stage)?[-_]?([0-3])", str(written), re.IGNORECASE)
    stage = stage or (named.group(1) if named else "")
    told = f"deepspeed: {written}: only its stage is read"
    if not stage:
        draft.put("scale.deepspeed", "auto", f"{told}, and it names none; auto chooses a stage")
    elif stage != "0" and draft.settings.get("training.optimizer", "adamw") != "adamw":
        optimizer = draft.settings["training.optimizer"]
        remark = f"deepspeed: {written}: ZeRO cannot share out the state of {optimizer}"
        draft.put("scale.deepspeed", "auto", remark)
    else:
        draft.put("scale.deepspeed", {"stage": int(stage)}, told)
