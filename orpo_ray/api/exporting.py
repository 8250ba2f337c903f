"""Export: a trained model as a folder that other programs load."""

from __future__ import annotations

from os import PathLike, fspath
from typing import TYPE_CHECKING

from orpo_ray.api.ground import (
    PRINTING,
    judged_pairs,
    refuse_others,
    tokenizer_of,
)
from orpo_ray.api.trained import config_of, decide_for_one, distinct_prompts, to_load
from orpo_ray.config import RunConfig
from orpo_ray.errors import ConfigError, DataError
from orpo_ray.evaluation.export_place import free_place
from orpo_ray.lean_imports import without_collections
from orpo_ray.runs.console import Console
from orpo_ray.runs.results import DEQUANTISED, NO_MERGE, ORIGINAL, Exported
from orpo_ray.runs.run import Run

if TYPE_CHECKING:
    from orpo_ray.data.store import Artifact
    from orpo_ray.evaluation.exporting import Trained
    from orpo_ray.evaluation.likeness import Questions

_MERGES = ("auto", ORIGINAL, DEQUANTISED, NO_MERGE)
_ANSWER_TOKENS = 64
"""The longest greedy answer of a comparison."""


def export(
    run: RunConfig | str | PathLike[str],
    to: str | PathLike[str],
    *,
    merge: str = "auto",
    adapter_only: bool = False,
    base_name: str | None = None,
    answers: int = 8,
    adapter: str | PathLike[str] | None = None,
    console: Console = PRINTING,
) -> Exported:
    """Write what a run trained as a folder that transformers, vLLM and llama.cpp load.

    The run is a config, or the YAML, folder or URL that names it.
    `merge` is `original`, `dequantised`, or `auto`: both are written, compared with the trained
    model on the held-out pairs and on `answers` greedy answers, and the nearer one is kept.
    `adapter_only`, or a merge of `none`, writes the adapter alone as vLLM loads it; `base_name` is
    its base on the hub, if the run took it from a folder. `adapter` names another adapter or run.
    Raises RunError if what was written behaves otherwise; the folder is then named `.rejected`.
    """
    config = config_of(run)
    refuse_others(config, console)
    folder = free_place(fspath(to))
    if merge not in _MERGES:
        raise ConfigError(f"merge: must be {', '.join(_MERGES)}, not {merge}")
    if answers < 0:
        raise ConfigError(f"answers: must be 0 or more, not {answers}")
    last, trained = to_load(config, adapter)
    assert trained is not None, "the base alone is not exported"
    is_adapter = _is_adapter_wanted(last.config, merge, adapter_only, base_name)
    with without_collections():
        from orpo_ray.evaluation.export_adapter import base_on_hub, export_adapter
        from orpo_ray.evaluation.exporting import Trained, export_model
        from orpo_ray.models.read_traits import read_positions

    tokenizer = tokenizer_of(last.config, console)
    _refuse_other_base(last)
    artifact = judged_pairs(last, console)
    made = Trained(
        whole=config,
        config=last.config,
        place=trained,
        tokenizer=tokenizer,
        summary=artifact.summary,
        result=Run(config).result() if adapter is None else None,
        positions=read_positions(last.config.model),
    )
    questions = _questions(last, artifact, made, answers, console)
    if is_adapter:
        base = base_on_hub(made, base_name)
        return export_adapter(made, questions, folder, base, console.announce)
    return export_model(made, questions, folder, merge, console.announce)


def _questions(
    run: Run, artifact: Artifact, made: Trained, answers: int, console: Console
) -> Questions:
    """What the models are asked: the held-out pairs, and the first prompts with room to answer."""
    from orpo_ray.evaluation.likeness import Questions
    from orpo_ray.models.hardware import probe_hardware
    from orpo_ray.models.tokenizer import padding_id

    if not len(artifact.eval):
        raise DataError("data.eval: no pairs are left to compare the models on")
    most = None if made.positions is None else made.positions - _ANSWER_TOKENS
    return Questions(
        table=artifact.eval,
        prompts=distinct_prompts(artifact.eval, answers, most),
        max_new_tokens=_ANSWER_TOKENS,
        decisions=decide_for_one(run, None, probe_hardware(), console),
        padding_id=padding_id(made.tokenizer),
    )


def _is_adapter_wanted(
    config: RunConfig, merge: str, adapter_only: bool, base_name: str | None
) -> bool:
    """Whether the adapter alone is written. Raises ConfigError for wishes that do not fit."""
    if adapter_only and merge not in ("auto", NO_MERGE):
        raise ConfigError(f"--adapter-only merges nothing; leave out --merge {merge}")
    is_whole = config.adapter.kind == "none"
    if adapter_only and is_whole:
        raise ConfigError("--adapter-only: the run trained every weight, so it has no adapter")
    wanted = adapter_only or (merge == NO_MERGE and not is_whole)
    if base_name is not None and not wanted:
        raise ConfigError("--base-name names the base of an adapter; add --adapter-only")
    return wanted


def _refuse_other_base(run: Run) -> None:
    """Raise ConfigError if the run was trained on another base than its settings name now.

    Of a run that trained every weight, the base is not read again.
    """
    from orpo_ray.models.identity import base_fingerprint

    if run.config.adapter.kind == "none":
        return
    stored = run.facts().get("identity", {}).get("model.base")
    if stored is not None and stored != base_fingerprint(run.config.model):
        raise ConfigError(
            f"model.base: {run.config.model.base} is not the base that run {run.name} was trained "
            "on; name that one"
        )
