"""One run: model, objective, plan, trainer, checkpoints.

It runs in one process, or in each of several. This module does not use Ray.
"""

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, TrainerCallback

from orpo_ray.config import AdapterConfig, RunConfig, every_to_steps
from orpo_ray.data.store import Artifact
from orpo_ray.errors import ConfigError, RunError, StoppedError
from orpo_ray.models.base import fetch_base
from orpo_ray.models.start import for_the_whole_base, start_from_inputs, write_saved_shape
from orpo_ray.models.tokenizer import load_tokenizer, padding_id
from orpo_ray.objectives import Objective, build_objective
from orpo_ray.runs.console import SILENT, Announce, Metrics, Noted
from orpo_ray.runs.files import REASONS, RESUMED, RUN_FILE, TENSORBOARD, read_json
from orpo_ray.runs.metrics import evaluations, last_metrics, metric_by_step, metrics_at
from orpo_ray.runs.results import TrainResult
from orpo_ray.runs.run import Run
from orpo_ray.runs.scores import PairScores
from orpo_ray.runs.summary import compared, on_preference, plain, remarks
from orpo_ray.runs.versions import versions
from orpo_ray.training.arguments import training_arguments
from orpo_ray.training.budget import sample_pack
from orpo_ray.training.checkpoint import Position, best_whole, read_position
from orpo_ray.training.decisions import Decisions, Setup
from orpo_ray.training.engine import engine_of
from orpo_ray.training.evaluation_share import EvaluationShare, evaluation_share
from orpo_ray.training.layout import collate, common_tokens
from orpo_ray.training.load import load_pair_model, size_on_disk
from orpo_ray.training.memory import keep_freed_memory, peak_memory
from orpo_ray.training.metrics import score_pack, score_pairs
from orpo_ray.training.model_card import write_model_card
from orpo_ray.training.packages import refuse_missing_optimizer
from orpo_ray.training.pair_model import PairModel
from orpo_ray.training.plan import Indices, Layout, Step, pack_costs
from orpo_ray.training.probe import Probe, memory_of, set_checkpointing, settle_budget
from orpo_ray.training.reference import reference_cache
from orpo_ray.training.reporter import Reporter
from orpo_ray.training.run_plan import plan_run, steps_of_run
from orpo_ray.training.sample_answers import Sampler, draw_prompts, refuse_samples
from orpo_ray.training.self_check import TOLERANCE, settle_layout
from orpo_ray.training.set_threads import set_threads, threads_set_by
from orpo_ray.training.setup import fetch_inputs
from orpo_ray.training.steps import Work
from orpo_ray.training.strategy import Strategy
from orpo_ray.training.threads import SAMPLE_TOKENS, settle_threads, threads_restored
from orpo_ray.training.trackers import send_page
from orpo_ray.training.world import World, current_world

_SCORER_TOKENS = 32
_EVA_PAIRS, _EVA_ROWS = 64, 8
"""How many pairs EVA reads, and how many at once. It reads them until its directions settle."""


@dataclass(frozen=True, kw_only=True)
class _Session:
    """What all parts of a run need."""

    run: Run
    artifact: Artifact
    setup: Setup
    reporter: Reporter
    announce: Announce
    world: World
    steps: list[Indices]
    """The pairs of each optimizer step."""


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
    session = _Session(
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
        _finish(session, checkpoint)


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


def _run_steps(session: _Session, resume: tuple[Path, Position] | None) -> None:
    """Train the steps that are left.

    Raises StoppedError if the reporter asked to stop before the last one.
    """
    run, decisions, steps = session.run, session.setup.decisions, session.steps
    config = run.config
    refuse_missing_optimizer(config, decisions.device)  # this may be another server
    if decisions.device == "cpu":
        keep_freed_memory()
    if session.world.local_rank == 0:
        fetch_inputs(config, session.announce)
        fetch_base(config.model)
    session.world.wait()
    session.announce(f"loading the base{size_on_disk(config.model)}")
    resumed = resume[0] / "adapter" if resume else None
    model = load_pair_model(config, decisions, session.announce, resumed)
    tokenizer = load_tokenizer(config.model, SILENT.announce)
    pad_id = padding_id(tokenizer)
    if config.adapter.init == "eva" and resume is None:
        _start_from_inputs(session, model, pad_id)
    checked, tried = Noted(session.announce), Noted(session.announce)
    _check(model, replace(session, announce=checked), pad_id)
    decisions = _settle_threads(replace(session, announce=checked), decisions, model, pad_id)
    objective = build_objective(config.objective)
    # Cached, because it is called twice and takes seconds for a few hundred thousand pairs.
    plan = cache(
        lambda tokens: plan_run(
            config, session.artifact.train, session.world.size, tokens, model.layout
        )
    )
    decisions = _settle_budget(
        replace(session, announce=tried),
        replace(decisions, layout=model.layout),
        model=model,
        objective=objective,
        pad_id=pad_id,
        plan=plan,
    )
    if session.world.is_first:
        run.add_facts({"decisions": asdict(decisions)})
        if resume is None:
            told = (read_json(run.path(RUN_FILE)) or {}).get(REASONS, [])
            run.add_facts({REASONS: [*told, *checked.lines, *tried.lines[-1:]]})
    budget = decisions.tokens_per_microbatch
    work = Work(
        steps=plan(budget),
        train=session.artifact.train,
        evaluation=session.artifact.eval,
        reference=_reference(session, model, pad_id) if objective.needs_reference else None,
        pad_id=pad_id,
        layout=model.layout,
        token_budget=budget,
        schedule_from=session.setup.schedule_from,
    )
    set_checkpointing(model, decisions.gradient_checkpointing)
    start = resume[1].step if resume else 0
    callbacks = [_tensorboard(run.folder, start)] if session.world.is_first else []
    trainer = engine_of(config).trainer(config, tokenizer, decisions)(
        model=model,
        objective=objective,
        work=work,
        config=config.training,
        args=training_arguments(
            config.training, run.folder, len(steps), decisions, work.schedule_from
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
        callbacks=callbacks,
    )
    if resume is None:
        session.announce(f"evaluating {len(work.evaluation)} held-out pairs before training")
        session.announce(str(_evaluation_share(work, config, objective, decisions)))
    trainer.train()
    _note_memory(session)
    done = trainer.state.global_step
    if done < len(steps):
        raise StoppedError(
            f"stopped at step {done} of {len(steps)} with a checkpoint; the same command resumes"
        )


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
    session: _Session, model: PairModel, tokenizer: PreTrainedTokenizerBase
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


def _scores_at_start(session: _Session, objective: Objective) -> PairScores | None:
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


def _check(model: PairModel, session: _Session, pad_id: int) -> None:
    """Check that the base can read the pairs and computes as expected, and settle the layout.

    Raises ConfigError if a check fails. The first process announces how attention is computed.
    """
    artifact, decisions = session.artifact, session.setup.decisions
    for table in (artifact.train, artifact.eval):
        model.check_reads(table)
    if decisions.strategy.shares_weights and model.scorer.head is not None:
        raise ConfigError(
            "adapter.targets: an adapted or quantised head is called once per chunk, but ZeRO "
            "stage 3 needs the same number of calls on every worker; leave the head out, or set "
            "scale.deepspeed.stage=2"
        )
    if model.device.type != decisions.device:
        # ZeRO-3 moves the model to the GPU later. The GPU's attention may not work on the CPU.
        model.use_layout(decisions.layout)
        return
    first = artifact.train[0]
    probe = np.concatenate([first.prompt, first.chosen])[:_SCORER_TOKENS].astype(np.int64)
    model.check_scorer(torch.from_numpy(probe), TOLERANCE[decisions.dtype])
    settle_layout(
        model,
        decisions,
        artifact.train,
        pad_id=pad_id,
        announce=session.announce,
        world=session.world,
    )
    if not model.layout.pads:
        path = model.attention_path
        session.announce(
            f"attention in layout {model.layout}: {path}, in place of {decisions.attention}"
        )
    if model.layout.shares_prompts:
        both = build_objective(session.run.config.objective).needs_rejected
        common = common_tokens([artifact.train[i] for i in session.steps[0]], with_rejected=both)
        if common:
            session.announce(
                f"the prompts of the first step begin with the same {common} tokens; each "
                "micro-batch computes such a beginning once"
            )


def _settle_threads(
    session: _Session, decisions: Decisions, model: PairModel, pad_id: int
) -> Decisions:
    """The decisions, with the threads of a process on a CPU."""
    if decisions.device != "cpu":
        return decisions
    scale = session.run.config.scale
    if not session.setup.tries_threads:
        if set_threads() is None and (number := threads_set_by(scale)) is not None:
            torch.set_num_threads(number)  # Ray does this for its workers
        return decisions
    table = session.artifact.train
    pack = sample_pack(pack_costs(table.lengths, model.layout), SAMPLE_TOKENS)
    threads = settle_threads(
        decisions.threads,
        lambda: score_pack(model, table, pack, pad_id),
        session.world,
        session.announce,
        time.perf_counter,
    )
    return replace(decisions, threads=threads)


def _settle_budget(
    session: _Session,
    decisions: Decisions,
    model: PairModel,
    objective: Objective,
    pad_id: int,
    plan: Callable[[int], list[Step]],
) -> Decisions:
    """The decisions, with tokens per micro-batch and gradient checkpointing settled.

    On a GPU both are tried at every start, because it may be another GPU than before.
    """
    config, world = session.run.config, session.world
    untried = engine_of(config).untried
    if untried is None and model.device.type != decisions.device:
        untried = "ZeRO-3 divides the weights first"
    if untried is not None:
        if config.training.memory_limit is not None:
            raise ConfigError(f"training.memory_limit: it cannot be kept, because {untried}")
        session.announce(
            f"tokens per micro-batch {decisions.tokens_per_microbatch}: not tried for memory, "
            f"because {untried}"
        )
        return decisions
    limit = config.training.memory_limit
    if not (decisions.find_budget or decisions.device == "cuda" or limit is not None):
        return decisions
    memory = memory_of(decisions.device, world, limit)
    probe = Probe(model, objective, session.artifact.train, pad_id, memory)
    return settle_budget(
        probe,
        config.training,
        decisions,
        plan=plan,
        largest_step=max(probe.costs.of(pairs) for pairs in session.steps),
        world=world,
        announce=session.announce,
    )


def _note_workers(run: Run, strategy: Strategy, layout: Layout, world: World) -> None:
    """Record the workers, the strategy and the layout for the result.

    A run may be killed after its last checkpoint. The process that then writes the result trains
    nothing, so it needs these facts.
    """
    pids = world.gather(os.getpid())
    if world.is_first:
        run.add_facts({"workers": pids, "strategy": strategy, "layout": layout})
        run.store(RUN_FILE)


def _reference(session: _Session, model: PairModel, pad_id: int) -> np.ndarray:
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


def _start_from_inputs(session: _Session, model: PairModel, pad_id: int) -> None:
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


def _note_memory(session: _Session) -> None:
    """Record the peak memory, because another process may conclude the run."""
    peaks = session.world.gather(peak_memory(session.setup.decisions.device))
    if session.world.is_first:
        before = session.run.facts().get("peak_memory_bytes", 0)
        session.run.add_facts({"peak_memory_bytes": max(before, *peaks)})


def _finish(session: _Session, checkpoint: Path) -> None:
    """Put the adapter beside the checkpoints, then write result.json as the last file."""
    run, summary = session.run, session.artifact.summary
    chosen = _chosen(session, checkpoint)
    position = read_position(chosen)
    metrics = last_metrics(run.folder) | position.metrics
    found = compared(run.scores(0), run.scores(position.step))
    facts = run.facts()
    result = TrainResult(
        name=run.name,
        steps=len(session.steps),
        adapter=run.adapter,
        adapter_step=position.step,
        metrics=metrics,
        start=metrics_at(run.folder, 0, "eval/"),
        changes=plain(found),
        eval_pairs=len(session.artifact.eval),
        remarks=(*remarks(found, len(session.artifact.eval)), *_on_preference(run)),
        seconds=sum(metric_by_step(run.folder, "train/seconds").values()),
        peak_memory_bytes=facts.get("peak_memory_bytes"),
        pairs_per_second=_speed(run.folder, session.steps),
        workers=tuple(facts["workers"]),
        strategy=facts["strategy"],
        layout=facts.get("layout", facts["decisions"]["layout"]),
        versions=versions(),
    )
    write_model_card(run.lay_adapter(chosen / "adapter"), run.config, summary, result)
    run.conclude(result)
    send_page(run, session.announce)


def _on_preference(run: Run) -> list[str]:
    shares = metric_by_step(run.folder, "train/preference_share").values()
    return on_preference(shares, run.config.objective.more_preference)


def _chosen(session: _Session, newest: Path) -> Path:
    """The checkpoint that the adapter is taken from."""
    if session.run.config.training.adapter_from == "last":
        return newest
    best = best_whole(newest.parent, session.announce)
    step = read_position(best).step
    session.announce(
        f"the adapter is that of step {step} of {len(session.steps)}, the best by held-out accuracy"
    )
    return best


def _speed(folder: Path, steps: list[Indices]) -> float | None:
    """Pairs per second of training, over all steps on record."""
    speeds = metric_by_step(folder, "train/pairs_per_second")
    sizes = {number: len(pairs) for number, pairs in enumerate(steps, start=1) if number in speeds}
    if not sizes:
        return None
    seconds = sum(size / speeds[number] for number, size in sizes.items())
    return sum(sizes.values()) / seconds
