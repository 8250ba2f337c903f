"""The whole way of a run for those who write Python, and for the command line: prepare, train, evaluate.

What is heavy is imported where it is used: a cluster that is too small is refused before torch is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from orpo_ray.config import DataConfig, ModelConfig, RunConfig, ScaleConfig, stage_configs
from orpo_ray.config.storage import inside
from orpo_ray.errors import ConfigError, ResourceError
from orpo_ray.lean_imports import without_collections
from orpo_ray.storage import LOCAL, Storage, storage_at

if TYPE_CHECKING:
    from pathlib import Path

    from orpo_ray.data.pairs import Message
    from orpo_ray.data.store import Artifact
    from orpo_ray.distributed.preflight import Placement
    from orpo_ray.models.hardware import Hardware
    from orpo_ray.search.record import Search
    from orpo_ray.search.space import Space
    from orpo_ray.training.decisions import Decisions

Announce = Callable[[str], None]
Watch = Callable[[int, int, dict[str, float]], None]
SearchWatch = Callable[["Search"], None]

_ONLOOKER_S = 1.0
"""`tune --show` holds a search's lock for an instant, to see whether somebody else does."""


def prepare(
    data: DataConfig,
    model: ModelConfig,
    storage: Path,
    seed: int,
    announce: Announce = print,
    kept_in: Storage = LOCAL,
    queue_timeout: float = 600.0,
) -> Artifact:
    """Tokenised pairs for a model, from the cache in `storage` if nothing that shapes them has changed.

    `kept_in` is what `storage` is the local folder of, where it is a copy: `storage_at(config.storage)`. On a cluster
    a CPU that others hold is waited for `queue_timeout` seconds.
    """
    with without_collections():
        from orpo_ray.data.pipeline import prepare as prepare_pairs
        from orpo_ray.models.tokenizer import tokenizer_fingerprint

    tokenizer = _tokenizer(model, announce)
    fingerprint = tokenizer_fingerprint(tokenizer)
    return prepare_pairs(data, tokenizer, fingerprint, storage, seed, announce, kept_in, queue_timeout)


def _tokenizer(model: ModelConfig, announce: Announce) -> Any:
    from orpo_ray.models.tokenizer import load_tokenizer
    from orpo_ray.models.trained import fetch_trained

    fetch_trained(model.base)
    return load_tokenizer(model, announce)


def train(
    config: RunConfig,
    announce: Announce = print,
    watch: Watch = lambda step, total_steps, metrics: None,
    verbose: bool = False,
) -> dict[str, Any]:
    """Run a config to its end and return what its result.json says.

    Goes on where an unfinished run of this name was; a finished one is not run again. SIGINT and SIGTERM end it with
    a checkpoint and StoppedError. `verbose` shows what Ray's processes log. A run in stages is its stages, one after
    the other, each a run in the folder of the whole.
    """
    from orpo_ray.training import record

    kept_in = storage_at(config.storage)
    record.fetch_run(config.run_dir, kept_in)
    if (config.run_dir / record.SEARCH_FILE).exists():
        raise ConfigError(f"name: {config.place} holds a search; train its best.yaml, or choose another name")
    record.refuse_changed_config(config.run_dir, config)
    if finished := _result_if_finished(config, announce):
        return finished
    if config.stages:
        return _train_in_stages(config, announce, watch, verbose)
    placement = _place(config, announce, verbose)
    _check_cluster(config, announce)
    # Before the run has a folder, so that data that is refused leaves nothing behind.
    artifact = _prepare(config, announce)
    with record.run_lock(config.run_dir):
        # Again: another process may have begun the run meanwhile, or ended it.
        record.fetch_run(config.run_dir, kept_in)
        record.refuse_changed_config(config.run_dir, config)
        if finished := _result_if_finished(config, announce):
            return finished
        record.write_config(config)
        _wait_for_room(config, placement, announce)
        _train(config, artifact, placement, announce, watch)
    kept_in.fetch(config.run_dir / record.RESULT_FILE)
    result = record.read_json(config.run_dir / record.RESULT_FILE)
    assert result is not None, "a run that ends without an error has a result"
    return result


def tune(
    config: RunConfig,
    announce: Announce = print,
    watch: SearchWatch = lambda search: None,
    verbose: bool = False,
    watch_stage: Watch = lambda step, total_steps, metrics: None,
) -> dict[str, Any]:
    """Search the settings that `search` names, and return what search.json says.

    Lives in the folder `search` of the run. Goes on where an unfinished search was; a finished one is not run again.
    SIGINT and SIGTERM end it with StoppedError. `watch_stage` sees the stages before the one that is searched.
    """
    from orpo_ray.search.record import finished_search
    from orpo_ray.training import record

    config, space, searched = _read_search(config, announce)
    kept_in = storage_at(config.storage)
    record.fetch_run(config.run_dir, kept_in)
    if finished := finished_search(config):
        announce(_finished(config))
        return asdict(finished)
    placement = _place(searched, announce, verbose)
    _check_cluster(searched, announce)
    if space.stage:
        earlier = stage_configs(config)[: space.stage]
        _prepare_stages(config, [*earlier, searched], announce, verbose)
        _train_stages(config, earlier, announce, watch_stage, verbose)
    artifact = _prepare(searched, announce)
    with record.run_lock(config.run_dir, _ONLOOKER_S):
        # Again: another process may have begun the search meanwhile, or ended it.
        record.fetch_run(config.run_dir, kept_in)
        if finished := finished_search(config):
            announce(_finished(config))
            return asdict(finished)
        record.write_config(config)
        _wait_for_room(searched, placement, announce)
        return asdict(_search(config, space, artifact, placement, announce, watch))


def plan_search(config: RunConfig, announce: Announce = print) -> dict[str, Any]:
    """What `tune` would do: how many trials of which length, how many at once, over which ranges."""
    from orpo_ray.search.record import finished_search
    from orpo_ray.training import record

    config, space, searched = _read_search(config, announce)
    record.fetch_run(config.run_dir, storage_at(config.storage))
    if finished_search(config):
        announce(_finished(config))
    planned = _plan(_before_training(config, searched), announce)
    placement = _place(searched, lambda line: None, verbose=False)
    from orpo_ray.distributed.preflight import cluster_nodes, runs_at_once

    assert config.search is not None, "a search has settings"
    return {
        **planned,
        "name": config.name,
        "trials": config.search.trial_count,
        "at_once": min(runs_at_once(placement, cluster_nodes()), config.search.trial_count),
        "space": {name: asdict(domain) for name, domain in space.domains.items()},
    }


def _read_search(config: RunConfig, announce: Announce) -> tuple[RunConfig, Space, RunConfig]:
    """The config under the search's own name, what it varies, and the run that every trial is but for its values."""
    from orpo_ray.search.record import FOLDER
    from orpo_ray.search.space import resolve, trial_config, with_ranges

    name = f"{config.name}/{FOLDER}"
    config = with_ranges(config, announce).model_copy(update={"name": name})
    space = resolve(config)
    return config, space, trial_config(config, space, {}, name)


def _search(
    config: RunConfig,
    space: Space,
    artifact: Artifact,
    placement: Placement,
    announce: Announce,
    watch: SearchWatch,
) -> Search:
    from orpo_ray.distributed.run import Ground
    from orpo_ray.search.search import run_search
    from orpo_ray.training.stop import StopSignal

    ground = Ground(artifact, placement, _hardware(config, placement))
    with StopSignal(announce, "stopping; trials will go on from their last checkpoints") as stop:
        return run_search(config, space, ground, announce, watch, lambda: stop.requested)


def _train_in_stages(config: RunConfig, announce: Announce, watch: Watch, verbose: bool) -> dict[str, Any]:
    from orpo_ray.training import record
    from orpo_ray.training.stages import conclude

    stages = stage_configs(config)
    _place(stages[0], lambda line: None, verbose)
    _check_cluster(config, announce)
    _prepare_stages(config, stages, announce, verbose)
    with record.run_lock(config.run_dir):
        # Again: another process may have begun the run meanwhile, or ended it.
        record.fetch_run(config.run_dir, storage_at(config.storage))
        record.refuse_changed_config(config.run_dir, config)
        if finished := _result_if_finished(config, announce):
            return finished
        record.write_config(config)
        return conclude(config, stages, _train_stages(config, stages, announce, watch, verbose))


def _prepare_stages(config: RunConfig, stages: Sequence[RunConfig], announce: Announce, verbose: bool) -> None:
    """Find out that a later stage lacks workers or pairs before the first one is trained."""
    for stage in stages:
        _place(stage, announce, verbose)
        model = _before_training(config, stage).model
        _prepare(stage.model_copy(update={"model": model}), lambda line: None)


def _before_training(config: RunConfig, stage: RunConfig) -> RunConfig:
    """A stage that can be planned before the stages ahead of it are trained.

    In full fine-tuning its base is what the stage before makes: the run's own has the same tokenizer and size.
    """
    if stage.adapter.kind != "none":
        return stage
    first = {"base": config.model.base, "revision": config.model.revision}
    return stage.model_copy(update={"model": stage.model.model_copy(update=first)})


def _train_stages(
    config: RunConfig, stages: Sequence[RunConfig], announce: Announce, watch: Watch, verbose: bool
) -> list[dict[str, Any]]:
    """Train the first stages of a run, or all of them; those that are finished are left as they are."""
    from orpo_ray.training import record

    results = []
    for number, stage in enumerate(stages, start=1):
        record.fetch_run(stage.run_dir, storage_at(stage.storage))
        record.refuse_changed_config(stage.run_dir, stage)
        result = _result_if_finished(stage, lambda line: None)
        done = ", done before" if result else ""
        announce(f"stage {number} of {len(config.stages)}: {stage.objective.kind}, in {stage.place}{done}")
        results.append(result or train(stage, announce, watch, verbose))
    return results


def _result_if_finished(config: RunConfig, announce: Announce) -> dict[str, Any] | None:
    from orpo_ray.training import record

    result = record.read_json(config.run_dir / record.RESULT_FILE)
    if result is None or not storage_at(config.storage).holds(config.run_dir / "adapter"):
        return None
    announce(_finished(config))
    return {**result, "adapter": inside(config.place, "adapter")}


def _prepare(config: RunConfig, announce: Announce) -> Artifact:
    kept_in, seed = storage_at(config.storage), config.training.seed
    return prepare(config.data, config.model, config.storage_dir, seed, announce, kept_in, config.scale.queue_timeout)


def _place(config: RunConfig, announce: Announce, verbose: bool) -> Placement:
    from orpo_ray.distributed.preflight import place

    return place(config.scale, announce, verbose)


def _check_cluster(config: RunConfig, announce: Announce) -> None:
    """See that every server of a cluster is fit for the run."""
    from orpo_ray.distributed.preflight import joins_cluster

    if joins_cluster():
        from orpo_ray.distributed.servers import check_servers

        check_servers(config, announce)


def _wait_for_room(config: RunConfig, placement: Placement, announce: Announce) -> None:
    from orpo_ray.distributed.preflight import free_nodes, joins_cluster, wait_for_room

    if joins_cluster():
        wait_for_room(placement, config.scale.queue_timeout, announce, free_nodes)


def _train(config: RunConfig, artifact: Artifact, placement: Placement, announce: Announce, watch: Watch) -> None:
    """Settle what is open, then train: in this process, or in those that Ray starts."""
    from orpo_ray.training.stop import StopSignal

    hardware = _hardware(config, placement)
    if placement.uses_ray:
        with without_collections():
            from orpo_ray.distributed.run import Ground, train_on

        with StopSignal(announce) as stop:
            train_on(Ground(artifact, placement, hardware), config, announce, watch, lambda: stop.requested)
        return
    with without_collections():
        from orpo_ray.training import loop
        from orpo_ray.training.reporter import LocalReporter
        from orpo_ray.training.setup import settle

    with StopSignal(announce) as stop:
        setup = settle(config, artifact, announce, hardware)
        reporter = LocalReporter(
            config.run_dir,
            keep=config.training.keep,
            announce=announce,
            stop_requested=lambda: stop.requested,
            watch=watch,
            storage=storage_at(config.storage),
        )
        loop.train(config, artifact, setup, reporter, announce)


def _hardware(config: RunConfig, placement: Placement) -> Hardware:
    """What each worker computes on."""
    from orpo_ray.models.hardware import CPU, probe_hardware

    if not placement.gpus:
        return CPU
    if placement.uses_ray:
        from orpo_ray.distributed.launch import probe_worker

        found = probe_worker(placement)
    else:
        found = probe_hardware()
    if found.device == "cpu" and (placement.uses_ray or config.scale.gpus_per_worker != "auto"):
        where = "the cluster has one, but torch finds none there" if placement.uses_ray else "torch finds none here"
        raise ResourceError(
            f"scale.gpus_per_worker: a GPU is wanted, and {where}; set scale.gpus_per_worker=0 for CPUs"
        )
    return found


def plan_only(config: RunConfig, announce: Announce = print) -> dict[str, Any]:
    """What `train` would do: workers placed, pairs prepared and the plan laid, but no model loaded and no run begun."""
    if config.stages:
        return _plan_stages(config, announce)
    from orpo_ray.training import record

    record.fetch_run(config.run_dir, storage_at(config.storage))
    record.refuse_changed_config(config.run_dir, config)
    if record.read_json(config.run_dir / record.RESULT_FILE) is not None:
        announce(_finished(config))
    return _plan(config, announce)


def _plan(config: RunConfig, announce: Announce) -> dict[str, Any]:
    from orpo_ray.training import record
    from orpo_ray.training.run_plan import steps_of_run
    from orpo_ray.training.setup import all_lengths, decide

    placement = _place(config, announce, verbose=False)
    artifact = _prepare(config, announce)
    before = record.read_run(config.run_dir).get("decisions", {})
    hardware, lengths = _hardware(config, placement), all_lengths(artifact)
    decisions = decide(config, lengths, before, announce, hardware, placement.workers, placement.nodes)
    return {
        "name": config.name,
        "steps": len(steps_of_run(config, len(artifact.train))),
        "pairs": len(artifact.train),
        "eval_pairs": len(artifact.eval),
        "artifact": storage_at(config.storage).place_of(artifact.path),
        "workers": placement.workers,
        "decisions": asdict(decisions),
    }


def _plan_stages(config: RunConfig, announce: Announce) -> dict[str, Any]:
    from orpo_ray.training import record

    planned = []
    for number, stage in enumerate(stage_configs(config), start=1):
        announce(f"stage {number} of {len(config.stages)}: {stage.objective.kind}")
        record.fetch_run(stage.run_dir, storage_at(stage.storage))
        record.refuse_changed_config(stage.run_dir, stage)
        planned.append(_plan(_before_training(config, stage), announce))
    return {"name": config.name, "steps": sum(plan["steps"] for plan in planned), "stages": planned}


def evaluate(
    config: RunConfig,
    adapter: str | None = None,
    conversations: Sequence[list[Message]] = (),
    samples: int = 0,
    max_new_tokens: int = 128,
    announce: Announce = print,
) -> dict[str, Any]:
    """Compare the base with what the run made of it, over data.eval.

    Returns metrics by source for `base` and `trained`, and both greedy answers to the first `samples` evaluation
    prompts, or to `conversations` where they are given. `adapter` is another adapter or run to look at. A run in
    stages is judged by the settings of its last one.
    """
    from orpo_ray.data.tokenise import PairTokeniser
    from orpo_ray.evaluation.evaluate import judge_model

    trained, name = adapter or _trained_by(config), config.name
    if config.stages:
        config = _before_training(config, stage_configs(config)[-1])
    tokenizer = _tokenizer(config.model, announce)
    artifact = _prepare(config, announce)
    decisions = _decide_for_evaluation(config, artifact, announce)
    if conversations:
        prompts = PairTokeniser(tokenizer).prompts(conversations)
    else:
        prompts = [artifact.eval[i].prompt.tolist() for i in range(min(samples, len(artifact.eval)))]
    judged = {
        "base": judge_model(config, decisions, tokenizer, artifact.eval, None, prompts, max_new_tokens),
        "trained": judge_model(config, decisions, tokenizer, artifact.eval, trained, prompts, max_new_tokens),
    }
    shown = tokenizer.batch_decode(prompts, skip_special_tokens=True) if prompts else []
    answers = zip(shown, judged["base"].answers, judged["trained"].answers, strict=True)
    return {
        "name": name,
        "adapter": trained,
        "metrics": {who: result.metrics for who, result in judged.items()},
        "quantized_modules": judged["trained"].quantized_modules,
        "samples": [{"prompt": prompt.strip(), "base": base, "trained": tuned} for prompt, base, tuned in answers],
    }


def _decide_for_evaluation(config: RunConfig, artifact: Artifact, announce: Announce) -> Decisions:
    """The run's own number format and attention, or the nearest that this machine has."""
    from orpo_ray.models.hardware import probe_hardware
    from orpo_ray.training import record
    from orpo_ray.training.setup import all_lengths, decide

    record.fetch_run(config.run_dir, storage_at(config.storage))
    before = record.read_run(config.run_dir).get("decisions", {})
    hardware, lengths = probe_hardware(), all_lengths(artifact)
    alone = config.model_copy(update={"scale": ScaleConfig(workers=1)})  # however many workers trained
    try:
        return decide(alone, lengths, before, announce, hardware)
    except ResourceError as error:
        announce(f"the run's own numbers are not to be had here ({error}); evaluating in others")
        return decide(alone, lengths, {}, announce, hardware)


def _finished(config: RunConfig) -> str:
    return f"run {config.name} is finished: {config.place}; give another name to train again"


def _trained_by(config: RunConfig) -> str:
    from orpo_ray.training import record

    record.fetch_run(config.run_dir, storage_at(config.storage))
    result = record.read_json(config.run_dir / record.RESULT_FILE)
    if result is None:
        storage = config.place.removesuffix(f"/{config.name}")
        raise ConfigError(f"run {config.name} in {storage} is not finished; train it, or name an adapter")
    return inside(config.place, "adapter")
