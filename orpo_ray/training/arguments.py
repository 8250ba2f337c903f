"""Our settings as arguments of the Hugging Face Trainer."""

from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import TrainingArguments

from orpo_ray.config import TrainingConfig, warmup_steps
from orpo_ray.config.optimizers import OPTIMIZERS
from orpo_ray.training.decisions import Decisions
from orpo_ray.training.zero import deepspeed_config, prepare_deepspeed

_SCHEDULERS = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}
_OPTIMIZERS = {
    "adamw": "adamw_torch",
    "adamw-8bit": "adamw_8bit",
    "paged-adamw": "paged_adamw_32bit",
    "paged-adamw-8bit": "paged_adamw_8bit",
    "lion": "lion_32bit",
    "lion-8bit": "lion_8bit",
    "paged-lion": "paged_lion_32bit",
    "paged-lion-8bit": "paged_lion_8bit",
    "ademamix": "ademamix",
    "ademamix-8bit": "ademamix_8bit",
    "paged-ademamix": "paged_ademamix_32bit",
    "paged-ademamix-8bit": "paged_ademamix_8bit",
    "schedule-free-adamw": "schedule_free_adamw",
    "galore-adamw": "galore_adamw",
    "galore-adamw-8bit": "galore_adamw_8bit",
}
_LIONS_BETA2 = 0.99
"""Of the paper (arXiv:2302.06675). The Trainer would give Lion AdamW's 0.999."""


def training_arguments(
    config: TrainingConfig,
    run_dir: Path,
    total_steps: int,
    decisions: Decisions,
    schedule_from: int = 0,
    *,
    kind: type[TrainingArguments] = TrainingArguments,
    **own: Any,
) -> TrainingArguments:
    """The arguments of the Trainer, which must not save, evaluate or accumulate by itself.

    The learning rate's schedule runs from step `schedule_from` to the end. `kind` is the class of
    the arguments, and `own` has the fields that only this class knows.
    """
    assert config.learning_rate is not None, "a run in stages has no rate and trains nothing"
    on_cpu, stage = decisions.device == "cpu", decisions.strategy.stage
    if stage is not None:
        prepare_deepspeed(decisions.device)
    # This comes before DeepSpeed's settings are read. Else every process believes that it is alone.
    PartialState(cpu=on_cpu)
    # Stage 0 would not report the norm, so PreferenceTrainer clips there. 0.0 must be given: the
    # limit would be 1 otherwise.
    max_grad_norm = 0.0 if stage == 0 else config.max_grad_norm
    arguments = kind(
        output_dir=str(run_dir),
        max_steps=total_steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,
        learning_rate=config.learning_rate,
        lr_scheduler_type=_scheduler(config),
        warmup_steps=warmup_steps(config.warmup, total_steps - schedule_from),
        weight_decay=config.weight_decay,
        max_grad_norm=max_grad_norm,
        **_optimizer(config, total_steps),
        seed=config.seed,
        fp16=decisions.dtype == "float16",
        bf16=False,
        use_cpu=on_cpu,
        deepspeed=None if stage is None else deepspeed_config(stage, max_grad_norm),
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        eval_strategy="no",
        disable_tqdm=True,
        report_to=list(config.trackers) or "none",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        **own,
    )
    # On a server with several GPUs the Trainer would otherwise wrap the model in DataParallel.
    assert arguments.device is not None, "asking for the device makes transformers count the GPUs"
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _scheduler(config: TrainingConfig) -> str:
    """The schedule. An optimizer that has its own takes the warm-up, too, from the arguments."""
    has_its_own = OPTIMIZERS[config.optimizer].has_schedule
    return "constant" if has_its_own else _SCHEDULERS[config.schedule]


def _optimizer(config: TrainingConfig, total_steps: int) -> dict[str, Any]:
    """The optimizer and its own settings."""
    given: dict[str, Any] = {"optim": _OPTIMIZERS[config.optimizer]}
    if "lion" in config.optimizer:
        given["adam_beta2"] = _LIONS_BETA2
    if "ademamix" in config.optimizer:
        # arXiv:2409.03137: the slow average comes in over the whole run.
        given["optim_args"] = f"t_alpha={total_steps},t_beta3={total_steps}"
    if OPTIMIZERS[config.optimizer].is_galore:
        own = config.galore
        given["optim_args"] = (
            f"rank={own.rank},update_proj_gap={own.update_every},scale={own.scale}"
        )
    return given
