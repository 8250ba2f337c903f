"""Evaluate, generate, load and chat: what is done with a model that a run made."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING

from orpo_ray.api.ground import (
    PRINTING,
    before_training,
    hardware_of,
    judged_pairs,
    place_workers,
    refuse_missing_base,
    refuse_missing_inputs,
    refuse_missing_template,
    refuse_others,
    tokenizer_of,
)
from orpo_ray.config import RunConfig, ScaleConfig, stage_configs
from orpo_ray.errors import ConfigError, ResourceError
from orpo_ray.lean_imports import without_collections
from orpo_ray.report.write import try_to_report
from orpo_ray.runs.console import SILENT, Console
from orpo_ray.runs.files import CONFIG_FILE, REPORT_FILE
from orpo_ray.runs.results import Evaluation, Generated
from orpo_ray.runs.run import Run
from orpo_ray.runs.stop import StopSignal

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from orpo_ray.data.pairs import Message
    from orpo_ray.data.prompts import Asked
    from orpo_ray.data.store import Artifact, PairTable
    from orpo_ray.distributed.preflight import Placement
    from orpo_ray.evaluation.answerer import Work
    from orpo_ray.evaluation.answering import By
    from orpo_ray.evaluation.chat import Chat
    from orpo_ray.models.hardware import Hardware
    from orpo_ray.training.decisions import Decisions
    from orpo_ray.training.pair_model import PairModel


def evaluate(
    config: RunConfig,
    adapter: str | PathLike[str] | None = None,
    conversations: Sequence[list[Message]] = (),
    samples: int = 0,
    max_new_tokens: int = 128,
    base_only: bool = False,
    console: Console = PRINTING,
) -> Evaluation:
    """Compare the base with what the run made of it, on data.eval.

    `base_only` judges the base alone. `adapter` names another adapter or run to judge. Both models
    answer the first `samples` different evaluation prompts, or `conversations` if they are given.
    A run in stages is judged with the settings of its last stage. The result is kept in the run's
    folder, as evaluation.json or evaluation-base.json.
    """
    refuse_others(config, console)
    if base_only and adapter is not None:
        raise ConfigError("--base-only judges the base alone; leave out --adapter")
    whole = Run(config)
    trained = None if base_only else _named_adapter(config, adapter) or _trained_by(config)
    config = _last_stage(config)
    refuse_missing_inputs(config)
    from orpo_ray.evaluation.evaluate import Questions, evaluation_of, judge_model
    from orpo_ray.models.hardware import probe_hardware

    run, tokenizer = Run(config), tokenizer_of(config, console)
    artifact = judged_pairs(run, console)
    decisions = decide_for_one(run, artifact, probe_hardware(), console)
    prompts = _prompts(tokenizer, artifact, conversations, samples)
    questions = Questions(prompts, max_new_tokens)
    judged = []
    for who in [None] if base_only else [None, trained]:
        console.announce(f"judging {who or config.model.base} on {len(artifact.eval)} pairs")
        judged.append(
            judge_model(
                config,
                decisions,
                tokenizer,
                artifact.eval,
                questions,
                trained=who,
                console=console,
            )
        )
    shown = tokenizer.batch_decode(prompts, skip_special_tokens=True) if prompts else []
    evaluation = evaluation_of(whole.name, trained, shown, judged, max_new_tokens)
    try:
        whole.keep_evaluation(evaluation)
    except OSError as error:  # the run may be read-only for this user
        console.announce(f"{whole.place}: the evaluation is not kept there: {error.strerror}")
    if whole.path(REPORT_FILE).exists():  # the page has room for the answers
        try_to_report(whole, console.announce)
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
    return distinct_prompts(artifact.eval, samples)


def distinct_prompts(
    table: PairTable, wanted: int, most_tokens: int | None = None
) -> list[list[int]]:
    """The first `wanted` prompts of a table, each once, without those of more than `most_tokens`.

    Several pairs may share a prompt.
    """
    found: dict[tuple[int, ...], None] = {}
    for pair in table:
        if len(found) == wanted:
            break
        if most_tokens is None or len(pair.prompt) <= most_tokens:
            found[tuple(pair.prompt.tolist())] = None
    return [list(prompt) for prompt in found]


def generate(
    run: RunConfig | str | PathLike[str],
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
    console: Console = PRINTING,
) -> Generated:
    """Write the answers of the trained model, the base, or both to the prompts of a file.

    The run is a config, or the YAML, folder or URL that names it. `prompts` holds rows with prompts
    in any shape that `prepare` reads, with or without answers, or text with one prompt on each
    line. Answers are kept in `out` with `.part` after its name as they come, so the same call goes
    on after it was ended. As many workers answer as the run's `scale` has, and their number changes
    nothing. A temperature of 0 takes the likeliest token each time.
    """
    config = config_of(run)
    refuse_others(config, console)
    from orpo_ray.evaluation.orders import order_of
    from orpo_ray.training.sampling import Room, Sampling

    order = order_of(Path(out), format, model, batch_tokens)
    sampling = Sampling(
        max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed
    )
    last, trained = to_load(config, adapter, base_only=model == "base")
    with without_collections():
        from orpo_ray.data.prompts import read_prompts
        from orpo_ray.evaluation.answerer import Work, prompt_lengths
        from orpo_ray.evaluation.answering import write_answers
        from orpo_ray.models.read_traits import read_positions
        from orpo_ray.models.tokenizer import tokenizer_fingerprint

    asked = read_prompts(fspath(prompts))
    placement = place_workers(config.scale, console)
    tokenizer = tokenizer_of(last.config, console)
    room = Room(max_new_tokens, batch_tokens, read_positions(last.config.model))
    lengths = prompt_lengths(tokenizer, asked, room.positions, fspath(prompts))
    work = Work(
        config=last.config,
        decisions=decide_for_one(last, None, hardware_of(config.scale, placement), console),
        trained=trained,
        sampling=sampling,
        room=room,
        tokenizer=tokenizer_fingerprint(tokenizer),
    )
    by = _answering(work, asked, placement)
    with StopSignal(console, "stopping; the same command goes on where it was") as heard:
        return write_answers(order, by, lengths, heard)


def _answering(work: Work, asked: Sequence[Asked], placement: Placement) -> By:
    """Who answers: this process, or the workers of a placement."""
    from orpo_ray.evaluation.answering import Elsewhere, Here

    if not placement.uses_ray:
        return Here(work, asked)
    from orpo_ray.distributed.generation import answers_by_actors

    return Elsewhere(work, asked, partial(answers_by_actors, placement))


def load(
    run: RunConfig | str | PathLike[str],
    adapter: str | PathLike[str] | None = None,
    console: Console = SILENT,
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """The model that a run made, and its tokenizer, ready to generate.

    The run is a config, or the YAML, folder or URL that names it. `adapter` names another adapter
    or run. The model's generation_config holds every token that ends an answer.
    """
    config = config_of(run)
    refuse_others(config, console)
    model, tokenizer = _loaded(*to_load(config, adapter), console)
    from orpo_ray.data.endings import end_ids
    from orpo_ray.models.tokenizer import padding_id

    own = model.model.eval()
    own.generation_config.eos_token_id = end_ids(tokenizer, own.generation_config)
    own.generation_config.pad_token_id = padding_id(tokenizer)
    return own, tokenizer


def chat(
    config: RunConfig,
    *,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    adapter: str | PathLike[str] | None = None,
    console: Console = PRINTING,
) -> Chat:
    """A conversation with the model that the run made, which the `chat` command shows.

    A temperature of 0 takes the likeliest token each time. `adapter` names another adapter or run.
    """
    refuse_others(config, console)
    from orpo_ray.training.sampling import Sampling

    sampling = Sampling(
        max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed
    )
    run, trained = to_load(config, adapter)
    model, tokenizer = _loaded(run, trained, console)
    from orpo_ray.evaluation.chat import Chat
    from orpo_ray.models.templates import template_name
    from orpo_ray.training.generate import Speaker

    def load_base() -> Speaker:
        console.announce(f"loading the base, {run.config.model.base}")
        return Speaker(*_loaded(run, None, SILENT))

    template = template_name(run.config.model.chat_template, str(tokenizer.chat_template))
    title = f"{adapter or config.name}, with the chat template: {template}"
    return Chat(Speaker(model, tokenizer), sampling, load_base, title)


def config_of(run: RunConfig | str | PathLike[str]) -> RunConfig:
    """The settings of a run that is named by them, or by its YAML, folder or URL."""
    from orpo_ray.runs.named import named_config

    return run if isinstance(run, RunConfig) else named_config(run)


def to_load(
    config: RunConfig, adapter: str | PathLike[str] | None, base_only: bool = False
) -> tuple[Run, str | None]:
    """The run that knows how to load a model, and what it made; None if the base alone is wanted.

    Of a run in stages it is the last one. Refuses a run that is not finished, and an adapter, a
    template or a base that is not there.
    """
    trained = None if base_only else _named_adapter(config, adapter) or _trained_by(config)
    run = Run(_last_stage(config))
    refuse_missing_template(run.config)
    refuse_missing_base(run.config)
    return run, trained


def _loaded(
    run: Run, trained: str | None, console: Console
) -> tuple[PairModel, PreTrainedTokenizerBase]:
    """The model, and the tokenizer with its chat template."""
    with without_collections():
        from orpo_ray.evaluation.evaluate import load_trained
        from orpo_ray.models.hardware import probe_hardware

    tokenizer = tokenizer_of(run.config, console)
    decisions = decide_for_one(run, None, probe_hardware(), console)
    return load_trained(run.config, decisions, trained), tokenizer


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


def _trained_by(config: RunConfig) -> str:
    run = Run(config)
    run.refresh()
    if run.result() is None:
        state = "is not finished" if run.path(CONFIG_FILE).exists() else "does not exist"
        raise ConfigError(
            f"run {run.name} in {run.storage_place} {state}; train it, or name an adapter"
        )
    return run.adapter


def _last_stage(config: RunConfig) -> RunConfig:
    """The settings with which the last stage's model is loaded: those of a run without stages."""
    return before_training(config, stage_configs(config)[-1]) if config.stages else config


def decide_for_one(
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
