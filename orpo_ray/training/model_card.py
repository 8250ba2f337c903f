"""The README beside an adapter or a model: what it was made from, how, and how good it is."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from orpo_ray.config import RunConfig, dump, stage_configs
from orpo_ray.data.store import Summary
from orpo_ray.models.identity import hub_name, is_hub_name
from orpo_ray.runs.results import DEQUANTISED, NO_MERGE, ORIGINAL, Exported, TrainResult
from orpo_ray.runs.summary import METRIC_LABELS


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a card is written of."""

    config: RunConfig
    summary: Summary
    result: TrainResult | None
    """None for an adapter that the run did not make."""
    is_adapter: bool
    """Whether the folder holds an adapter alone."""
    base_name: str | None = None
    """The base's name on the hub, if the config has another one."""

    @property
    def base(self) -> str | None:
        """The base's name on the hub; None for a folder of this machine."""
        return self.base_name or hub_name(self.config.model.base)

    @property
    def shown_base(self) -> str:
        """The base for a reader: the last part of a folder's path means nothing elsewhere, too."""
        place = self.config.model.base
        return self.base or (Path(place).name if Path(place).exists() else place)


def write_model_card(
    folder: Path, config: RunConfig, summary: Summary, result: TrainResult
) -> None:
    """Write README.md into an adapter folder."""
    is_adapter = config.adapter.kind == "lora"
    card = Card(config=config, summary=summary, result=result, is_adapter=is_adapter)
    settings = json.loads(json.dumps(dump(config)))
    about = [_method(card, result), *_made(card, result, settings)]
    _write(folder, config.name, _header(card), about)


def write_export_card(folder: Path, card: Card, exported: Exported) -> None:
    """Write README.md into an exported folder: how it was merged, and what it was made from."""
    about, made = [], []
    if card.result is not None:
        about = [_method(card, card.result), *_chain(card.config, card.result), ""]
        settings = json.loads(json.dumps(dump(card.config)))
        # Where the run lies means nothing elsewhere.
        del settings["storage"]
        settings["model"]["base"] = card.shown_base
        made = _made(card, card.result, settings)
    _write(folder, exported.run, _header(card), [*about, "## Export", *_export(exported), *made])


def _write(folder: Path, name: str, header: dict[str, Any], lines: Sequence[str]) -> None:
    top = ["---", yaml.safe_dump(header, sort_keys=False).strip(), "---", f"# {name}"]
    (folder / "README.md").write_text("\n".join([*top, *lines, ""]), encoding="utf-8")


def _made(card: Card, result: TrainResult, settings: dict[str, Any]) -> list[str]:
    """The data, the evaluation and the settings."""
    summary = card.summary
    dropped = sum(summary.bad.values())
    versions = ", ".join(f"{name} {number}" for name, number in result.versions.items())
    return [
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
        yaml.safe_dump(settings, sort_keys=False).strip(),
        "```",
        "",
        f"Made with {versions}.",
    ]


def _chain(config: RunConfig, result: TrainResult) -> list[str]:
    """What was trained one after the other, all of which is in the weights."""
    if result.stages:
        parts = [
            f"{number}. {stage.objective.kind.upper()} in {done.steps} steps"
            for number, (stage, done) in enumerate(
                zip(stage_configs(config), result.stages, strict=True), start=1
            )
        ]
        return ["", "It was trained in stages, and the weights hold all of them:", "", *parts]
    if config.adapter.init_from:
        first = Path(config.adapter.init_from.removesuffix("/adapter")).name
        return ["", f"It went on from the adapter of `{first}`, and the weights hold both."]
    return []


_MERGED = {
    NO_MERGE: "The folder holds what was trained, and nothing was merged.",
    ORIGINAL: "The adapter is merged into the base as it was published.",
    DEQUANTISED: "The adapter is merged into the dequantised base that it was trained on.",
}


def _export(exported: Exported) -> list[str]:
    rows = {**exported.candidates, "as it loads again": exported.reloaded}
    table = [
        f"| {name} | {like.max_log_prob_difference:.2g} | {_share(like.accuracy)} | "
        f"{_share(like.greedy_agreement)} |"
        for name, like in rows.items()
    ]
    return [
        _MERGED[exported.merge],
        f"Compared with the model as it was trained, on {exported.pairs} held-out pairs and "
        f"{exported.greedy_answers} greedy answers:",
        "",
        "| | largest log-prob difference per token | accuracy | same greedy answers |",
        "|---|---|---|---|",
        *table,
    ]


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


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


def _header(card: Card) -> dict[str, Any]:
    """The fields that the hub reads. A local base is left out: its path means nothing elsewhere."""
    header: dict[str, Any] = {}
    if card.base:
        header["base_model"] = card.base
    if card.is_adapter:
        header["library_name"] = "peft"
    if card.result is None:
        return {**header, "tags": ["orpo-ray"]}
    sources = [source["source"] for source in card.summary.sources]
    datasets = list(dict.fromkeys(source for source in sources if is_hub_name(source)))
    if datasets:
        header["datasets"] = datasets
    return {**header, "tags": ["orpo-ray", *dict.fromkeys(_kinds(card.config))]}


def _kinds(config: RunConfig) -> list[str]:
    """The objectives that were trained, one after the other."""
    return [run.objective.kind for run in stage_configs(config) or [config]]


def _method(card: Card, result: TrainResult) -> str:
    config = card.config
    how = "LoRA adapter for" if card.is_adapter else "Fine-tuned from"
    quantised = config.model.quantization
    held = "" if quantised == "none" else f", held in {quantised}"
    methods = ", then ".join(kind.upper() for kind in _kinds(config))
    return (
        f"{how} `{card.shown_base}`{held}, trained with {methods} by orpo-ray in "
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
