"""The README beside an adapter: what it was made from, how, and how good it is."""

import json
import re
from pathlib import Path
from typing import Any

import yaml

from orpo_ray.config import RunConfig, dump
from orpo_ray.config.storage import is_url
from orpo_ray.data.store import Summary
from orpo_ray.runs.results import TrainResult
from orpo_ray.runs.summary import METRIC_LABELS

_IN_THE_CACHE = re.compile(r"/models--([^/]+?)--([^/]+)/snapshots/")
"""A folder of the hub's local cache."""


def write_model_card(
    folder: Path, config: RunConfig, summary: Summary, result: TrainResult
) -> None:
    """Write README.md into an adapter folder."""
    (folder / "README.md").write_text(_card(config, summary, result), encoding="utf-8")


def _card(config: RunConfig, summary: Summary, result: TrainResult) -> str:
    dropped = sum(summary.bad.values())
    versions = ", ".join(f"{name} {number}" for name, number in result.versions.items())
    return "\n".join(
        [
            "---",
            yaml.safe_dump(_header(config, summary), sort_keys=False).strip(),
            "---",
            f"# {config.name}",
            _method(config, result),
            "",
            "## Data",
            *(f"- {source['source']}: {source['kept']} pairs" for source in summary.sources),
            "",
            f"{summary.train} pairs for training, {summary.eval} for evaluation, out of "
            f"{summary.read} rows read; dropped: {summary.duplicates} duplicates, "
            f"{summary.overlong} overlong, {dropped} bad. Data hash: `{summary.hash}`",
            *_single_answers(summary),
            "",
            "## On held-out pairs",
            *_evaluation(result),
            "",
            "## Settings",
            "```yaml",
            yaml.safe_dump(json.loads(json.dumps(dump(config))), sort_keys=False).strip(),
            "```",
            "",
            f"Made with {versions}.",
            "",
        ]
    )


def _single_answers(summary: Summary) -> list[str]:
    """What counts as a pair here and is none."""
    count = summary.good_answers + summary.bad_answers
    if not count:
        return []
    return [
        "",
        f"{count} of them have one answer: {summary.good_answers} good, {summary.bad_answers} bad. "
        "Without held-out pairs, the accuracy is the share of good and bad answers of which the "
        "good one is likelier per token.",
    ]


def _header(config: RunConfig, summary: Summary) -> dict[str, Any]:
    """The fields that the hub reads. A local base is left out: its path means nothing elsewhere."""
    header: dict[str, Any] = {}
    if base := _hub_name(config.model.base):
        header["base_model"] = base
    datasets = [source["source"] for source in summary.sources if _is_hub_name(source["source"])]
    if datasets:
        header["datasets"] = list(dict.fromkeys(datasets))
    if config.adapter.kind == "lora":
        header["library_name"] = "peft"
    return {**header, "tags": ["orpo-ray", config.objective.kind]}


def _is_hub_name(place: str) -> bool:
    """Whether a place is `owner/name` on the hub, and not a file or folder here."""
    looks_so = place.count("/") == 1 and not place.startswith((".", "/", "~")) and not is_url(place)
    return looks_so and not Path(place).exists()


def _hub_name(base: str) -> str | None:
    """The base's name on the hub; None for a folder that does not come from there."""
    if _is_hub_name(base):
        return base
    cached = _IN_THE_CACHE.search(Path(base).as_posix())
    return "/".join(cached.groups()) if cached else None


def _method(config: RunConfig, result: TrainResult) -> str:
    how = "LoRA adapter for" if config.adapter.kind == "lora" else "Fine-tuned from"
    place = config.model.base
    base = _hub_name(place) or (Path(place).name if Path(place).exists() else place)
    quantised = config.model.quantization
    held = "" if quantised == "none" else f", held in {quantised}"
    return (
        f"{how} `{base}`{held}, trained with {config.objective.kind.upper()} by orpo-ray in "
        f"{result.steps} steps of {config.training.pairs_per_step} pairs; the weights are those of "
        f"step {result.adapter_step}."
    )


def _evaluation(result: TrainResult) -> list[str]:
    """A table with one row per metric.

    It has the means before and after training, with 95 % intervals. If there are no intervals, it
    has only the last means.
    """
    if not result.changes:
        shown = {name.removeprefix("eval/"): value for name, value in result.metrics.items()}
        rows = [
            f"| {label} | {shown[name]:.4g} |"
            for name, label in METRIC_LABELS.items()
            if name in shown
        ]
        return ["| | after |", "|---|---|", *rows]
    rows = []
    for name, label in METRIC_LABELS.items():
        cells = (_interval(result.changes[name][when]) for when in ("before", "after"))
        rows.append(f"| {label} | {' | '.join(cells)} |")
    return ["| | before | after |", "|---|---|---|", *rows, "", *result.remarks]


def _interval(mean: dict[str, float]) -> str:
    return f"{mean['value']:.3f} ({mean['low']:.3f} to {mean['high']:.3f})"
