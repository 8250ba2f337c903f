"""What a run settles before its first step: the value of every `auto`, and its inputs."""

from dataclasses import asdict
from typing import Any

import numpy as np

from orpo_ray.config import RunConfig
from orpo_ray.data.store import Artifact
from orpo_ray.data.summary import account
from orpo_ray.errors import ConfigError, DataError
from orpo_ray.models.hardware import Hardware, choose_numerics
from orpo_ray.models.identity import adapter_fingerprint, base_fingerprint
from orpo_ray.models.read_traits import read_traits
from orpo_ray.models.size import count_parameters
from orpo_ray.models.tokenizer import load_tokenizer, make_local, tokenizer_fingerprint
from orpo_ray.models.trained import fetch_trained
from orpo_ray.models.traits import Traits
from orpo_ray.objectives import build_objective
from orpo_ray.runs.changes import refuse_changed_identity
from orpo_ray.runs.console import SILENT, Announce, Noted
from orpo_ray.runs.extend import schedule_from
from orpo_ray.runs.files import PAIRS, PLAN, REASONS, RUN_FILE
from orpo_ray.runs.run import Run
from orpo_ray.runs.versions import versions
from orpo_ray.training.decisions import Decisions, Setup
from orpo_ray.training.engine import engine_of
from orpo_ray.training.layout_choice import choose_layout
from orpo_ray.training.packages import refuse_missing_optimizer
from orpo_ray.training.plan import Indices, Layout, pack_costs
from orpo_ray.training.set_threads import threads_set_by
from orpo_ray.training.strategy import ModelSize, Strategy, Workers, choose_strategy
from orpo_ray.training.trackers import refuse_missing_trackers

# Tokens per micro-batch until the workers find a budget. Until then no gradients are computed.
_AUTO_TOKENS_CPU, _AUTO_TOKENS_GPU = 8192, 4096


def settle(
    run: Run,
    artifact: Artifact,
    announce: Announce,
    hardware: Hardware,
    workers: int = 1,
    nodes: int = 1,
    owns_machine: bool = False,
    planned: dict[str, Any] | None = None,
) -> Setup:
    """Decide the value of every `auto`, announce it and record it.

    `owns_machine` says that no other run takes the cores which the workers have. `planned` is what
    the planner expects, which is recorded with the rest. Raises a user error if an input of a
    resumed run has changed, or if the settings cannot be met.
    """
    config = run.config
    if not len(artifact.eval):
        raise DataError(
            "data.eval: no pairs are left; add rows, or remove data.eval to hold out training rows"
        )
    _announce_not_compared(artifact, announce)
    refuse_missing_trackers(config)
    refuse_missing_optimizer(config, hardware.device)
    stored = run.facts()
    fetch_inputs(config)
    identity = _identity(config, artifact)
    refuse_changed_identity(stored.get("identity", {}), config.name, identity)
    noted = Noted(announce)
    decisions = decide(
        config,
        all_lengths(artifact),
        before=_kept(stored, workers),
        announce=noted,
        hardware=hardware,
        workers=workers,
        nodes=nodes,
    )
    settled = {
        "identity": identity,
        "decisions": asdict(decisions),
        REASONS: stored.get(REASONS, noted.lines),
        PAIRS: account(artifact),
        "versions": versions(),
        PLAN: planned and {"predicted": planned},
    }
    run.write_facts({**stored, **settled})
    run.store(RUN_FILE)
    return Setup(
        decisions,
        identity,
        schedule_from(stored),
        tries_threads=owns_machine and threads_set_by(config.scale) is None,
    )


def _kept(stored: dict[str, Any], workers: int) -> dict[str, Any]:
    """The decisions that a resumed run keeps. Another number of workers tries its own threads."""
    decisions: dict[str, Any] = stored.get("decisions", {})
    if len(stored.get("workers", ())) in (0, workers):
        return decisions
    return {**decisions, "threads": None}


def _announce_not_compared(artifact: Artifact, announce: Announce) -> None:
    """Say that held-out single answers do not count beside held-out pairs."""
    rows = len(artifact.eval)
    pairs = int((artifact.eval.lengths[:, 1:] > 0).all(axis=1).sum())
    if 0 < pairs < rows:
        announce(
            f"{rows - pairs} of {rows} held-out rows have one answer: the evaluation compares "
            "the pairs alone"
        )


def fetch_inputs(config: RunConfig, announce: Announce = SILENT.announce) -> None:
    """Have the base and the first adapter on this server, but not what comes from the hub."""
    make_local(config.model, announce)
    if config.adapter.init_from is not None:
        fetch_trained(config.adapter.init_from)


def all_lengths(artifact: Artifact) -> Indices:
    """The (prompt, chosen, rejected) lengths [n, 3] of all pairs that a run computes."""
    lengths: Indices = np.concatenate([artifact.train.lengths, artifact.eval.lengths])
    return lengths


def no_lengths() -> Indices:
    """The lengths of no pairs, for work that reads none."""
    return np.zeros((0, 3), dtype=np.int64)


def decide(
    config: RunConfig,
    lengths: Indices,
    before: dict[str, Any],
    announce: Announce,
    hardware: Hardware,
    workers: int = 1,
    nodes: int = 1,
) -> Decisions:
    """Decide on every `auto`: as in `before` if the run is resumed, else as the hardware allows."""
    recorded: dict[str, Any] = {key: before[key] for key in ("dtype", "attention") if key in before}
    traits = read_traits(config.model)
    numerics = choose_numerics(
        config.model.model_copy(update=recorded), hardware, traits.attentions
    )
    if recorded:
        announce(
            f"dtype {numerics.dtype} and attention {numerics.attention}: the same as at the start "
            "of the run"
        )
    else:
        for reason in numerics.reasons:
            announce(reason)
    on_gpu = hardware.device != "cpu"
    layout = _layout(config, traits, lengths, before, announce)
    longest = int(pack_costs(lengths, layout).tokens.max(initial=0))
    tokens = config.training.tokens_per_microbatch
    checkpointing = config.training.gradient_checkpointing
    has_auto = "auto" in (tokens, checkpointing)
    if tokens == "auto":
        usual = _AUTO_TOKENS_GPU if on_gpu else _AUTO_TOKENS_CPU
        tokens = before.get("tokens_per_microbatch", max(longest, usual))
    if checkpointing == "auto":
        checkpointing = before.get("gradient_checkpointing", on_gpu)
    is_open = has_auto and "gradient_checkpointing" not in before
    if has_auto and not is_open:
        kept = "on" if checkpointing else "off"
        announce(
            f"tokens per micro-batch {tokens}, gradient checkpointing {kept}: the same as at the "
            "start of the run"
        )
    if tokens < longest:
        announce(
            f"tokens per micro-batch {tokens}: the longest pair alone takes {longest} and runs by "
            "itself"
        )
    strategy = _strategy(config, Workers(workers, nodes, hardware.memory), numerics.dtype, announce)
    return Decisions(
        device=hardware.device,
        dtype=numerics.dtype,
        attention=numerics.attention,
        layout=layout,
        strategy=strategy,
        gradient_checkpointing=checkpointing,
        tokens_per_microbatch=tokens,
        threads=before.get("threads"),
        find_budget=is_open,
    )


def _layout(
    config: RunConfig, traits: Traits, lengths: Indices, before: dict[str, Any], announce: Announce
) -> Layout:
    """How pairs stand in a micro-batch; a resumed run keeps its layout."""
    if "layout" in before:
        announce(f"layout {before['layout']}: the same as at the start of the run")
        return Layout(before["layout"])
    with_rejected = build_objective(config.objective).needs_rejected
    choice = engine_of(config).only_layout or choose_layout(
        config.training.layout, traits, lengths, with_rejected=with_rejected
    )
    announce(f"layout {choice.layout}: {choice.reason}")
    return choice.layout


def _strategy(config: RunConfig, workers: Workers, dtype: str, announce: Announce) -> Strategy:
    """How workers share the model. It is announced unless one process trains alone."""
    size = _model_size(config, dtype) if workers.count > 1 else ModelSize(0, 0)
    choice = choose_strategy(config, workers, dtype, size)
    if choice.strategy.stage is not None and dtype == "float16":
        raise ConfigError(
            "scale.deepspeed: float16 works only without DeepSpeed; set scale.deepspeed=none, or "
            "model.dtype=bfloat16"
        )
    if choice.strategy.shares_weights and config.adapter.init == "eva":
        raise ConfigError(
            "adapter.init: eva reads pairs with the whole base, which ZeRO stage 3 holds in parts; "
            "set adapter.init=default, or scale.deepspeed.stage=2"
        )
    if choice.strategy is not Strategy.SINGLE:
        who = f"{workers.count} workers" if workers.count > 1 else "one worker"
        announce(f"{who}, {choice.strategy}: {choice.reason}")
    return choice.strategy


def _model_size(config: RunConfig, dtype: str) -> ModelSize:
    parameters = count_parameters(config.model)
    if config.adapter.kind == "none":
        return ModelSize(0, parameters.total)
    frozen = parameters.bytes(config.model.quantization, dtype)
    return ModelSize(frozen, parameters.adapter(config.adapter.r))


def _identity(config: RunConfig, artifact: Artifact) -> dict[str, str]:
    """Hashes of the inputs, which may change even if no setting does."""
    identity = {
        # It comes first: another tokenizer also changes the pairs, and the error names the cause.
        "tokenizer": tokenizer_fingerprint(load_tokenizer(config.model, SILENT.announce)),
        "data": artifact.summary.hash,
        "model.base": base_fingerprint(config.model),
    }
    if config.adapter.init_from is not None:
        identity["adapter.init_from"] = adapter_fingerprint(config.adapter.init_from)
    return identity
