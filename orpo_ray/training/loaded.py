"""What a run settles once its model is loaded: that it computes as expected, and how it fits."""

import time
from collections.abc import Callable
from dataclasses import asdict, replace

import numpy as np
import torch

from orpo_ray.errors import ConfigError
from orpo_ray.objectives import Objective
from orpo_ray.runs.console import Noted
from orpo_ray.runs.files import REASONS, RUN_FILE, read_json
from orpo_ray.training.budget import sample_pack
from orpo_ray.training.decisions import Decisions
from orpo_ray.training.engine import engine_of
from orpo_ray.training.layout import common_tokens
from orpo_ray.training.metrics import score_pack
from orpo_ray.training.pair_model import PairModel
from orpo_ray.training.plan import Step, pack_costs
from orpo_ray.training.probe import Probe, memory_of, settle_budget
from orpo_ray.training.self_check import TOLERANCE, settle_layout
from orpo_ray.training.session import Session
from orpo_ray.training.set_threads import set_threads, threads_set_by
from orpo_ray.training.threads import SAMPLE_TOKENS, settle_threads

_SCORER_TOKENS = 32


def settle_loaded(
    session: Session,
    model: PairModel,
    objective: Objective,
    *,
    pad_id: int,
    plan: Callable[[int], list[Step]],
    is_new: bool,
) -> Decisions:
    """Check the model, and settle layout, threads and micro-batch with it.

    `plan` gives the steps for so many tokens a micro-batch. A new run records why each was decided.
    Raises ConfigError if the model does not compute as expected, or if a setting cannot be met.
    """
    run = session.run
    checked, tried = Noted(session.announce), Noted(session.announce)
    decisions, checking = session.setup.decisions, replace(session, announce=checked)
    _check(model, checking, objective, pad_id)
    decisions = _settle_threads(checking, decisions, model, pad_id)
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
        if is_new:
            told = (read_json(run.path(RUN_FILE)) or {}).get(REASONS, [])
            run.add_facts({REASONS: [*told, *checked.lines, *tried.lines[-1:]]})
    return decisions


def _check(model: PairModel, session: Session, objective: Objective, pad_id: int) -> None:
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
        pairs = [artifact.train[i] for i in session.steps[0]]
        common = common_tokens(pairs, with_rejected=objective.needs_rejected)
        if common:
            session.announce(
                f"the prompts of the first step begin with the same {common} tokens; each "
                "micro-batch computes such a beginning once"
            )


def _settle_threads(
    session: Session, decisions: Decisions, model: PairModel, pad_id: int
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
    session: Session,
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
