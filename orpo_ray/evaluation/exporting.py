"""The whole of `export`: what is written, and how it is compared with what was trained.

All is written into a folder beside the one that was asked for, and gets its name at the end. So a
command that fails or is killed leaves nothing that looks like a model.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from orpo_ray.config import RunConfig
from orpo_ray.data.endings import Endings, end_ids
from orpo_ray.data.store import Summary
from orpo_ray.errors import ResourceError, RunError
from orpo_ray.evaluation.evaluate import load_trained
from orpo_ray.evaluation.export_place import built, refuse_full_disk, rejected
from orpo_ray.evaluation.likeness import Questions, Sheet, ask, ask_folder, likeness
from orpo_ray.evaluation.memory import freed
from orpo_ray.evaluation.methods import Method, methods_of, nearest, tolerance
from orpo_ray.models.finishing import rendered_ids, write_configs, write_tokenizer
from orpo_ray.models.hardware import DTYPES
from orpo_ray.models.merge import quantised_names
from orpo_ray.models.ollama import modelfile
from orpo_ray.models.placement import fits
from orpo_ray.models.serve_page import Served, serve_page
from orpo_ray.models.trained import fetch_trained
from orpo_ray.runs.console import Announce
from orpo_ray.runs.files import write_json
from orpo_ray.runs.results import DEQUANTISED, NO_MERGE, ORIGINAL, Exported, Likeness, TrainResult
from orpo_ray.training.memory import give_back_freed_memory
from orpo_ray.training.model_card import write_export_card

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
    def served_name(self) -> str:
        """The name under which other programs serve the model."""
        return self.whole.name.replace("/", "-")


def export_model(
    trained: Trained, questions: Questions, folder: Path, merge: str, announce: Announce
) -> Exported:
    """Write a model that other programs load, and compare it with what was trained.

    Raises RunError if the folder, as it loads again, behaves otherwise than its merge explains; it
    is then named `.rejected`. Raises ResourceError without enough room on disk or in memory.
    """
    give_back_freed_memory()
    fetch_trained(trained.place)
    methods = methods_of(trained.config, trained.place, merge, questions.decisions)
    refuse_full_disk(folder, sum(method.source.bytes for method in methods))
    with built(folder) as building:
        announce("asking the model as it was trained")
        known = ask_trained(trained.config, trained.place, trained, questions)
        candidates: dict[str, Likeness] = {}
        for method in methods:
            announce(f"writing {_WRITING[method.name]}")
            _write(trained, method, building / method.name, known)
            if len(methods) > 1:
                found = likeness(known.sheet, freed(ask_folder, building / method.name, questions))
                announce(f"{method.name}: {told(found)}")
                candidates[method.name] = found
        chosen = nearest(methods, candidates)
        announce("loading again what was written")
        again = freed(ask_folder, building / chosen.name, questions)
        reloaded = likeness(known.sheet, again)
        explained = reloaded
        if not chosen.keeps_weights:
            explained = _explained(trained, chosen, questions, again, announce)
        exported = Exported(
            folder=str(folder),
            merge=chosen.name,
            candidates=candidates or {chosen.name: reloaded},
            reloaded=reloaded,
            merge_error=explained.max_log_prob_difference,
            tolerance=tolerance(chosen.dtype, questions.decisions, trained.config),
            pairs=len(questions.table),
            greedy_answers=len(questions.prompts),
        )
        write_about(trained, building / chosen.name, exported)
        fault = fault_of(trained, building / chosen.name, exported)
        keep(building / chosen.name, folder, fault)
    return exported


_WRITING = {
    ORIGINAL: "the adapter merged into the base as it was published",
    DEQUANTISED: "the adapter merged into the dequantised base that it was trained on",
    NO_MERGE: "the model that was trained",
}


def told(found: Likeness) -> str:
    """How near a written model is to the trained one, on one line."""
    accuracy = "" if found.accuracy is None else f", accuracy {found.accuracy:.1%}"
    return (
        f"log-probs per token differ by {found.max_log_prob_difference:.2g} at most{accuracy}, "
        f"{found.greedy_agreement:.0%} of the greedy answers are the same"
    )


@dataclass(frozen=True)
class Known:
    """What is learnt from the model as it was trained."""

    sheet: Sheet
    quantised: frozenset[str]
    """The names of its quantised weights."""
    ends: list[int]
    """Every token that ends an answer."""

    def stops(self, tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
        """The texts of `ends`."""
        return tuple(map(str, tokenizer.convert_ids_to_tokens(self.ends)))


def ask_trained(config: RunConfig, place: str, trained: Trained, questions: Questions) -> Known:
    """The sheet of a base with the adapter of a folder, or of a whole model."""

    def asked() -> Known:
        model = load_trained(config, questions.decisions, place)
        model.check_reads(questions.table)
        ends = end_ids(trained.tokenizer, model.model.generation_config)
        sheet = ask(model, questions, ends)
        return Known(sheet, quantised_names(model.causal_model), ends)

    return freed(asked)


def _explained(
    trained: Trained, chosen: Method, questions: Questions, again: Sheet, announce: Announce
) -> Likeness:
    """How near the written model is to the adapter on the base as it was published.

    Raises ResourceError if that does not fit into memory.
    """
    decisions = questions.decisions
    if not fits(chosen.source, DTYPES[decisions.dtype], decisions.device):
        raise ResourceError(
            f"merge: {chosen.name} is compared with the adapter on the base as it was published, "
            f"and there is no room in memory for that; use {DEQUANTISED}, or a larger machine"
        )
    announce("asking the trained model on the base as it was published")
    config = _unquantised(trained.config)
    return likeness(ask_trained(config, trained.place, trained, questions).sheet, again)


def _unquantised(config: RunConfig) -> RunConfig:
    model = config.model.model_copy(update={"quantization": "none"})
    return config.model_copy(update={"model": model})


def _write(trained: Trained, method: Method, folder: Path, known: Known) -> None:
    """Write all that a program needs to load and serve the model."""
    folder.mkdir()
    method.write(folder, known.quantised)
    tokenizer = trained.tokenizer
    stops = known.stops(tokenizer)
    write_configs(folder, method.source.folder, tokenizer, known.ends, method.dtype)
    end = Endings(tokenizer).own
    write_tokenizer(folder, tokenizer, end)
    (folder / OLLAMA_FILE).write_text(modelfile(tokenizer, stops, end), encoding="utf-8")
    served = Served(
        name=trained.served_name,
        stops=stops,
        dtype=str(method.dtype).removeprefix("torch."),
        positions=trained.positions,
    )
    (folder / SERVE_FILE).write_text(serve_page(served), encoding="utf-8")
    let_all_read(folder, SERVE_FILE)


def let_all_read(folder: Path, like: str) -> None:
    """Give weights the mode of another file: safetensors lets only their owner read them."""
    for file in folder.glob("*.safetensors"):
        shutil.copymode(folder / like, file)


def write_about(trained: Trained, folder: Path, exported: Exported) -> None:
    """Write export.json and the card."""
    written = exported.to_json()
    del written["folder"]
    write_json(folder / EXPORT_FILE, written)
    write_export_card(folder, trained.whole, trained.summary, trained.result, exported)


def fault_of(trained: Trained, folder: Path, exported: Exported) -> str | None:
    """What is wrong with a folder that was written; None if it is as it should be."""
    if not exported.merge_error <= exported.tolerance:
        return (
            f"its log-probs per token differ from the unmerged model's by "
            f"{exported.merge_error:.3g}, and rounding explains {exported.tolerance:g}"
        )
    again = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    if rendered_ids(again) != rendered_ids(trained.tokenizer):
        return "its tokenizer or template writes other tokens than in training"
    return None


def keep(made: Path, folder: Path, fault: str | None) -> None:
    """Give the folder its name. Raises RunError if there is a fault."""
    kept = folder if fault is None else rejected(folder)
    made.rename(kept)
    if fault is not None:
        raise RunError(f"{kept}: not fit for use: {fault}")
