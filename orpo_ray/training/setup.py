"""What a run settles before its first step: the meaning of every `auto`, and what its inputs are."""

import importlib.util
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np

from orpo_ray.config import RunConfig
from orpo_ray.data.store import Artifact
from orpo_ray.errors import ConfigError, DataError, ResourceError
from orpo_ray.models.hardware import Hardware, choose_numerics
from orpo_ray.models.identity import adapter_fingerprint, base_fingerprint
from orpo_ray.models.size import count_parameters
from orpo_ray.models.tokenizer import load_tokenizer, tokenizer_fingerprint
from orpo_ray.models.trained import fetch_trained
from orpo_ray.models.traits import Traits, read_traits
from orpo_ray.objectives import build_objective
from orpo_ray.storage import storage_at
from orpo_ray.training import record
from orpo_ray.training.decisions import Decisions, Setup
from orpo_ray.training.layout_choice import choose_layout
from orpo_ray.training.plan import PADDED, Indices, pack_costs
from orpo_ray.training.strategy import SINGLE, ModelSize, Workers, choose_strategy, stage_of

Announce = Callable[[str], None]

# Of packs that are computed without gradients before the budget is found.
_AUTO_TOKENS_CPU, _AUTO_TOKENS_GPU = 8192, 4096


def settle(
    config: RunConfig, artifact: Artifact, announce: Announce, hardware: Hardware, workers: int = 1, nodes: int = 1
) -> Setup:
    """Decide, announce and record. Raises a user error where the run cannot go on as asked or as it began."""
    if not len(artifact.eval):
        raise DataError("no evaluation pairs are left; add rows to data.eval, or remove it to hold some out")
    _require_trackers(config)
    stored = record.read_run(config.run_dir)
    fetch_inputs(config)
    identity = _identity(config, artifact)
    record.refuse_changed_identity(stored.get("identity", {}), config.name, identity)
    decisions = decide(config, all_lengths(artifact), stored.get("decisions", {}), announce, hardware, workers, nodes)
    content = {**stored, "identity": identity, "decisions": asdict(decisions), "versions": record.versions()}
    record.write_json(config.run_dir / record.RUN_FILE, content)
    storage_at(config.storage).store(config.run_dir / record.RUN_FILE)
    return Setup(decisions, identity)


def fetch_inputs(config: RunConfig) -> None:
    """Have on this server the base and the first adapter that URLs name; what the hub has is fetched by its client."""
    fetch_trained(config.model.base)
    if config.adapter.init_from is not None:
        fetch_trained(config.adapter.init_from)


def all_lengths(artifact: Artifact) -> Indices:
    """(prompt, chosen, rejected) lengths [n, 3] of all pairs that a run computes."""
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
    """Give every `auto` its value: the one of `before` where a run goes on, otherwise what fits the hardware."""
    recorded = {key: before[key] for key in ("dtype", "attention") if key in before}
    traits = read_traits(config.model)
    numerics = choose_numerics(config.model.model_copy(update=recorded), hardware, traits.attentions)
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
        announce(f"tokens per micro-batch {tokens}, gradient checkpointing {kept}: as the run began")
    if tokens < longest:
        announce(f"tokens per micro-batch {tokens}: the longest pair alone takes {longest} and runs by itself")
    strategy = _strategy(config, Workers(workers, nodes, hardware.memory), numerics.dtype, announce)
    return Decisions(
        hardware.device, numerics.dtype, numerics.attention, layout, strategy, checkpointing, tokens, is_open
    )


def _layout(config: RunConfig, traits: Traits, lengths: Indices, before: dict[str, Any], announce: Announce) -> str:
    """How pairs stand in a micro-batch: as the run began where it goes on."""
    if "layout" in before:
        announce(f"layout {before['layout']}: as the run began")
        return str(before["layout"])
    if config.training.engine == "trl":
        announce(f"layout {PADDED}: TRL's trainers pad")
        return PADDED
    with_rejected = build_objective(config.objective).needs_rejected
    layout = choose_layout(config.training.layout, traits, lengths, with_rejected=with_rejected)
    announce(f"layout {layout.name}: {layout.reason}")
    return layout.name


def _strategy(config: RunConfig, workers: Workers, dtype: str, announce: Announce) -> str:
    """How workers share the model; announced where there is anything to share."""
    parameters = count_parameters(config.model) if workers.count > 1 else None
    size = ModelSize(0, 0)
    if parameters is not None:
        trains_all = config.adapter.kind == "none"
        frozen = 0 if trains_all else parameters.bytes(config.model.quantization, dtype)
        size = ModelSize(frozen, parameters.total if trains_all else parameters.adapter(config.adapter.r))
    strategy = choose_strategy(config, workers, dtype, size)
    if stage_of(strategy.name) is not None and dtype == "float16":
        raise ConfigError("scale.deepspeed: float16 trains without DeepSpeed only; use none, or model.dtype=bfloat16")
    if strategy.name != SINGLE:
        who = f"{workers.count} workers" if workers.count > 1 else "one worker"
        announce(f"{who}, {strategy.name}: {strategy.reason}")
    return strategy.name


def _identity(config: RunConfig, artifact: Artifact) -> dict[str, str]:
    """Hashes of all that lies behind unchanged settings: prepared pairs, tokenizer, weights, first adapter."""
    identity = {
        # Before the data, which cannot stay the same under another tokenizer.
        "tokenizer": tokenizer_fingerprint(load_tokenizer(config.model, lambda line: None)),
        "data": artifact.summary.hash,
        "model.base": base_fingerprint(config.model),
    }
    if config.adapter.init_from is not None:
        identity["adapter.init_from"] = adapter_fingerprint(config.adapter.init_from)
    return identity


def _require_trackers(config: RunConfig) -> None:
    for tracker in config.training.trackers:
        if importlib.util.find_spec(tracker) is None:
            raise ResourceError(f"training.trackers: {tracker} is not installed; pip install 'orpo-ray[{tracker}]'")
