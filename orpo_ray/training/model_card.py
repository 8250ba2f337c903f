"""The README beside an adapter: what it was made from, how, and how well it prefers."""

import json
from pathlib import Path
from typing import Any

import yaml

from orpo_ray.config import RunConfig, dump
from orpo_ray.data.store import Summary


def write_model_card(
    folder: Path, config: RunConfig, summary: Summary, metrics: dict[str, float]
) -> None:
    """Write README.md into an adapter folder."""
    (folder / "README.md").write_text(_card(config, summary, metrics), encoding="utf-8")


def _card(config: RunConfig, summary: Summary, metrics: dict[str, float]) -> str:
    how = "LoRA adapter for" if config.adapter.kind == "lora" else "Fine-tuned from"
    header: dict[str, Any] = {
        "base_model": config.model.base,
        "tags": ["orpo-ray", config.objective.kind],
    }
    if config.adapter.kind == "lora":
        header["library_name"] = "peft"
    rows = [f"| {name} | {value:.4g} |" for name, value in sorted(metrics.items())]
    return "\n".join(
        [
            "---",
            yaml.safe_dump(header, sort_keys=False).strip(),
            "---",
            f"# {config.name}",
            f"{how} `{config.model.base}`, trained with {config.objective.kind.upper()} by "
            "orpo-ray.",
            "",
            "## Data",
            f"{summary.train} pairs for training, {summary.eval} for evaluation, out of "
            f"{summary.read} rows read; "
            f"dropped: {summary.duplicates} duplicates, {summary.overlong} overlong, "
            f"{sum(summary.bad.values())} bad.",
            f"Data hash: `{summary.hash}`",
            "",
            "## Metrics",
            "| metric | last value |",
            "|---|---|",
            *rows,
            "",
            "## Settings",
            "```yaml",
            yaml.safe_dump(json.loads(json.dumps(dump(config))), sort_keys=False).strip(),
            "```",
            "",
        ]
    )
