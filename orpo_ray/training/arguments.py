"""Our settings as arguments of the Hugging Face Trainer."""

from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import TrainingArguments

from orpo_ray.config import TrainingConfig, warmup_steps
from orpo_ray.training.decisions import Decisions
from orpo_ray.training.zero import deepspeed_config, prepare_deepspeed

_SCHEDULERS = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}
_OPTIMIZERS = {
    "adamw": "adamw_torch",
    "adamw-8bit": "adamw_8bit",
    "paged-adamw-8bit": "paged_adamw_8bit",
}


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
        lr_scheduler_type=_SCHEDULERS[config.schedule],
        warmup_steps=warmup_steps(config.warmup, total_steps - schedule_from),
        weight_decay=config.weight_decay,
        max_grad_norm=max_grad_norm,
        optim=_OPTIMIZERS[config.optimizer],
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
