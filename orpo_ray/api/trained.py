"""Evaluate, generate and load: what is done with a model that a run made."""

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
    place_workers,
    prepare_run,
    refuse_missing_base,
    refuse_missing_inputs,
    refuse_missing_template,
    refuse_others,
    tokenizer_of,
)
from orpo_ray.config import RunConfig, ScaleConfig, stage_configs
from orpo_ray.errors import ConfigError, ResourceError
from orpo_ray.lean_imports import without_collections
from orpo_ray.runs.console import SILENT, Console
from orpo_ray.runs.files import CONFIG_FILE
from orpo_ray.runs.results import Evaluation, Generated
from orpo_ray.runs.run import Run
from orpo_ray.runs.stop import StopSignal

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from orpo_ray.data.pairs import Message
    from orpo_ray.data.store import Artifact
    from orpo_ray.evaluation.answering import By
    from orpo_ray.models.hardware import Hardware
    from orpo_ray.training.decisions import Decisions


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
    answer the first `samples` evaluation prompts, or `conversations` if they are given. A run in
    stages is judged with the settings of its last stage. The result is kept in the run's folder, as
    evaluation.json or evaluation-base.json.
    """
    refuse_others(config, console)
    if base_only and adapter is not None:
        raise ConfigError("--base-only judges the base alone; leave out --adapter")
    whole = Run(config)
    trained = None if base_only else _named_adapter(config, adapter) or trained_by(whole)
    config = last_stage(config)
    refuse_missing_inputs(config)
    from orpo_ray.evaluation.evaluate import Questions, evaluation_of, judge_model
    from orpo_ray.models.hardware import probe_hardware

    run, tokenizer = Run(config), tokenizer_of(config, console)
    artifact = prepare_run(run, console)
    decisions = decide_for_one(run, artifact, probe_hardware(), console)
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
    console: Console = PRINTING,
) -> Generated:
    """Write the answers of the trained model, the base, or both to the prompts of a file.

    `prompts` holds rows with prompts in any shape that `prepare` reads, with or without answers, or
    text with one prompt on each line. Answers are kept in `out` with `.part` after its name as they
    come, so the same call goes on after it was ended. As many workers answer as `config.scale` has,
    and their number changes nothing. A temperature of 0 takes the likeliest token each time.
    """
    refuse_others(config, console)
    from orpo_ray.evaluation.orders import Sampling, order_of

    order = order_of(Path(out), format, model, batch_tokens)
    sampling = Sampling(
        max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed
    )
    trained = (
        None if model == "base" else _named_adapter(config, adapter) or trained_by(Run(config))
    )
    run = Run(last_stage(config))
    refuse_missing_template(run.config)
    refuse_missing_base(run.config)
    with without_collections():
        from orpo_ray.data.prompts import read_prompts
        from orpo_ray.evaluation.answerer import Work, prompt_lengths
        from orpo_ray.evaluation.answering import Elsewhere, Here, write_answers
        from orpo_ray.evaluation.batches import Room
        from orpo_ray.models.tokenizer import tokenizer_fingerprint
        from orpo_ray.models.traits import read_positions

    asked = read_prompts(fspath(prompts))
    placement = place_workers(config.scale, console)
    tokenizer = tokenizer_of(run.config, console)
    room = Room(max_new_tokens, batch_tokens, read_positions(run.config.model))
    lengths = prompt_lengths(tokenizer, asked, room.positions, fspath(prompts))
    work = Work(
        config=run.config,
        decisions=decide_for_one(run, None, hardware_of(config.scale, placement), console),
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
    refuse_others(config, console)
    trained = _named_adapter(config, adapter) or trained_by(Run(config))
    last = Run(last_stage(config))
    refuse_missing_template(last.config)
    refuse_missing_base(last.config)
    with without_collections():
        from orpo_ray.data.endings import end_ids
        from orpo_ray.evaluation.evaluate import load_trained
        from orpo_ray.models.hardware import probe_hardware
        from orpo_ray.models.tokenizer import padding_id

    tokenizer = tokenizer_of(last.config, console)
    decisions = decide_for_one(last, None, probe_hardware(), console)
    model = load_trained(last.config, decisions, trained).model.eval()
    model.generation_config.eos_token_id = end_ids(tokenizer, model.generation_config)
    model.generation_config.pad_token_id = padding_id(tokenizer)
    return model, tokenizer


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


def trained_by(run: Run) -> str:
    run.refresh()
    if run.result() is None:
        state = "is not finished" if run.path(CONFIG_FILE).exists() else "does not exist"
        raise ConfigError(
            f"run {run.name} in {run.storage_place} {state}; train it, or name an adapter"
        )
    return run.adapter


def last_stage(config: RunConfig) -> RunConfig:
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
