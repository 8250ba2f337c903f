"""Who wrote the better greedy answers, a result or its base: by their words, or by a judge."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from orpo_ray.config.contenders import settings_of
from orpo_ray.data.pairs import Message
from orpo_ray.distributed.run import Ground
from orpo_ray.errors import ResourceError, RunError
from orpo_ray.evaluation.judge.answers import Answered, Sides
from orpo_ray.evaluation.judge.answers import Comparison as Row
from orpo_ray.evaluation.judge.judging import Judge, points_of_rows
from orpo_ray.runs.comparison_run import ComparisonRun
from orpo_ray.runs.console import Console
from orpo_ray.runs.files import read_json, write_json
from orpo_ray.runs.run import Run
from orpo_ray.search.greedy import (
    Questions,
    Said,
    Told,
    answers_of_run,
    questions_of,
    told,
)

FILE = "judged.json"
"""What the judge gave each greedy answer of a run, in its folder."""
_VERDICTS = "judged-{settings}.jsonl"


def tell(
    run: ComparisonRun,
    done: Mapping[str, Mapping[int, Run]],
    ground: Ground,
    console: Console,
    judge: Judge | None,
) -> dict[str, list[Told]]:
    """What the greedy answers of each method tell, by seed; none if they cannot be generated.

    `done` has the finished runs of each method by their seeds. Raises StoppedError on request.
    """
    count = settings_of(run.config).answers
    if not count:
        return {}
    some = next(each for runs in done.values() for each in runs.values())
    console.announce("generating greedy answers of the base and of every result")
    try:
        asked = questions_of(ground.artifact, run.config, count)
        base = answers_of_run(ground, asked, some, run, console, trained=False)
        ours = {
            each.name: answers_of_run(ground, asked, each, each, console)
            for runs in done.values()
            for each in runs.values()
        }
    except (RunError, ResourceError) as error:
        console.announce(f"the answers could not be generated: {error}")
        return {}
    if judge is not None:
        console.announce(f"asking {judge.name} which answers are better than the base's")

    def told_by(each: Run) -> Told:
        answers = ours[each.name]
        found = told(asked, answers, base)
        if judge is None:
            return found
        return judged(found, sides_of(asked, answers, base, each.name), judge, each, console)

    return {method: [told_by(each) for each in runs.values()] for method, runs in done.items()}


def judged(by_words: Told, sides: Sides, judge: Judge, run: Run, console: Console) -> Told:
    """What answers tell, with wins by a judge; none if it cannot be asked, which is announced.

    What an earlier command asked is taken, or gone on with. Raises StoppedError on request.
    """
    try:
        return replace(by_words, wins=_wins(sides, judge, run, console))
    except (RunError, ResourceError) as error:
        console.announce(
            f"{run.name} has no wins by {judge.name}: {error}; the same command asks again"
        )
        return replace(by_words, wins=())


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
