"""What the commands do, as Python functions: prepare, train, tune, evaluate, generate, plan.

Heavy modules are imported in the functions that use them. So a cluster that is too small is refused
before torch is loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orpo_ray.config import RunConfig, ScaleConfig, stage_configs
from orpo_ray.config import load_config as config_from
from orpo_ray.config.searched import trial_count
from orpo_ray.config.storage import is_url
from orpo_ray.errors import ConfigError, DataError, ResourceError
from orpo_ray.lean_imports import without_collections
from orpo_ray.runs.console import SILENT, Console, Printing
from orpo_ray.runs.files import CONFIG_FILE, RESULT_FILE
from orpo_ray.runs.results import Evaluation, Generated, SearchPlan, TrainPlan, TrainResult
from orpo_ray.runs.run import Run
from orpo_ray.runs.search import SearchResult
from orpo_ray.runs.search_run import SearchRun, search_for
from orpo_ray.runs.stages import conclude_stages
from orpo_ray.runs.stop import StopSignal
from orpo_ray.storage import file_at

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from orpo_ray.data.pairs import Message
    from orpo_ray.data.store import Artifact
    from orpo_ray.distributed.preflight import Placement
    from orpo_ray.evaluation.answering import By
    from orpo_ray.models.hardware import Hardware
    from orpo_ray.search.space import Space
    from orpo_ray.training.decisions import Decisions

_ONLOOKER_S = 1.0
"""How long to wait for a lock.

A process that only checks whether a run is at work holds its lock for an instant.
"""
_PRINTING = Printing()


def load_config(
    source: str | PathLike[str] | Mapping[str, Any], overrides: Iterable[str] = ()
) -> RunConfig:
    """A run's settings from its YAML file, or its URL, or from plain data of the same shape.

    `overrides` are texts such as `training.seed=7`. Raises ConfigError with one line on any
    mistake.
    """
    place = file_at(source) if isinstance(source, str) else source
    return config_from(place, overrides)


# --- prepare --------------------------------------------------------------------------------------


def prepare(config: RunConfig, console: Console = _PRINTING) -> Artifact:
    """Check and tokenise a run's preference pairs.

    Pairs that its storage holds are used again, if nothing that shapes them changed. Returns the
    pairs as they will be trained and evaluated, with a summary. Raises DataError for
    pairs that cannot be trained on.
    """
    _refuse_others(config, console)
    _refuse_missing_inputs(config)
    return _prepare(Run(config), console)


def _prepare(run: Run, console: Console) -> Artifact:
    with without_collections():
        from orpo_ray.data.pipeline import prepare as prepare_pairs
        from orpo_ray.models.tokenizer import tokenizer_fingerprint

    config = run.config
    tokenizer = _tokenizer(config, console)
    return prepare_pairs(
        config.data,
        tokenizer,
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        storage=run.root,
        seed=config.training.seed,
        announce=console.announce,
        kept_in=run.storage,
        single_answers=config.objective.reads_single_answers,
        queue_timeout=config.scale.queue_timeout,
    )


def _prepare_training(run: Run, console: Console) -> Artifact:
    """Prepare the pairs. Refuses those of one kind, and an adapter that does not fit the base."""
    from orpo_ray.data.refusals import refuse_one_kind

    artifact = _prepare(run, console)
    refuse_one_kind(artifact)
    if run.config.adapter.kind != "none" and run.config.adapter.targets != "all-linear":
        from orpo_ray.models.size import refuse_unknown_targets

        refuse_unknown_targets(run.config)
    return artifact


def _tokenizer(config: RunConfig, console: Console) -> PreTrainedTokenizerBase:
    from orpo_ray.models.tokenizer import load_tokenizer, make_local

    make_local(config.model, console.announce)
    return load_tokenizer(config.model, console.announce)


# --- train ----------------------------------------------------------------------------------------


def train(
    config: RunConfig, console: Console = _PRINTING, verbose: bool = False, extend: bool = False
) -> TrainResult:
    """Train a run to its end; an unfinished run of this name is resumed.

    A finished run is not trained again. With `extend` it continues with the further steps that its
    settings now ask for. The console gets what was decided, and the numbers of each step. If it
    asks to stop, or SIGINT or SIGTERM comes, the run ends with a checkpoint and StoppedError.
    `verbose` shows what Ray's processes log. The stages of a run are trained one after the other.
    Each is a run of its own in the folder of the whole.
    """
    _refuse_others(config, console)
    run = Run(config)
    run.check_writable()
    if extend:
        _extend(run, console)
    if (finished := run.look(console)) is not None:
        return finished
    run.refuse_busy(_ONLOOKER_S)
    _refuse_missing_before_training(config)
    if config.stages:
        return _train_in_stages(run, console, verbose)
    placement = _place(config.scale, console, verbose)
    _check_cluster(run, console)
    # This comes before the run has a folder, so that refused data leaves nothing behind.
    artifact = _prepare_training(run, console)
    with run.at_work(console, _ONLOOKER_S) as finished:
        if finished is not None:
            return finished
        _wait_for_room(config.scale, placement, console)
        _train(run, artifact, placement, console)
    run.fetch(RESULT_FILE)
    result = run.result()
    assert result is not None, "a run that ends without an error has a result"
    return result


def _extend(run: Run, console: Console) -> None:
    """Reopen a finished run for more steps. `train` then resumes it."""
    from orpo_ray.runs.extend import described, extend, refuse_unfinished
    from orpo_ray.training.run_plan import steps_of_run

    config = run.config
    if config.stages:
        raise ConfigError(
            "--extend: a run in stages is not extended; start a new run of its last stage with "
            f"adapter.init_from={run.place}"
        )
    run.refresh()
    refuse_unfinished(run)
    artifact = _prepare(run, SILENT)
    with run.lock(_ONLOOKER_S):
        run.refresh()
        extend(run, len(steps_of_run(config, len(artifact.train))))
    console.announce(described(run))


def _train(run: Run, artifact: Artifact, placement: Placement, console: Console) -> None:
    """Decide what the settings leave open, then train in this process or in Ray's workers."""
    hardware = _hardware(run.config.scale, placement)
    if placement.uses_ray:
        with without_collections():
            from orpo_ray.distributed.run import Ground, train_on

        with StopSignal(console) as heard:
            train_on(Ground(artifact, placement, hardware), run, heard)
        return
    with without_collections():
        from orpo_ray.training import loop
        from orpo_ray.training.reporter import LocalReporter
        from orpo_ray.training.setup import settle

    with StopSignal(console) as heard:
        setup = settle(run, artifact, console.announce, hardware)
        loop.train(run, artifact, setup, LocalReporter(run, heard), console.announce)


def _train_in_stages(run: Run, console: Console, verbose: bool) -> TrainResult:
    config, stages = run.config, stage_configs(run.config)
    _place(stages[0].scale, SILENT, verbose)
    _check_cluster(run, console)
    _prepare_stages(config, stages, console, verbose)
    with run.at_work(console, _ONLOOKER_S) as finished:
        if finished is not None:
            return finished
        return conclude_stages(
            run,
            [Run(stage) for stage in stages],
            _train_stages(config, stages, console, verbose),
        )


def _prepare_stages(
    config: RunConfig, stages: Sequence[RunConfig], console: Console, verbose: bool
) -> None:
    """Check workers and pairs of every stage before the first one is trained."""
    for number, stage in enumerate(stages):
        _place(stage.scale, console, verbose)
        try:
            _prepare_training(Run(_before_training(config, stage)), SILENT)
        except DataError as error:
            raise DataError(f"stages.{number}: {error}") from error


def _train_stages(
    config: RunConfig, stages: Sequence[RunConfig], console: Console, verbose: bool
) -> list[TrainResult]:
    """Train the first stages of a run, or all of them, except those that are finished."""
    results = []
    for number, stage in enumerate(stages, start=1):
        run = Run(stage, is_stage=True)
        result = run.look(SILENT)
        done = ", finished already" if result else ""
        console.announce(
            f"stage {number} of {len(config.stages)}: {stage.objective.kind}, in {run.place}{done}"
        )
        results.append(result or train(stage, console, verbose))
    return results


def _before_training(config: RunConfig, stage: RunConfig) -> RunConfig:
    """The stage in a form that can be planned before earlier stages are trained.

    In full training its base is the result of the stage before, which does not exist yet. The run's
    own base takes its place: it has the same tokenizer and size.
    """
    if stage.adapter.kind != "none":
        return stage
    first = {"base": config.model.base, "revision": config.model.revision}
    return stage.model_copy(update={"model": stage.model.model_copy(update=first)})


# --- tune -----------------------------------------------------------------------------------------


def tune(config: RunConfig, console: Console = _PRINTING, verbose: bool = False) -> SearchResult:
    """Search the settings that `search` names; an unfinished search is resumed.

    The search lies in the folder `search` of the run. A finished one is not run again. The console
    is shown the search after each change. Stages before the searched one are trained first, and
    shown as `train` shows them. It is stopped as `train` is.
    """
    _refuse_others(config, console)
    Run(config).check_writable()
    run, space, searched = _read_search(config, console)
    if (search := run.look(console)) is not None:
        return search.result()
    run.refuse_busy(_ONLOOKER_S)
    _refuse_missing_before_training(config)
    placement = _place(searched.scale, console, verbose)
    _check_cluster(Run(searched), console)
    if space.stage:
        earlier = stage_configs(run.config)[: space.stage]
        _prepare_stages(run.config, [*earlier, searched], console, verbose)
        _train_stages(run.config, earlier, console, verbose)
    artifact = _prepare_training(Run(searched), console)
    with run.at_work(console, _ONLOOKER_S) as search:
        if search is not None:
            return search.result()
        _wait_for_room(searched.scale, placement, console)
        return _search(run, space, artifact, placement, console)


def _read_search(config: RunConfig, console: Console) -> tuple[SearchRun, Space, RunConfig]:
    """The search, what it varies, and the config that all trials share."""
    from orpo_ray.search.space import resolve, trial_config, with_ranges

    run = search_for(with_ranges(config, console.announce))
    space = resolve(run.config)
    return run, space, trial_config(run.config, space, {}, run.name)


def _search(
    run: SearchRun, space: Space, artifact: Artifact, placement: Placement, console: Console
) -> SearchResult:
    from orpo_ray.distributed.run import Ground
    from orpo_ray.search.search import run_search

    ground = Ground(artifact, placement, _hardware(run.config.scale, placement))
    with StopSignal(console, "stopping; the same command resumes the trials") as heard:
        return run_search(run, space, ground, heard).result()


# --- plan -----------------------------------------------------------------------------------------


def plan(config: RunConfig, console: Console = _PRINTING) -> TrainPlan:
    """What `train` would do.

    Workers are placed and pairs are prepared. No model is loaded, and no run begins.
    """
    _refuse_others(config, console)
    _refuse_before_planning(config)
    if config.stages:
        return _plan_stages(config, console)
    run = Run(config)
    run.look(console)
    return _plan(run, _place(config.scale, console), console)


def plan_search(config: RunConfig, console: Console = _PRINTING) -> SearchPlan:
    """What `tune` would do: how many trials, how long, how many at once, over which ranges."""
    _refuse_others(config, console)
    _refuse_before_planning(config)
    run, space, searched = _read_search(config, console)
    run.look(console)
    placement = _place(searched.scale, console)
    trial = _plan(Run(_before_training(run.config, searched)), placement, console)
    from orpo_ray.distributed.preflight import cluster_nodes, runs_at_once

    trials = trial_count(run.config)
    return SearchPlan(
        name=run.name,
        trials=trials,
        at_once=min(runs_at_once(placement, cluster_nodes()), trials),
        trial=trial,
        space={name: asdict(domain) for name, domain in space.domains.items()},
    )


def _plan_stages(config: RunConfig, console: Console) -> TrainPlan:
    planned = []
    for number, stage in enumerate(stage_configs(config), start=1):
        console.announce(f"stage {number} of {len(config.stages)}: {stage.objective.kind}")
        Run(stage, is_stage=True).look(SILENT)
        planned.append(
            _plan(Run(_before_training(config, stage)), _place(stage.scale, console), console)
        )
    return TrainPlan(
        name=config.name, steps=sum(plan.steps for plan in planned), stages=tuple(planned)
    )


def _plan(run: Run, placement: Placement, console: Console) -> TrainPlan:
    from orpo_ray.training.run_plan import steps_of_run
    from orpo_ray.training.setup import all_lengths, decide

    config = run.config
    artifact = _prepare_training(run, console)
    decisions = decide(
        config,
        all_lengths(artifact),
        before=run.facts().get("decisions", {}),
        announce=console.announce,
        hardware=_hardware(config.scale, placement),
        workers=placement.workers,
        nodes=placement.nodes,
    )
    return TrainPlan(
        name=run.name,
        steps=len(steps_of_run(config, len(artifact.train))),
        pairs=len(artifact.train),
        eval_pairs=len(artifact.eval),
        artifact=run.storage.place_of(artifact.path),
        workers=placement.workers,
        decisions=asdict(decisions),
    )


# --- evaluate -------------------------------------------------------------------------------------


def evaluate(
    config: RunConfig,
    adapter: str | PathLike[str] | None = None,
    conversations: Sequence[list[Message]] = (),
    samples: int = 0,
    max_new_tokens: int = 128,
    base_only: bool = False,
    console: Console = _PRINTING,
) -> Evaluation:
    """Compare the base with what the run made of it, on data.eval.

    `base_only` judges the base alone. `adapter` names another adapter or run to judge. Both models
    answer the first `samples` evaluation prompts, or `conversations` if they are given. A run in
    stages is judged with the settings of its last stage. The result is kept in the run's folder, as
    evaluation.json or evaluation-base.json.
    """
    _refuse_others(config, console)
    if base_only and adapter is not None:
        raise ConfigError("--base-only judges the base alone; leave out --adapter")
    whole = Run(config)
    trained = None if base_only else _named_adapter(config, adapter) or _trained_by(whole)
    config = _last_stage(config)
    _refuse_missing_inputs(config)
    from orpo_ray.evaluation.evaluate import Questions, evaluation_of, judge_model
    from orpo_ray.models.hardware import probe_hardware

    run, tokenizer = Run(config), _tokenizer(config, console)
    artifact = _prepare(run, console)
    decisions = _decide_for_one(run, artifact, probe_hardware(), console)
    prompts = _prompts(tokenizer, artifact, conversations, samples)
    questions = Questions(prompts, max_new_tokens)
    judged = []
    for who in [None] if base_only else [None, trained]:
        console.announce(f"judging {who or config.model.base} on {len(artifact.eval)} pairs")
        judged.append(
            judge_model(config, decisions, tokenizer, artifact.eval, questions, trained=who)
        )
    shown = tokenizer.batch_decode(prompts, skip_special_tokens=True) if prompts else []
    evaluation = evaluation_of(whole.name, trained, shown, judged, max_new_tokens)
    try:
        whole.keep_evaluation(evaluation)
    except OSError as error:  # the run may be read-only for this user
        console.announce(f"{whole.place}: the evaluation is not kept there: {error.strerror}")
    return evaluation


def _prompts(
    tokenizer: PreTrainedTokenizerBase,
    artifact: Artifact,
    conversations: Sequence[list[Message]],
    samples: int,
) -> list[list[int]]:
    from orpo_ray.data.tokenise import PairTokeniser

    if conversations:
        return PairTokeniser(tokenizer).prompts(conversations)
    return [artifact.eval[i].prompt.tolist() for i in range(min(samples, len(artifact.eval)))]


def _named_adapter(config: RunConfig, adapter: str | PathLike[str] | None) -> str | None:
    """The adapter that was asked for. A wrong one is refused here, before the base is judged."""
    if adapter is None:
        return None
    from orpo_ray.models.trained import fetch_trained, find_adapter

    place = fspath(adapter)
    fetch_trained(place)
    if config.adapter.kind != "none":
        find_adapter(place)
    return place


def _trained_by(run: Run) -> str:
    run.refresh()
    if run.result() is None:
        state = "is not finished" if run.path(CONFIG_FILE).exists() else "does not exist"
        raise ConfigError(
            f"run {run.name} in {run.storage_place} {state}; train it, or name an adapter"
        )
    return run.adapter


def _last_stage(config: RunConfig) -> RunConfig:
    """The settings with which the last stage's model is loaded: those of a run without stages."""
    return _before_training(config, stage_configs(config)[-1]) if config.stages else config


def _decide_for_one(
    run: Run, artifact: Artifact | None, hardware: Hardware, console: Console
) -> Decisions:
    """The run's own number format and attention, or the best that this machine has.

    One process does the work, also if several workers trained. Without an artifact no pair is read,
    so nothing is said of their layout.
    """
    from orpo_ray.training.setup import all_lengths, decide, no_lengths

    run.refresh()
    before = run.facts().get("decisions", {})
    lengths = no_lengths() if artifact is None else all_lengths(artifact)
    announce = SILENT.announce if artifact is None else console.announce
    one_worker = run.config.model_copy(update={"scale": ScaleConfig(workers=1)})
    try:
        return decide(one_worker, lengths, before, announce, hardware)
    except ResourceError as error:
        console.announce(
            f"the run was trained in a way that this machine lacks ({error}); going on in another"
        )
        return decide(one_worker, lengths, {}, announce, hardware)


# --- generate -------------------------------------------------------------------------------------


def generate(
    config: RunConfig,
    prompts: str | PathLike[str],
    out: str | PathLike[str],
    *,
    model: str = "trained",
    format: str = "jsonl",
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_tokens: int = 8192,
    adapter: str | PathLike[str] | None = None,
    console: Console = _PRINTING,
) -> Generated:
    """Write the answers of the trained model, the base, or both to the prompts of a file.

    `prompts` holds rows with prompts in any shape that `prepare` reads, with or without answers, or
    text with one prompt on each line. Answers are kept in `out` with `.part` after its name as they
    come, so the same call goes on after it was ended. As many workers answer as `config.scale` has,
    and their number changes nothing. A temperature of 0 takes the likeliest token each time.
    """
    _refuse_others(config, console)
    from orpo_ray.evaluation.orders import Sampling, order_of

    order = order_of(Path(out), format, model, batch_tokens)
    sampling = Sampling(
        max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed
    )
    trained = (
        None if model == "base" else _named_adapter(config, adapter) or _trained_by(Run(config))
    )
    run = Run(_last_stage(config))
    _refuse_missing_template(run.config)
    _refuse_missing_base(run.config)
    with without_collections():
        from orpo_ray.data.prompts import read_prompts
        from orpo_ray.evaluation.answerer import Work, prompt_lengths
        from orpo_ray.evaluation.answering import Elsewhere, Here, write_answers
        from orpo_ray.evaluation.batches import Room
        from orpo_ray.models.tokenizer import tokenizer_fingerprint
        from orpo_ray.models.traits import read_positions

    asked = read_prompts(fspath(prompts))
    placement = _place(config.scale, console)
    tokenizer = _tokenizer(run.config, console)
    room = Room(max_new_tokens, batch_tokens, read_positions(run.config.model))
    lengths = prompt_lengths(tokenizer, asked, room.positions, fspath(prompts))
    work = Work(
        config=run.config,
        decisions=_decide_for_one(run, None, _hardware(config.scale, placement), console),
        trained=trained,
        sampling=sampling,
        room=room,
        tokenizer=tokenizer_fingerprint(tokenizer),
    )
    if placement.uses_ray:
        from orpo_ray.distributed.generation import answers_by_actors

        by: By = Elsewhere(work, asked, partial(answers_by_actors, placement))
    else:
        by = Here(work, asked)
    with StopSignal(console, "stopping; the same command goes on where it was") as heard:
        return write_answers(order, by, lengths, heard)


def load(
    run: RunConfig | str | PathLike[str],
    adapter: str | PathLike[str] | None = None,
    console: Console = SILENT,
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """The model that a run made, and its tokenizer, ready to generate.

    The run is a config, or the YAML, folder or URL that names it. `adapter` names another adapter
    or run. The model's generation_config holds every token that ends an answer.
    """
    from orpo_ray.runs.named import named_config

    config = run if isinstance(run, RunConfig) else named_config(run)
    _refuse_others(config, console)
    trained = _named_adapter(config, adapter) or _trained_by(Run(config))
    last = Run(_last_stage(config))
    _refuse_missing_template(last.config)
    _refuse_missing_base(last.config)
    with without_collections():
        from orpo_ray.data.endings import end_ids
        from orpo_ray.evaluation.evaluate import load_trained
        from orpo_ray.models.hardware import probe_hardware
        from orpo_ray.models.tokenizer import padding_id

    tokenizer = _tokenizer(last.config, console)
    decisions = _decide_for_one(last, None, probe_hardware(), console)
    model = load_trained(last.config, decisions, trained).model.eval()
    model.generation_config.eos_token_id = end_ids(tokenizer, model.generation_config)
    model.generation_config.pad_token_id = padding_id(tokenizer)
    return model, tokenizer


# --- what these functions share -------------------------------------------------------------------


def _refuse_others(config: object, console: object) -> None:
    """Raise ConfigError for a wrong type of config or console, before anything begins."""
    if not isinstance(config, RunConfig):
        raise ConfigError(f"config: must be what load_config returns, not {type(config).__name__}")
    if not isinstance(console, Console):
        raise ConfigError(f"console: must be an orpo_ray.Console, not {_kind(console)}")


def _kind(value: object) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


def _refuse_before_planning(config: RunConfig) -> None:
    """Refuse what a start on this machine would refuse, before Ray starts or pairs are read."""
    from orpo_ray.training.trackers import refuse_missing_trackers

    Run(config).check_writable()
    _refuse_missing_before_training(config)
    for run in [config, *stage_configs(config)]:
        refuse_missing_trackers(run)


def _refuse_missing_inputs(config: RunConfig) -> None:
    """Raise a user error for a template, file or base that is missing, before Ray starts."""
    from orpo_ray.data.sources import refuse_missing

    _refuse_missing_template(config)
    for source in (*config.data.train, *config.data.eval):
        refuse_missing(source)
    _refuse_missing_base(config)


def _refuse_missing_template(config: RunConfig) -> None:
    from orpo_ray.models.templates import template_text

    if config.model.chat_template is not None:
        template_text(config.model.chat_template)


def _refuse_missing_base(config: RunConfig) -> None:
    from orpo_ray.models.trained import missing_base

    if missing := missing_base(config.model.base):
        raise ConfigError(missing)


def _refuse_missing_before_training(config: RunConfig) -> None:
    """Refuse what is missing for a run, or for any of its stages before the first is trained."""
    from orpo_ray.models.trained import find_adapter

    for run in stage_configs(config) or [config]:
        first = run.adapter.init_from
        is_of_a_stage = first is not None and first.startswith(f"{config.place}/")
        if first is not None and not is_url(first) and not is_of_a_stage:
            find_adapter(first)
        _refuse_missing_inputs(_before_training(config, run))


def _place(scale: ScaleConfig, console: Console, verbose: bool = False) -> Placement:
    from orpo_ray.distributed.preflight import place

    return place(scale, console.announce, verbose)


def _check_cluster(run: Run, console: Console) -> None:
    """Check that every server of a cluster is ready for the run."""
    from orpo_ray.ray_runtime import joins_cluster

    if joins_cluster():
        from orpo_ray.distributed.servers import check_servers

        check_servers(run, console.announce)


def _wait_for_room(scale: ScaleConfig, placement: Placement, console: Console) -> None:
    from orpo_ray.distributed.preflight import free_nodes, wait_for_room
    from orpo_ray.ray_runtime import joins_cluster

    if joins_cluster():
        wait_for_room(placement, scale.queue_timeout, console.announce, free_nodes)


def _hardware(scale: ScaleConfig, placement: Placement) -> Hardware:
    """The hardware of each worker."""
    from orpo_ray.models.hardware import CPU, probe_hardware

    if not placement.gpus:
        return CPU
    if placement.uses_ray:
        from orpo_ray.distributed.launch import probe_worker

        found = probe_worker(placement)
    else:
        found = probe_hardware()
    if found.device == "cpu" and (placement.uses_ray or scale.gpus_per_worker != "auto"):
        where = (
            "the cluster has one, but torch finds none there"
            if placement.uses_ray
            else "torch finds none here"
        )
        raise ResourceError(
            f"scale.gpus_per_worker: a GPU is wanted, and {where}; set scale.gpus_per_worker=0 for "
            "CPUs"
        )
    return found
