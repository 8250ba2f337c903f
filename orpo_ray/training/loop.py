"""One run in one process: model, objective, plan, trainer, checkpoints. No Ray."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import DistributedType
from torch.utils.tensorboard import SummaryWriter
from transformers import PreTrainedTokenizerBase, set_seed
from transformers.integrations import TensorBoardCallback

from orpo_ray.config import RunConfig, warmup_steps
from orpo_ray.data.store import Artifact, PairTable
from orpo_ray.errors import ConfigError, RunError, StoppedError
from orpo_ray.models.adapter import attach_adapter
from orpo_ray.models.base import load_base
from orpo_ray.models.hardware import DTYPES
from orpo_ray.models.tokenizer import padding_id
from orpo_ray.objectives import build_objective
from orpo_ray.training import record
from orpo_ray.training.checkpoint import Position, read_position
from orpo_ray.training.layout import longer_side
from orpo_ray.training.model_card import write_model_card
from orpo_ray.training.pair_model import PairModel
from orpo_ray.training.plan import Step, plan
from orpo_ray.training.reference import reference_log_probs
from orpo_ray.training.reporter import Reporter
from orpo_ray.training.setup import Announce, Decisions, Setup, settle
from orpo_ray.training.trainer import PreferenceTrainer, Work, training_arguments

# How far the scorer's log-probs may be from those of the model's own logits.
_SCORER_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.3, "float16": 0.1}
_SCORER_TOKENS = 32

_STRATEGIES = {DistributedType.NO: "single-process"}


def train(config: RunConfig, artifact: Artifact, reporter: Reporter, announce: Announce) -> dict[str, Any]:
    """Train to the end of the plan and return what result.json says.

    Goes on from the reporter's latest checkpoint. Raises StoppedError if the reporter asked to stop, NonFiniteError
    if a loss or gradient went wrong, a user error if the run cannot be what the config asks for.
    """
    setup = settle(config, artifact, announce)
    steps = plan_run(config, artifact.train, 1, setup.decisions.tokens_per_microbatch)
    if len(artifact.train) < config.training.pairs_per_step:
        announce(
            f"only {len(artifact.train)} pairs for pairs_per_step {config.training.pairs_per_step}: one step each epoch"
        )
    checkpoint = reporter.latest_checkpoint()
    position = read_position(checkpoint) if checkpoint else None
    start = position.step if position else 0
    reporter.rewind(start if position else -1)
    if position:
        announce(f"resuming at step {start} of {len(steps)}")
    if start < len(steps):
        resume = (checkpoint, position) if checkpoint and position else None
        _run_steps(config, artifact, setup, steps, resume, reporter, announce)
    return _finish(config, artifact, reporter, steps)


def plan_run(config: RunConfig, table: PairTable, world_size: int, token_budget: int) -> list[Step]:
    """The optimizer steps of the whole run, epoch after epoch, cut at max_steps."""
    settings = config.training
    lengths = longer_side(table.lengths)
    wanted = settings.max_steps
    steps: list[Step] = []
    epoch = 0
    while (len(steps) < wanted) if wanted else (epoch < (settings.epochs or 1)):
        steps += plan(lengths, settings.pairs_per_step, world_size, token_budget, settings.seed, epoch)
        epoch += 1
    steps = steps[:wanted]
    if (warmup := warmup_steps(settings.warmup, len(steps))) >= len(steps):
        raise ConfigError(f"training.warmup: {warmup} steps, but the run has {len(steps)}; its rate would never rise")
    return steps


def load_pair_model(config: RunConfig, decisions: Decisions, announce: Announce) -> PairModel:
    """Base and adapter as training starts: seeded, on the device, frozen where they are not trained."""
    full = config.adapter.kind == "none"
    base = load_base(
        config.model, decisions.device, decisions.dtype, decisions.attention, trainable=full, announce=announce
    )
    set_seed(config.training.seed)
    model = attach_adapter(base, config.adapter, announce)
    return PairModel(model, autocast_dtype(decisions))


def autocast_dtype(decisions: Decisions) -> torch.dtype | None:
    """The 16-bit format that a PairModel computes in, in training, reference and evaluation alike."""
    return None if decisions.dtype == "float32" else DTYPES[decisions.dtype]


def _run_steps(
    config: RunConfig,
    artifact: Artifact,
    setup: Setup,
    steps: list[Step],
    resume: tuple[Path, Position] | None,
    reporter: Reporter,
    announce: Announce,
) -> None:
    """Train what is left of the plan. Raises StoppedError if the reporter asked to stop before its end."""
    decisions = setup.decisions
    model = load_pair_model(config, decisions, announce)
    for table in (artifact.train, artifact.eval):
        model.check_reads(table)
    first = artifact.train[0]
    probe = np.concatenate([first.prompt, first.chosen])[:_SCORER_TOKENS].astype(np.int64)
    model.check_scorer(torch.from_numpy(probe), _SCORER_TOLERANCE[decisions.dtype])
    objective = build_objective(config.objective)
    pad_id = padding_id(setup.tokenizer)
    reference = None
    if objective.needs_reference:
        reference = _reference(config, artifact, setup, model, pad_id, announce, reporter)
    if decisions.gradient_checkpointing:
        model.causal_model.gradient_checkpointing_enable({"use_reentrant": False})
    trainer = PreferenceTrainer(
        model=model,
        objective=objective,
        work=Work(steps, artifact.train, artifact.eval, reference, pad_id, decisions.tokens_per_microbatch),
        config=config.training,
        args=training_arguments(config.training, config.run_dir, len(steps), decisions.device, decisions.dtype),
        reporter=reporter,
        write_model=lambda folder: _write_model(model, setup.tokenizer, folder),
        resume=resume,
        callbacks=[_tensorboard(config.run_dir, resume[1].step if resume else 0)],
    )
    # Kept on disk: a run that is killed after its last checkpoint has no trainer when it is finished.
    strategy = _STRATEGIES[trainer.accelerator.distributed_type]
    record.add_to_run(config.run_dir, {"workers": trainer.accelerator.num_processes, "strategy": strategy})
    trainer.train()
    done = trainer.state.global_step
    if done < len(steps):
        raise StoppedError(f"stopped at step {done} of {len(steps)} with a checkpoint; the same command goes on")


def _reference(
    config: RunConfig,
    artifact: Artifact,
    setup: Setup,
    model: PairModel,
    pad_id: int,
    announce: Announce,
    reporter: Reporter,
) -> np.ndarray:
    """Reference log-probs of the training pairs, under the very numbers that training uses."""
    decisions = setup.decisions
    inputs = {
        **setup.identity,
        "quantization": config.model.quantization,
        "dtype": decisions.dtype,
        "attention": decisions.attention,
        "layout": decisions.layout,
        "device": torch.device(decisions.device).type,
        "full_training": config.adapter.kind == "none",
        "versions": {
            name: v
            for name, v in record.versions().items()
            if name in ("torch", "transformers", "peft", "bitsandbytes")
        },
    }
    cache = config.storage_dir / "references"
    return reference_log_probs(
        model,
        artifact.train,
        pad_id,
        decisions.tokens_per_microbatch,
        cache,
        inputs,
        announce,
        reporter.stop_requested,
    )


def _write_model(model: PairModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """The adapter, or the whole model where every weight is trained, with what is needed to use it."""
    is_adapter = model.model is not model.causal_model
    model.model.save_pretrained(folder, **({"save_embedding_layers": False} if is_adapter else {}))
    tokenizer.save_pretrained(folder)


def _tensorboard(run_dir: Path, start: int) -> TensorBoardCallback:
    """Curves hide what an earlier process wrote after its last checkpoint."""
    return TensorBoardCallback(SummaryWriter(run_dir / "tensorboard", purge_step=start + 1 if start else 0))


def _finish(config: RunConfig, artifact: Artifact, reporter: Reporter, steps: list[Step]) -> dict[str, Any]:
    """Lay the final adapter beside the checkpoints and write result.json, last of all."""
    checkpoint = reporter.latest_checkpoint()
    if checkpoint is None or read_position(checkpoint).step < len(steps):
        raise RunError("the checkpoint of the last step is damaged; the same command trains again what it held")
    metrics = record.last_metrics(config.run_dir)
    adapter = config.run_dir / "adapter"
    shutil.rmtree(adapter, ignore_errors=True)
    shutil.copytree(checkpoint / "adapter", adapter)
    write_model_card(adapter, config, artifact.summary, metrics)
    run = record.read_run(config.run_dir)
    result = {
        "status": "finished",
        "name": config.name,
        "steps": len(steps),
        "adapter": str(adapter),
        "metrics": metrics,
        "pairs_per_second": _speed(config.run_dir, steps),
        "workers": run["workers"],
        "strategy": run["strategy"],
        "versions": record.versions(),
    }
    record.write_json(config.run_dir / record.RESULT_FILE, result)
    return result


def _speed(run_dir: Path, steps: list[Step]) -> float | None:
    """Pairs per second of training proper, over all processes that the run took, from the steps still on record."""
    speeds = record.metric_by_step(run_dir, "train/pairs_per_second")
    sizes = {number: len(step.pairs) for number, step in enumerate(steps, start=1) if number in speeds}
    return sum(sizes.values()) / sum(size / speeds[number] for number, size in sizes.items()) if sizes else None
