"""The greedy answers of every result of a comparison, and what they tell."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from orpo_ray.config import RunConfig
from orpo_ray.data.store import MANIFEST, Artifact, PairTable, open_artifact
from orpo_ray.distributed.run import Ground
from orpo_ray.evaluation.broken import nearness, vocabulary, why_broken
from orpo_ray.models.tokenizer import load_tokenizer
from orpo_ray.runs.console import SILENT, Console
from orpo_ray.runs.files import read_json, write_json
from orpo_ray.runs.run import Run, RunFolder
from orpo_ray.search.said import said_by, spread
from orpo_ray.search.tasks import on_a_worker
from orpo_ray.storage import fetched_folder

FILE = "greedy.json"
"""The greedy answers of one model, in the folder of its run; those of the base beside them."""
_MOST_TOKENS = 512
_READ_PAIRS = 5_000
"""So many training pairs say which words the pairs have."""


@dataclass(frozen=True)
class Said:
    """A greedy answer. `is_cut`: it did not end within its limit."""

    text: str
    is_cut: bool


@dataclass(frozen=True, kw_only=True)
class Questions:
    """Held-out pairs as texts, by their number in the table, and the words of all pairs."""

    numbers: tuple[int, ...]
    prompts: tuple[str, ...]
    chosen: tuple[str, ...]
    rejected: tuple[str, ...]
    words: frozenset[str]
    max_new_tokens: int


@dataclass(frozen=True)
class Told:
    """What answers tell: the share of broken ones, and of those that beat the base's, by prompt.

    A broken answer loses against one that is not; a tie is half a win. `broken_before` is the share
    of the base's answers that are broken.
    """

    broken: float
    wins: tuple[float, ...]
    why: dict[str, int]
    broken_before: float = 0.0


def questions_of(artifact: Artifact, config: RunConfig, count: int) -> Questions:
    """Prompts at equal distances, so that all sources have their share; answers may be as long."""
    tokenizer = load_tokenizer(config.model, SILENT.announce)
    table = artifact.eval
    numbers = spread(table, count)

    def texts(side: str, pairs: PairTable, rows: Sequence[int]) -> list[str]:
        ids = [getattr(pairs[row], side).tolist() for row in rows]
        found: list[str] = tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [text.strip() for text in found]

    read = range(min(_READ_PAIRS, len(artifact.train)))
    words = vocabulary(
        text
        for pairs, rows in ((artifact.train, read), (table, range(len(table))))
        for side in ("prompt", "chosen", "rejected")
        for text in texts(side, pairs, rows)
    )
    longest = int(np.max(table.lengths[:, 1:]))
    return Questions(
        numbers=numbers,
        prompts=tuple(texts("prompt", table, numbers)),
        chosen=tuple(texts("chosen", table, numbers)),
        rejected=tuple(texts("rejected", table, numbers)),
        words=frozenset(words),
        max_new_tokens=min(_MOST_TOKENS, longest + longest // 4),
    )


def answers_of_run(
    ground: Ground,
    asked: Questions,
    run: Run,
    kept: RunFolder[Any],
    console: Console,
    *,
    trained: bool = True,
) -> list[Said]:
    """The answers of a run's result, or of its base; those that an earlier command kept are taken.

    They are kept in the folder of `kept`.
    """
    path = kept.fetch(FILE)
    settings = {"numbers": list(asked.numbers), "max_new_tokens": asked.max_new_tokens}
    written = read_json(path)
    if written is None or written.get("asked") != settings:
        place = run.storage.place_of(ground.artifact.path)
        who = (run.config, run.adapter if trained else None)
        found = on_a_worker(ground, console, _answer, who, {"artifact": place, **settings})
        written = {"asked": settings, "answers": found}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, written)
        kept.store(FILE)
    return [Said(text, bool(is_cut)) for text, is_cut in written["answers"]]


def told(asked: Questions, answers: Sequence[Said], base: Sequence[Said]) -> Told:
    """What a model's answers tell beside the base's."""
    why = [why_broken(said.text, asked.words, is_cut=said.is_cut) for said in answers]
    before = [why_broken(said.text, asked.words, is_cut=said.is_cut) for said in base]
    wins = [
        _win(
            -1.0 if why[place] else nearness(said.text, asked.chosen[place], asked.rejected[place]),
            -1.0
            if before[place]
            else nearness(base[place].text, asked.chosen[place], asked.rejected[place]),
        )
        for place, said in enumerate(answers)
    ]
    counts = {reason: why.count(reason) for reason in sorted({each for each in why if each})}
    return Told(
        sum(counts.values()) / len(answers),
        tuple(wins),
        counts,
        sum(each is not None for each in before) / len(before),
    )


def _win(ours: float, theirs: float) -> float:
    if ours == theirs:
        return 0.5
    return float(ours > theirs)


def _answer(who: tuple[RunConfig, str | None], asked: dict[str, Any]) -> list[tuple[str, bool]]:
    """The answers of a run's base, or of what the run made and left at a place."""
    config, trained = who
    table = open_artifact(fetched_folder(asked["artifact"], MANIFEST)).eval
    said = said_by(config, trained, table, asked["numbers"], asked["max_new_tokens"])
    return [(answer.text, answer.is_cut) for answer in said]
