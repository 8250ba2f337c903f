"""A run's samples.jsonl: what the model answers to the same few held-out prompts as it trains.

All text in it comes from data and from a model: whoever shows it must escape it.
"""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from orpo_ray.runs.files import SAMPLES_FILE
from orpo_ray.runs.metrics import read_metrics_line


@dataclass(frozen=True, kw_only=True)
class SampleAnswer:
    """The greedy answer to one held-out prompt at a step, beside the answers of the data.

    `ended` says whether it came to its end before the limit of its length. A row with a single
    answer has no `chosen` or no `rejected`.
    """

    step: int
    id: str
    prompt: str
    answer: str
    ended: bool
    chosen: str | None = None
    rejected: str | None = None


def sample_line(sample: SampleAnswer) -> str:
    """A line of samples.jsonl in ASCII, so that no character of an answer can break it."""
    found = {name: value for name, value in asdict(sample).items() if value is not None}
    return json.dumps(found) + "\n"


def samples_of(folder: Path) -> list[SampleAnswer]:
    """The answers that a run has kept, in the order of its evaluations."""
    path = folder / SAMPLES_FILE
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    known = {field.name for field in fields(SampleAnswer)}
    records: list[Any] = [read_metrics_line(line) for line in text.splitlines()]
    return [
        SampleAnswer(**{name: value for name, value in record.items() if name in known})
        for record in records
        if record is not None
    ]
