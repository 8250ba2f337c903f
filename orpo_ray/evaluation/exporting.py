"""The whole of `export`: what is written, and how it is compared with what was trained.

All is written into a folder beside the one that was asked for, and gets its name at the end. So a
command that fails or is killed leaves nothing that looks like a model.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

import torch
from peft import PeftModel
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from orpo_ray.config import RunConfig
from orpo_ray.data.endings import Endings, end_ids, end_texts
from orpo_ray.data.store import Summary
from orpo_ray.errors import ResourceError, RunError
from orpo_ray.evaluation.evaluate import load_trained
from orpo_ray.evaluation.export_place import built, refuse_full_disk, rejected
from orpo_ray.evaluation.likeness import (
    Questions,
    Sheet,
    ask,
    ask_folder,
    differences,
    likeness,
    score,
)
from orpo_ray.evaluation.memory import freed
from orpo_ray.evaluation.methods import Method, for_rounded_base, methods_of, nearest, tolerance
from orpo_ray.models.finishing import (
    copy_processors,
    rendered_ids,
    write_generation_config,
    write_model_config,
    write_tokenizer,
)
from orpo_ray.models.hardware import DTYPES
from orpo_ray.models.merge import Quantised, quantised_in
from orpo_ray.models.ollama import modelfile
from orpo_ray.models.placement import fits, free_memory
from orpo_ray.models.serve_page import Served, serve_page, served_name
from orpo_ray.models.size import count_parameters
from orpo_ray.models.trained import fetch_trained
from orpo_ray.runs.console import Announce
from orpo_ray.runs.files import write_json
from orpo_ray.runs.results import DEQUANTISED, NO_MERGE, ORIGINAL, Exported, Likeness, TrainResult
from orpo_ray.runs.scores import PairScores
from orpo_ray.training.decisions import Decisions
from orpo_ray.training.memory import give_back_freed_memory
from orpo_ray.training.model_card import Card, write_export_card

EXPORT_FILE, SERVE_FILE, OLLAMA_FILE = "export.json", "SERVE.md", "Modelfile"


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What is exported, and what is known of it."""

    whole: RunConfig
    """The run as its user names it."""
    config: RunConfig
    """The settings with which its model is loaded: for a run in stages, those of the last."""
    place: str
    """The folder or URL of the adapter or model."""
    tokenizer: PreTrainedTokenizerBase
    summary: Summary
    result: TrainResult | None
    """None for a model that the run did not make."""
    positions: int | None
    """How many tokens the base reads."""

    @property
    def name(self) -> str:
        """The name of the run, or of the adapter that was named in its place."""
        if self.result is not None:
            return self.whole.name
        return PurePath(self.place.removesuffix("/adapter")).name

    @property
    def makes_up_for_rounding(self) -> bool:
        """Whether an adapter started by LoftQ, in this run or in its first stage."""
        return "loftq" in (self.whole.adapter.init, self.config.adapter.init)

    @property
    def is_adapter(self) -> bool:
        """Whether an adapter was trained, and not every weight."""
        return self.config.adapter.kind != "none"


@dataclass(frozen=True)
class Known:
    """What is learnt from the model as it was trained."""

    sheet: Sheet
    untrained: PairScores | None
    """The scores without the adapter; None for a model that was trained whole."""
    quantised: Quantised
    ends: list[int]
    """Every token that ends an answer."""


@dataclass(frozen=True)
class Comparison:
    """What all that was written is compared by."""

    questions: Questions
    known: Known
    candidates: dict[str, Likeness]
    """By the way in which each was written, if there were several."""


@dataclass(frozen=True, kw_only=True)
class Written:
    """A folder that was written, and what it is compared with."""

    folder: Path
    merge: str
    dtype: torch.dtype
    again: Sheet
    """What it says as it loads again."""
    explained_by: Known
    """The unmerged model on the same weights of the base."""


def export_model(
    trained: Trained, questions: Questions, folder: Path, merge: str, announce: Announce
) -> Exported:
    """Write a model that other programs load, and compare it with what was trained.

    Raises RunError if the folder, as it loads again, behaves otherwise than its merge explains; it
    is then named `.rejected`. Raises ResourceError without enough room on disk or in memory.
    """
    give_back_freed_memory()
    fetch_trained(trained.place)
    if trained.makes_up_for_rounding:
        merge = for_rounded_base(merge)
    methods = methods_of(trained.config, trained.place, merge, questions.decisions)
    checkable = _checkable(methods, questions.decisions)
    refuse_full_disk(folder, sum(method.bytes for method in methods))
    with built(folder) as building:
        announce("asking the model as it was trained")
        known = ask_trained(trained.config, trained.place, trained, questions)
        candidates: dict[str, Likeness] = {}
        for method in methods:
            announce(f"writing {_WRITING[method.name]}")
            freed(_write, trained, method, building / method.name, known)
            if len(methods) > 1:
                found = likeness(known.sheet, freed(ask_folder, building / method.name, questions))
                announce(f"{method.name}: {told(found)}")
                candidates[method.name] = found
        chosen = nearest(checkable, candidates)
        announce("loading again what was written")
        made = building / chosen.name
        again = freed(ask_folder, made, questions)
        explained_by = known
        if not chosen.keeps_weights:
            announce("asking the trained model on the base as it was published")
            config = _unquantised(trained.config)
            explained_by = ask_trained(config, trained.place, trained, questions)
        written = Written(
            folder=made,
            merge=chosen.name,
            dtype=chosen.dtype,
            again=again,
            explained_by=explained_by,
        )
        comparison = Comparison(questions, known, candidates)
        return finish(trained, written, comparison, folder)


_WRITING = {
    ORIGINAL: "the adapter merged into the base as it was published",
    DEQUANTISED: "the adapter merged into the dequantised base that it was trained on",
    NO_MERGE: "the model that was trained",
}


def told(found: Likeness) -> str:
    """How near a written model is to the trained one, on one line."""
    parts = [f"log-probs per token differ by {found.max_log_prob_difference:.2g} at most"]
    if found.accuracy is not None:
        parts.append(f"accuracy {found.accuracy:.1%}")
    if found.greedy_agreement is not None:
        parts.append(f"{found.greedy_agreement:.0%} of the greedy answers are the same")
    return ", ".join(parts)


def _checkable(methods: Sequence[Method], decisions: Decisions) -> list[Method]:
    """The ways whose result can be told from a faulty one in the memory that there is.

    The original weights under an adapter of quantised ones are compared with that adapter on them.
    Raises ResourceError if there is no other way.
    """
    dtype, device = DTYPES[decisions.dtype], decisions.device
    found = [each for each in methods if each.keeps_weights or fits(each.source, dtype, device)]
    if not found:
        raise ResourceError(
            f"merge: {ORIGINAL} is compared with the adapter on the base as it was published, and "
            f"there is no room in memory for that; use {DEQUANTISED}, or a larger machine"
        )
    return found


def ask_trained(config: RunConfig, place: str, trained: Trained, questions: Questions) -> Known:
    """What a base with the adapter of a folder says, or a whole model.

    Raises ResourceError if it does not fit into memory.
    """
    decisions = questions.decisions
    needed = count_parameters(config.model).bytes(config.model.quantization, decisions.dtype)
    free = free_memory(decisions.device)
    if needed > free:
        raise ResourceError(
            f"no room in memory: the model as it was trained takes {needed / 1e9:.1f} GB, and "
            f"{free / 1e9:.1f} GB are free on {decisions.device}"
        )

    def asked() -> Known:
        model = load_trained(config, decisions, place)
        model.check_reads(questions.table)
        ends = end_ids(trained.tokenizer, model.model.generation_config)
        sheet = ask(model, questions, ends)
        untrained = None
        if isinstance(model.model, PeftModel):
            with model.model.disable_adapter():
                untrained = score(model, questions)
        return Known(sheet, untrained, quantised_in(model.causal_model), ends)

    return freed(asked)


def _unquantised(config: RunConfig) -> RunConfig:
    model = config.model.model_copy(update={"quantization": "none"})
    return config.model_copy(update={"model": model})


def _write(trained: Trained, method: Method, folder: Path, known: Known) -> None:
    """Write all that a program needs to load and serve a whole model."""
    folder.mkdir()
    method.write(folder, known.quantised)
    source, tokenizer = method.source.folder, trained.tokenizer
    write_model_config(folder, source, known.ends, method.dtype)
    copy_processors(folder, source)
    write_beside(trained, folder, known, source)
    stops = end_texts(tokenizer, known.ends)
    text = modelfile(tokenizer, stops, Endings(tokenizer).own)
    (folder / OLLAMA_FILE).write_text(text, encoding="utf-8")
    served = Served(
        name=served_name(trained.name),
        stops=stops,
        dtype=str(method.dtype).removeprefix("torch."),
        positions=trained.positions,
    )
    write_serve_page(folder, served)


def write_beside(trained: Trained, folder: Path, known: Known, source: Path) -> None:
    """Write the tokenizer with its template, and generation_config.json with all end tokens."""
    write_generation_config(folder, source, trained.tokenizer, known.ends)
    write_tokenizer(folder, trained.tokenizer, Endings(trained.tokenizer).own)


def write_serve_page(folder: Path, served: Served) -> None:
    """Write SERVE.md, and let all users read the weights as well: safetensors does not."""
    page = folder / SERVE_FILE
    page.write_text(serve_page(served), encoding="utf-8")
    for file in folder.glob("*.safetensors"):
        shutil.copymode(page, file)


def finish(
    trained: Trained,
    written: Written,
    comparison: Comparison,
    to: Path,
    base_name: str | None = None,
) -> Exported:
    """Tell what was found in export.json and in the card, and give the folder its name.

    `base_name` is the base's on the hub, if it is known by another one here. Raises RunError if the
    folder is not as it should be; it is then named `.rejected`.
    """
    questions, known = comparison.questions, comparison.known
    reloaded = likeness(known.sheet, written.again)
    explained = likeness(written.explained_by.sheet, written.again)
    exported = Exported(
        run=trained.name,
        folder=str(to),
        merge=written.merge,
        candidates=comparison.candidates or {written.merge: reloaded},
        reloaded=reloaded,
        merge_error=explained.max_log_prob_difference,
        tolerance=tolerance(written.dtype, questions.decisions, trained.config),
        pairs=len(questions.table),
        greedy_answers=len(questions.prompts),
    )
    record = exported.to_json()
    del record["folder"]
    write_json(written.folder / EXPORT_FILE, record)
    card = Card(
        config=trained.whole,
        summary=trained.summary,
        result=trained.result,
        is_adapter=trained.is_adapter and written.merge == NO_MERGE,
        base_name=base_name,
    )
    write_export_card(written.folder, card, exported)
    fault = _fault(trained, written, exported)
    kept = to if fault is None else rejected(to)
    written.folder.rename(kept)
    if fault is not None:
        raise RunError(f"{kept}: not fit for use: {fault}")
    return exported


def _fault(trained: Trained, written: Written, exported: Exported) -> str | None:
    """What is wrong with a folder that was written; None if it is as it should be."""
    if not exported.merge_error <= exported.tolerance:
        return (
            f"its log-probs per token differ from the unmerged model's by "
            f"{exported.merge_error:.3g}, and rounding explains {exported.tolerance:g}"
        )
    if has_lost_training(written.explained_by, written.again):
        return "it answers as the base without the adapter does"
    again = AutoTokenizer.from_pretrained(str(written.folder), trust_remote_code=False)
    if rendered_ids(again) != rendered_ids(trained.tokenizer):
        return "its tokenizer or template writes other tokens than in training"
    return None


def has_lost_training(known: Known, again: Sheet) -> bool:
    """Whether a written model is clearly nearer to the base than to the trained model.

    It needs no bound on rounding, so it also finds an adapter that changed little.
    """
    if known.untrained is None:
        return False
    from_trained = differences(known.sheet.scores, again.scores).mean()
    from_base = differences(known.untrained, again.scores).mean()
    return bool(2 * from_base < from_trained)
