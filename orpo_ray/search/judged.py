"""A model in place of words: who wrote the better greedy answers, a result or its base."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from orpo_ray.data.pairs import Message
from orpo_ray.errors import ResourceError, RunError
from orpo_ray.evaluation.judge.answers import Answered, Sides
from orpo_ray.evaluation.judge.answers import Comparison as Row
from orpo_ray.evaluation.judge.judging import Judge, points_of_rows
from orpo_ray.runs.console import Console
from orpo_ray.runs.files import read_json, write_json
from orpo_ray.runs.run import Run
from orpo_ray.search.greedy import Questions, Said, Told

FILE = "judged.json"
"""What the judge gave each greedy answer of a run, in its folder."""
_VERDICTS = "judged-{settings}.jsonl"


def judged(told: Told, sides: Sides, judge: Judge, run: Run, console: Console) -> Told:
    """What answers tell, with wins by a judge; none if it cannot be asked, which is announced.

    What an earlier command asked is taken, or gone on with. Raises StoppedError on request.
    """
    try:
        return replace(told, wins=_wins(sides, judge, run, console))
    except (RunError, ResourceError) as error:
        console.announce(
            f"{run.name} has no wins by {judge.name}: {error}; the same command asks again"
        )
        return replace(told, wins=())


def sides_of(asked: Questions, ours: Sequence[Said], base: Sequence[Said], name: str) -> Sides:
    """The answers of a result and of its base, as a judge reads them."""

    def answered(prompt: str, said: Said) -> Answered:
        messages: list[Message] = [{"role": "user", "content": prompt}]
        return Answered(messages, said.text)

    rows = [
        Row(answered(prompt, one), answered(prompt, other))
        for prompt, one, other in zip(asked.prompts, ours, base, strict=True)
    ]
    return Sides(rows, name, "base")


def _wins(sides: Sides, judge: Judge, run: Run, console: Console) -> tuple[float, ...]:
    """1, 0.5 or 0 for each answer; NaN if no verdict on it can be read."""
    settings = {**sides.settings, **judge.settings}
    written = read_json(run.fetch(FILE))
    if written is None or written.get("asked") != settings:
        # Verdicts of other answers, or of another judge, are in a file of another name.
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        name = _VERDICTS.format(settings=digest[:8])
        out = run.path(name)
        out.unlink(missing_ok=True)  # of a command that was killed before it wrote FILE
        points = points_of_rows(out, sides, judge, console)
        found = [None if np.isnan(point) else float(point) for point in points]
        written = {"asked": settings, "wins": found}
        write_json(run.path(FILE), written)
        run.store(name, FILE)
    return tuple(float("nan") if point is None else point for point in written["wins"])
