"""One run: model, objective, plan, trainer, checkpoints.

It runs in one process, or in each of several. This module does not use Ray.
"""

import os
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerBase, TrainerCallback

from orpo_ray.config import AdapterConfig, RunConfig, every_to_steps
from orpo_ray.data.store import Artifact
from orpo_ray.errors import ConfigError, RunError, StoppedError
from orpo_ray.models.base import fetch_base
from orpo_ray.models.start import for_the_whole_base, start_from_inputs, write_saved_shape
from orpo_ray.models.tokenizer import load_tokenizer, padding_id
from orpo_ray.objectives import Objective, build_objective
from orpo_ray.runs.console import SILENT, Announce, Metrics
from orpo_ray.runs.files import RESUMED, RUN_FILE, TENSORBOARD, read_json
from orpo_ray.runs.metrics import evaluations, metric_by_step
from orpo_ray.runs.run import Run
from orpo_ray.runs.scores import PairScores
from orpo_ray.training.arguments import training_arguments
from orpo_ray.training.checkpoint import Position, read_position
from orpo_ray.training.conclude import conclude
from orpo_ray.training.decisions import Decisions, Setup
from orpo_ray.training.engine import engine_of
from orpo_ray.training.evaluation_share import EvaluationShare, evaluation_share
from orpo_ray.training.layout import collate
from orpo_ray.training.load import load_pair_model, size_on_disk
from orpo_ray.training.loaded import settle_loaded
from orpo_ray.training.memory import keep_freed_memory, peak_memory
from orpo_ray.training.metrics import score_pairs
from orpo_ray.training.packages import refuse_missing_optimizer
from orpo_ray.training.pair_model import PairModel
from orpo_ray.training.plan import Layout
from orpo_ray.training.probe import set_checkpointing
from orpo_ray.training.reference import reference_cache
from orpo_ray.training.reporter import Reporter
from orpo_ray.training.run_plan import plan_run, steps_of_run
from orpo_ray.training.sample_answers import Sampler, draw_prompts, refuse_samples
from orpo_ray.training.session import Session
from orpo_ray.training.setup import fetch_inputs
from orpo_ray.training.steps import Work
from orpo_ray.training.strategy import Strategy
from orpo_ray.training.threads import threads_restored
from orpo_ray.training.world import World, current_world

if TYPE_CHECKING:
    from orpo_ray.training.trainer import PreferenceTrainer

_EVA_PAIRS, _EVA_ROWS = 64, 8
"""How many pairs EVA reads, and how many at once. It reads them until its directions settle."""


def train(
    run: Run, artifact: Artifact, setup: Setup, reporter: Reporter, announce: Announce
) -> None:
    """Train to the end of the plan, from the reporter's latest checkpoint.

    Every process of the world calls this; the first one writes result.json. Raises StoppedError if
    the reporter asked to stop, NonFiniteError if a loss or gradient is not finite, and a user error
    if the run cannot be what the config asks for.
    """
    config, world = run.config, current_world()
    steps = steps_of_run(config, len(artifact.train))
    session = Session(
        run=run,
        artifact=artifact,
        setup=setup,
        reporter=reporter,
        announce=announce,
        world=world,
        steps=steps,
    )
    if len(artifact.train) < config.training.pairs_per_step:
        announce(
            f"only {len(artifact.train)} pairs for pairs_per_step "
            f"{config.training.pairs_per_step}: one step each epoch"
        )
    checkpoint = reporter.latest_checkpoint()
    position = read_position(checkpoint) if checkpoint else None
    start = position.step if position else 0
    if start < setup.schedule_from:
        raise RunError(
            f"the checkpoint of step {setup.schedule_from}, after which the run was extended, is "
            f"damaged or gone; start a new run with adapter.init_from={run.place}"
        )
    if position and world.is_first:
        _note_resume(run, start, len(steps), setup.schedule_from)
    reporter.rewind(start if position else -1)
    if position:
        announce(f"resuming at step {start} of {len(steps)}")
        if found := evaluations(run.folder):
            announce(_held_out(found[-1]))
    if start < len(steps):
        if checkpoint:
            reporter.bring(checkpoint)
        with threads_restored():
            _run_steps(session, (checkpoint, position) if checkpoint and position else None)
    checkpoint = reporter.latest_checkpoint()
    if checkpoint is None or read_position(checkpoint).step < len(steps):
        raise RunError(
            "the checkpoint of the last step is damaged; the same command trains its steps again"
        )
    if world.is_first:
        conclude(session, checkpoint)


def _note_resume(run: Run, start: int, total: int, schedule_from: int) -> None:
    """Record that a run goes on after it was stopped or killed, and the steps to compute again.

    An extension that begins, and a run that only has to be concluded, are no resume.
    """
    if start in (schedule_from, total):
        return
    reached = max(metric_by_step(run.folder, "train/loss"), default=start)
    earlier = (read_json(run.path(RUN_FILE)) or {}).get(RESUMED, [])
    run.add_facts({RESUMED: [*earlier, {"step": start, "again": max(0, reached - start)}]})


def _held_out(last: Metrics) -> str:
    """One line on the latest evaluation. A resumed run shows it before it evaluates again."""
    accuracy, margin = last["eval/accuracy"], last["eval/margin"]
    return f"held out at step {last['step']:g}: accuracy {accuracy:.3f}  margin {margin:.3f}"


def _run_steps(session: Session, resume: tuple[Path, Position] | None) -> None:
    """Train the steps that are left.

    Raises StoppedError if the reporter asked to stop before the last one.
    """
    config = session.run.config
    model = _load(session, resume[0] / "adapter" if resume else None)
    tokenizer = load_tokenizer(config.model, SILENT.announce)
    pad_id = padding_id(tokenizer)
    if config.adapter.init == "eva" and resume is None:
        _start_from_inputs(session, model, pad_id)
    objective = build_objective(config.objective)
    decisions, work = _settle(session, model, objective, pad_id, is_new=resume is None)
    set_checkpointing(model, decisions.gradient_checkpointing)
    trainer = _trainer(
        session, model, objective, work, tokenizer=tokenizer, decisions=decisions, resume=resume
    )
    if resume is None:
        session.announce(f"evaluating {len(work.evaluation)} held-out pairs before training")
        session.announce(str(_evaluation_share(work, config, objective, decisions)))
    trainer.train()
    _note_memory(session)
    done, total = trainer.state.global_step, len(work.steps)
    if done < total:
        raise StoppedError(
            f"stopped at step {done} of {total} with a checkpoint; the same command resumes"
        )


def _settle(
    session: Session, model: PairModel, objective: Objective, pad_id: int, *, is_new: bool
) -> tuple[Decisions, Work]:
    """What the loaded model decides, and the steps that follow from it."""
    config, table = session.run.config, session.artifact.train
    # Cached, because it is called twice and takes seconds for a few hundred thousand pairs.
    plan = cache(lambda tokens: plan_run(config, table, session.world.size, tokens, model.layout))
    decisions = settle_loaded(session, model, objective, pad_id=pad_id, plan=plan, is_new=is_new)
    budget = decisions.tokens_per_microbatch
    work = Work(
        steps=plan(budget),
        train=table,
        evaluation=session.artifact.eval,
        reference=_reference(session, model, pad_id) if objective.needs_reference else None,
        pad_id=pad_id,
        layout=model.layout,
        token_budget=budget,
        schedule_from=session.setup.schedule_from,
    )
    return decisions, work


def _trainer(
    session: Session,
    model: PairModel,
    objective: Objective,
    work: Work,
    *,
    tokenizer: PreTrainedTokenizerBase,
    decisions: Decisions,
    resume: tuple[Path, Position] | None,
) -> "PreferenceTrainer":
    """The engine's trainer with all that it writes, reports and shows."""
    run, config = session.run, session.run.config
    start = resume[1].step if resume else 0
    return engine_of(config).trainer(config, tokenizer, decisions)(
        model=model,
        objective=objective,
        work=work,
        config=config.training,
        args=training_arguments(
            config.training, run.folder, len(work.steps), decisions, work.schedule_from
        ),
        reporter=session.reporter,
        write_model=lambda folder, weights: _write_model(
            model, config.adapter, tokenizer, folder, weights
        ),
        resume=resume,
        on_ready=lambda strategy: _note_workers(run, strategy, model.layout, session.world),
        announce=session.announce,
        sampler=_sampler(session, model, tokenizer),
        trl_metrics=config.objective.trl_metrics if config.training.trl_metric_names else None,
        scores_at_start=_scores_at_start(session, objective) if resume else None,
        lora_plus_ratio=config.adapter.lora_plus_ratio,
        callbacks=[_tensorboard(run.folder, start)] if session.world.is_first else [],
    )


def _load(session: Session, adapter: Path | None) -> PairModel:
    """The model with a new adapter, or with that of a checkpoint, from files on this server."""
    config, decisions = session.run.config, session.setup.decisions
    refuse_missing_optimizer(config, decisions.device)  # this may be another server
    if decisions.device == "cpu":
        keep_freed_memory()
    if session.world.local_rank == 0:
        fetch_inputs(config, session.announce)
        fetch_base(config.model)
    session.world.wait()
    session.announce(f"loading the base{size_on_disk(config.model)}")
    return load_pair_model(config, decisions, session.announce, adapter)


def _evaluation_share(
    work: Work, config: RunConfig, objective: Objective, decisions: Decisions
) -> EvaluationShare:
    """How much of the run its evaluations compute."""
    trained = np.concatenate([step.pairs for step in work.steps])
    return evaluation_share(
        len(work.steps),
        every_to_steps(config.training.eval_every, len(work.steps)),
        work.train.lengths[trained],
        work.evaluation.lengths,
        work.layout,
        with_rejected=objective.needs_rejected,
        recomputes=decisions.gradient_checkpointing,
    )


def _sampler(
    session: Session, model: PairModel, tokenizer: PreTrainedTokenizerBase
) -> Sampler | None:
    """What takes samples at evaluations, in the first process; None if none are taken."""
    settings, table = session.run.config.training, session.artifact.eval
    if not settings.samples or not session.world.is_first:
        return None
    if refused := refuse_samples(session.setup.decisions.strategy):
        session.announce(refused)
        return None
    numbers = draw_prompts(table, settings.samples, settings.seed)
    return Sampler(model, tokenizer, table, numbers, session.announce)


def _scores_at_start(session: Session, objective: Objective) -> PairScores | None:
    """The held-out scores before the first step, or None if no metric is compared with them.

    A damaged file costs these metrics, not the run.
    """
    run = session.run
    if not (objective.needs_reference and run.config.training.trl_metric_names):
        return None
    try:
        return run.scores(0)
    except ConfigError as error:
        session.announce(f"{error}; held-out metrics are not reported under TRL's names")
        return None


def _note_workers(run: Run, strategy: Strategy, layout: Layout, world: World) -> None:
    """Record the workers, the strategy and the layout for the result.

    A run may be killed after its last checkpoint. The process that then writes the result trains
    nothing, so it needs these facts.
    """
    pids = world.gather(os.getpid())
    if world.is_first:
        run.add_facts({"workers": pids, "strategy": strategy, "layout": layout})
        run.store(RUN_FILE)


def _reference(session: Session, model: PairModel, pad_id: int) -> np.ndarray:
    """The reference log-probs of the training pairs, in the number format of training.

    They are read from the cache, or computed and put there.
    """
    table, budget = session.artifact.train, session.setup.decisions.tokens_per_microbatch
    cache = reference_cache(session.run, session.setup)
    found: np.ndarray | None = session.world.from_first(
        cache.read(len(table), session.announce) if session.world.is_first else None
    )
    if found is not None:
        return found
    session.announce(
        f"reference log-probs: computing them once for {len(set(table.pair_ids))} pairs"
    )
    scores = score_pairs(
        model,
        table,
        pad_id=pad_id,
        token_budget=budget,
        stop_requested=session.reporter.stop_requested,
        world=session.world,
    )
    log_probs = np.stack([scores.chosen, scores.rejected], axis=1)
    if session.world.is_first:
        cache.write(log_probs)
    return log_probs


def _start_from_inputs(session: Session, model: PairModel, pad_id: int) -> None:
    """Start a new adapter from what its layers read of the first pairs that training will see."""
    table = session.artifact.train
    first = np.unique(np.concatenate(session.steps)[:_EVA_PAIRS])
    session.announce(f"the adapter starts from what its layers read of {len(first)} pairs")
    pairs = [table[i] for i in first]
    packs = [
        collate(
            pairs[begin : begin + _EVA_ROWS],
            Layout.PADDED,
            pad_id,
            score_prompt=False,
            with_rejected=False,
        )
        for begin in range(0, len(pairs), _EVA_ROWS)
    ]
    batches: list[dict[str, Any]] = [
        {"input_ids": pack.input_ids, "attention_mask": pack.attention_mask} for pack in packs
    ]
    adapted: Any = model.model
    start_from_inputs(adapted, session.run.config.adapter, batches, model.read)


def _write_model(
    model: PairModel,
    adapter: AdapterConfig,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    weights: dict[str, Tensor],
) -> None:
    """Write the adapter, or the whole model if every weight is trained, ready for use.

    `weights` are the whole trained weights by name. The model itself may have only shards of them.
    """
    inner = {name.removeprefix("model."): weight for name, weight in weights.items()}
    inner = for_the_whole_base(inner, model.start)
    options: dict[str, Any] = {}
    if model.model is not model.causal_model:  # PEFT's wrapper
        options = {"save_embedding_layers": False, "selected_adapters": ["default"]}
    model.model.save_pretrained(str(folder), state_dict=inner, **options)
    if model.start:
        write_saved_shape(folder, adapter)
    tokenizer.save_pretrained(folder)
    # safetensors lets nobody else read its files, whatever the umask is.
    usual = (folder / "tokenizer_config.json").stat().st_mode
    for file in folder.glob("*.safetensors"):
        file.chmod(usual)


def _tensorboard(folder: Path, start: int) -> TrainerCallback:
    """A TensorBoard writer that hides what an earlier process wrote after step `start`."""
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    return TensorBoardCallback(
        SummaryWriter(folder / TENSORBOARD, purge_step=start + 1 if start else 0)
    )


def _note_memory(session: Session) -> None:
    """Record the peak memory, because another process may conclude the run."""
    peaks = session.world.gather(peak_memory(session.setup.decisions.device))
    if session.world.is_first:
        before = session.run.facts().get("peak_memory_bytes", 0)
        session.run.add_facts({"peak_memory_bytes": max(before, *peaks)})
