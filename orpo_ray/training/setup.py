"""What a run settles before its first step: the value of every `auto`, and its inputs."""

from dataclasses import asdict
from typing import Any

import numpy as np

from orpo_ray.config import RunConfig
from orpo_ray.data.store import Artifact
from orpo_ray.errors import ConfigError, DataError
from orpo_ray.models.hardware import Hardware, choose_numerics
from orpo_ray.models.identity import adapter_fingerprint, base_fingerprint
from orpo_ray.models.size import count_parameters
from orpo_ray.models.tokenizer import load_tokenizer, tokenizer_fingerprint
from orpo_ray.models.trained import fetch_trained
from orpo_ray.models.traits import Traits, read_traits
from orpo_ray.objectives import build_objective
from orpo_ray.runs.changes import refuse_changed_identity
from orpo_ray.runs.console import SILENT, Announce
from orpo_ray.runs.extend import schedule_from
from orpo_ray.runs.files import RUN_FILE
from orpo_ray.runs.run import Run
from orpo_ray.runs.versions import versions
from orpo_ray.training.decisions import Decisions, Setup
from orpo_ray.training.engine import engine_of
from orpo_ray.training.layout_choice import choose_layout
from orpo_ray.training.plan import Indices, Layout, pack_costs
from orpo_ray.training.strategy import ModelSize, Strategy, Workers, choose_strategy
from orpo_ray.training.trackers import refuse_missing_trackers

# Of packs that are computed without gradients before the budget is found.
_AUTO_TOKENS_CPU, _AUTO_TOKENS_GPU = 8192, 4096


def settle(
    run: Run,
    artifact: Artifact,
    announce: Announce,
    hardware: Hardware,
    workers: int = 1,
    nodes: int = 1,
) -> Setup:
    """Decide, announce and record.

    Raises a user error if the run cannot be what it was, or what is asked for.
    """
    config = run.config
    if not len(artifact.eval):
        raise DataError(
            "no evaluation pairs are left; add rows to data.eval, or remove it to hold some out"
        )
    refuse_missing_trackers(config)
    stored = run.facts()
    fetch_inputs(config)
    identity = _identity(config, artifact)
    refuse_changed_identity(stored.get("identity", {}), config.name, identity)
    decisions = decide(
        config,
        all_lengths(artifact),
        before=stored.get("decisions", {}),
        announce=announce,
        hardware=hardware,
        workers=workers,
        nodes=nodes,
    )
    run.write_facts(
        {**stored, "identity": identity, "decisions": asdict(decisions), "versions": versions()}
    )
    run.store(RUN_FILE)
    return Setup(decisions, identity, schedule_from(stored))


def fetch_inputs(config: RunConfig) -> None:
    """Fetch the base and the first adapter to this server, if they have URLs.

    The hub's own client fetches what the hub has.
    """
    fetch_trained(config.model.base)
    if config.adapter.init_from is not None:
        fetch_trained(config.adapter.init_from)


def all_lengths(artifact: Artifact) -> Indices:
    """The (prompt, chosen, rejected) lengths [n, 3] of all pairs that a run computes."""
    lengths: Indices = np.concatenate([artifact.train.lengths, artifact.eval.lengths])
    return lengths


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
        announce(f"dtype {numerics.dtype} and attention {numerics.attention}: as the run began")
    else:
        for reason in numerics.reasons:
            announce(reason)
    on_gpu = hardware.device != "cpu"
    layout = _layout(config, traits, lengths, before, announce)
    longest = int(pack_costs(lengths, layout).tokens.max(initial=0))
    asked = config.training.tokens_per_microbatch, config.training.gradient_checkpointing
    fresh = max(longest, _AUTO_TOKENS_GPU if on_gpu else _AUTO_TOKENS_CPU)
    tokens = before.get("tokens_per_microbatch", fresh) if asked[0] == "auto" else asked[0]
    checkpointing = before.get("gradient_checkpointing", on_gpu) if asked[1] == "auto" else asked[1]
    is_open = "auto" in asked and "gradient_checkpointing" not in before
    if "auto" in asked and not is_open:
        kept = "on" if checkpointing else "off"
        announce(
            f"tokens per micro-batch {tokens}, gradient checkpointing {kept}: as the run began"
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
        find_budget=is_open,
    )


def _layout(
    config: RunConfig, traits: Traits, lengths: Indices, before: dict[str, Any], announce: Announce
) -> Layout:
    """How pairs stand in a micro-batch; a resumed run keeps its layout."""
    if "layout" in before:
        announce(f"layout {before['layout']}: as the run began")
        return Layout(before["layout"])
    with_rejected = build_objective(config.objective).needs_rejected
    choice = engine_of(config).only_layout or choose_layout(
        config.training.layout, traits, lengths, with_rejected=with_rejected
    )
    announce(f"layout {choice.layout}: {choice.reason}")
    return choice.layout


def _strategy(config: RunConfig, workers: Workers, dtype: str, announce: Announce) -> Strategy:
    """How workers share the model; announced if there are several."""
    parameters = count_parameters(config.model) if workers.count > 1 else None
    size = ModelSize(0, 0)
    if parameters is not None:
        trains_all = config.adapter.kind == "none"
        frozen = 0 if trains_all else parameters.bytes(config.model.quantization, dtype)
        size = ModelSize(
            frozen, parameters.total if trains_all else parameters.adapter(config.adapter.r)
        )
    choice = choose_strategy(config, workers, dtype, size)
    if choice.strategy.stage is not None and dtype == "float16":
        raise ConfigError(
            "scale.deepspeed: float16 trains without DeepSpeed only; use none, or "
            "model.dtype=bfloat16"
        )
    if choice.strategy is not Strategy.SINGLE:
        who = f"{workers.count} workers" if workers.count > 1 else "one worker"
        announce(f"{who}, {choice.strategy}: {choice.reason}")
    return choice.strategy


def _identity(config: RunConfig, artifact: Artifact) -> dict[str, str]:
    """Hashes of what unchanged settings may hide: pairs, tokenizer, weights, first adapter."""
    identity = {
        # First: with another tokenizer the data is another, too, and this is the cause.
        "tokenizer": tokenizer_fingerprint(load_tokenizer(config.model, SILENT.announce)),
        "data": artifact.summary.hash,
        "model.base": base_fingerprint(config.model),
    }
    if config.adapter.init_from is not None:
        identity["adapter.init_from"] = adapter_fingerprint(config.adapter.init_from)
    return identity
