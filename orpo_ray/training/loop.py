"""One run, in one process or in each of several: model, objective, plan, trainer, checkpoints. No Ray."""

import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, TrainerCallback, set_seed

from orpo_ray.config import RunConfig
from orpo_ray.config.storage import inside
from orpo_ray.data.store import Artifact
from orpo_ray.errors import ConfigError, RunError, StoppedError
from orpo_ray.models.adapter import attach_adapter
from orpo_ray.models.base import fetch_base, load_base
from orpo_ray.models.hardware import DTYPES
from orpo_ray.models.tokenizer import load_tokenizer, padding_id
from orpo_ray.objectives import Objective, build_objective
from orpo_ray.storage import storage_at
from orpo_ray.training import record
from orpo_ray.training.arguments import training_arguments
from orpo_ray.training.checkpoint import Position, read_position
from orpo_ray.training.decisions import Decisions, Setup
from orpo_ray.training.memory import keep_freed_memory
from orpo_ray.training.metrics import score_pairs
from orpo_ray.training.model_card import write_model_card
from orpo_ray.training.pair_model import PairModel
from orpo_ray.training.plan import PADDED, Indices, Step
from orpo_ray.training.probe import Probe, memory_of, set_checkpointing, settle_budget
from orpo_ray.training.reference import reference_cache
from orpo_ray.training.reporter import Reporter
from orpo_ray.training.run_plan import plan_run, steps_of_run
from orpo_ray.training.self_check import TOLERANCE, settle_layout
from orpo_ray.training.setup import Announce, fetch_inputs
from orpo_ray.training.steps import Work
from orpo_ray.training.strategy import stage_of
from orpo_ray.training.trainer import PreferenceTrainer
from orpo_ray.training.world import World, current_world

_SCORER_TOKENS = 32


@dataclass(frozen=True)
class _Run:
    """What every part of a run needs to know about it."""

    config: RunConfig
    artifact: Artifact
    setup: Setup
    reporter: Reporter
    announce: Announce
    world: World
    steps: list[Indices]
    """The pairs of each optimizer step."""


def train(config: RunConfig, artifact: Artifact, setup: Setup, reporter: Reporter, announce: Announce) -> None:
    """Train to the end of the plan; the first process writes result.json. Every process of the world calls this.

    Goes on from the reporter's latest checkpoint. Raises StoppedError if the reporter asked to stop, NonFiniteError
    if a loss or gradient went wrong, a user error if the run cannot be what the config asks for.
    """
    world = current_world()
    steps = steps_of_run(config, len(artifact.train))
    run = _Run(config, artifact, setup, reporter, announce, world, steps)
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
        if checkpoint:
            reporter.bring(checkpoint)
        _run_steps(run, (checkpoint, position) if checkpoint and position else None)
    checkpoint = reporter.latest_checkpoint()
    if checkpoint is None or read_position(checkpoint).step < len(steps):
        raise RunError("the checkpoint of the last step is damaged; the same command trains again what it held")
    if world.is_first:
        _finish(run, checkpoint)


def load_pair_model(config: RunConfig, decisions: Decisions, announce: Announce) -> PairModel:
    """Base and adapter as training starts: seeded, on the device, frozen where they are not trained."""
    full = config.adapter.kind == "none"
    # ZeRO-3 cuts up weights and moves its part: they need not fit on the GPU before, unless they are quantised there.
    whole_on_cpu = stage_of(decisions.strategy) == 3 and config.model.quantization == "none"
    device = "cpu" if whole_on_cpu else decisions.device
    base = load_base(config.model, device, decisions.dtype, decisions.attention, trainable=full, announce=announce)
    set_seed(config.training.seed)
    model = attach_adapter(base, config.adapter, announce)
    if config.training.engine == "fast":
        return PairModel(model, autocast_dtype(decisions))
    from orpo_ray.training.trl_engine import TrlModel, keep_start_as_reference, refuse_adapted_head

    if config.objective.kind == "kto" and config.adapter.init_from is not None:
        keep_start_as_reference(model)
    trl_model = TrlModel(model, autocast_dtype(decisions))
    refuse_adapted_head(trl_model, config.objective.kind)
    return trl_model


def autocast_dtype(decisions: Decisions) -> torch.dtype | None:
    """The 16-bit format that a PairModel computes in, in training, reference and evaluation alike."""
    return None if decisions.dtype == "float32" else DTYPES[decisions.dtype]


def _run_steps(run: _Run, resume: tuple[Path, Position] | None) -> None:
    """Train what is left of the plan. Raises StoppedError if the reporter asked to stop before its end."""
    config, decisions, steps = run.config, run.setup.decisions, run.steps
    if decisions.device == "cpu":
        keep_freed_memory()
    if run.world.local_rank == 0:
        fetch_inputs(config)
        fetch_base(config.model)
    run.world.wait()
    model = load_pair_model(config, decisions, run.announce)
    tokenizer = load_tokenizer(config.model, lambda line: None)
    pad_id = padding_id(tokenizer)
    _check(model, run, pad_id)
    objective = build_objective(config.objective)
    # Cut for the largest pack first, then to be trained on: seconds for a few hundred thousand pairs.
    plan = cache(lambda tokens: plan_run(config, run.artifact.train, run.world.size, tokens, model.layout))
    decisions = _settle_budget(run, replace(decisions, layout=model.layout), model, objective, pad_id, plan)
    if run.world.is_first:
        record.add_to_run(config.run_dir, {"decisions": asdict(decisions)})
    budget = decisions.tokens_per_microbatch
    work = Work(
        steps=plan(budget),
        train=run.artifact.train,
        evaluation=run.artifact.eval,
        reference=_reference(run, model, pad_id) if objective.needs_reference else None,
        pad_id=pad_id,
        layout=model.layout,
        token_budget=budget,
    )
    set_checkpointing(model, decisions.gradient_checkpointing)
    trainer = _trainer_type(config, tokenizer, decisions)(
        model=model,
        objective=objective,
        work=work,
        config=config.training,
        args=training_arguments(config.training, config.run_dir, len(steps), decisions),
        reporter=run.reporter,
        write_model=lambda folder, weights: _write_model(model, tokenizer, folder, weights),
        resume=resume,
        on_ready=lambda strategy: _note_workers(config, strategy, model.layout, run.world),
        callbacks=[_tensorboard(config.run_dir, resume[1].step if resume else 0)] if run.world.is_first else [],
    )
    trainer.train()
    done = trainer.state.global_step
    if done < len(steps):
        raise StoppedError(f"stopped at step {done} of {len(steps)} with a checkpoint; the same command goes on")


def _trainer_type(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, decisions: Decisions
) -> Callable[..., PreferenceTrainer]:
    """Our trainer, or the one with TRL's inside."""
    if config.training.engine == "fast":
        return PreferenceTrainer
    from orpo_ray.training.trl_engine import TrlEngine

    def arguments(kind: Any, folder: Path, **own: Any) -> Any:
        return training_arguments(config.training, folder, 1, decisions, kind, **own)

    return partial(TrlEngine, objective_config=config.objective, tokenizer=tokenizer, arguments=arguments)


def _check(model: PairModel, run: _Run, pad_id: int) -> None:
    """Raise ConfigError where the base cannot read the pairs, or is not what the scorer takes it for.

    Settles the layout, too: the first process says how it computes attention.
    """
    artifact, decisions = run.artifact, run.setup.decisions
    for table in (artifact.train, artifact.eval):
        model.check_reads(table)
    if stage_of(decisions.strategy) == 3 and model.scorer.head is not None:
        raise ConfigError(
            "adapter.targets: an adapted or quantised head is called chunk by chunk, which ZeRO stage 3 cannot keep in "
            "step over workers; leave the head out, or set scale.deepspeed.stage=2"
        )
    if model.device.type != decisions.device:
        model.use_layout(decisions.layout)
        return  # on the CPU for ZeRO-3 to take, where the GPU's attention may not run
    first = artifact.train[0]
    probe = np.concatenate([first.prompt, first.chosen])[:_SCORER_TOKENS].astype(np.int64)
    model.check_scorer(torch.from_numpy(probe), TOLERANCE[decisions.dtype])
    settle_layout(model, decisions, artifact.train, pad_id, run.announce, run.world)
    if model.layout != PADDED:
        run.announce(f"attention in layout {model.layout}: {model.attention_path}, in place of {decisions.attention}")


def _settle_budget(
    run: _Run,
    decisions: Decisions,
    model: PairModel,
    objective: Objective,
    pad_id: int,
    plan: Callable[[int], list[Step]],
) -> Decisions:
    """The decisions with tokens and checkpointing found, where they are open.

    A GPU is tried at every start: it may be another one.
    """
    config, world = run.config, run.world
    if model.device.type != decisions.device or config.training.engine == "trl":
        why = "TRL computes the loss" if config.training.engine == "trl" else "the weights are shared out first"
        run.announce(f"tokens per micro-batch {decisions.tokens_per_microbatch}: not tried, as {why}")
        return decisions
    if not (decisions.find_budget or decisions.device == "cuda"):
        return decisions
    probe = Probe(model, objective, run.artifact.train, pad_id, memory_of(decisions.device, world))
    return settle_budget(
        probe,
        config.training,
        decisions,
        plan=plan,
        largest_step=max(probe.costs.of(pairs) for pairs in run.steps),
        world=world,
        announce=run.announce,
    )


def _note_workers(config: RunConfig, strategy: str, layout: str, world: World) -> None:
    """Kept on disk: a run that is killed after its last checkpoint has no trainer when it is finished."""
    pids = world.gather(os.getpid())
    if world.is_first:
        record.add_to_run(config.run_dir, {"workers": pids, "strategy": strategy, "layout": layout})
        storage_at(config.storage).store(config.run_dir / record.RUN_FILE)


def _reference(run: _Run, model: PairModel, pad_id: int) -> np.ndarray:
    """Reference log-probs of the training pairs, under the very numbers that training uses."""
    table, budget = run.artifact.train, run.setup.decisions.tokens_per_microbatch
    cache = reference_cache(run.config, run.setup)
    found: np.ndarray | None = run.world.from_first(
        cache.read(len(table), run.announce) if run.world.is_first else None
    )
    if found is not None:
        return found
    run.announce(f"reference log-probs: computing them once for {len(set(table.pair_ids))} pairs")
    scores = score_pairs(model, table, pad_id, budget, run.reporter.stop_requested, run.world)
    log_probs = np.stack([scores.chosen, scores.rejected], axis=1)
    if run.world.is_first:
        cache.write(log_probs)
    return log_probs


def _write_model(
    model: PairModel, tokenizer: PreTrainedTokenizerBase, folder: Path, weights: dict[str, Tensor]
) -> None:
    """The adapter, or the whole model where every weight is trained, with what is needed to use it.

    `weights`: the trained ones by name, whole; those of the live model may be shards.
    """
    inner = {name.removeprefix("model."): weight for name, weight in weights.items()}
    is_adapter = model.model is not model.causal_model
    options = {"save_embedding_layers": False, "selected_adapters": ["default"]} if is_adapter else {}
    model.model.save_pretrained(folder, state_dict=inner, **options)
    tokenizer.save_pretrained(folder)


def _tensorboard(run_dir: Path, start: int) -> TrainerCallback:
    """Curves hide what an earlier process wrote after its last checkpoint."""
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    return TensorBoardCallback(SummaryWriter(run_dir / record.TENSORBOARD, purge_step=start + 1 if start else 0))


def _finish(run: _Run, checkpoint: Path) -> None:
    """Lay the final adapter beside the checkpoints and write result.json, last of all."""
    config = run.config
    metrics = record.last_metrics(config.run_dir)
    adapter = config.run_dir / "adapter"
    shutil.rmtree(adapter, ignore_errors=True)
    shutil.copytree(checkpoint / "adapter", adapter)
    write_model_card(adapter, config, run.artifact.summary, metrics)
    found = record.read_run(config.run_dir)
    result = {
        "status": "finished",
        "name": config.name,
        "steps": len(run.steps),
        "adapter": inside(config.place, "adapter"),
        "metrics": metrics,
        "pairs_per_second": _speed(config.run_dir, run.steps),
        "workers": found["workers"],
        "strategy": found["strategy"],
        "layout": found["layout"],
        "versions": record.versions(),
    }
    record.write_json(config.run_dir / record.RESULT_FILE, result)
    storage = storage_at(config.storage)
    storage.store(*(config.run_dir / name for name in (record.METRICS_FILE, record.TENSORBOARD)))
    storage.store_folder(adapter)
    storage.store(config.run_dir / record.RESULT_FILE)


def _speed(run_dir: Path, steps: list[Indices]) -> float | None:
    """Pairs per second of training proper, over all processes that the run took, from the steps still on record."""
    speeds = record.metric_by_step(run_dir, "train/pairs_per_second")
    sizes = {number: len(pairs) for number, pairs in enumerate(steps, start=1) if number in speeds}
    return sum(sizes.values()) / sum(size / speeds[number] for number, size in sizes.items()) if sizes else None
