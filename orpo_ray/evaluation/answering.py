"""The whole of `generate`: what is left to answer, who answers it, and the file at the end."""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from orpo_ray.data.prompts import Asked
from orpo_ray.errors import StoppedError
from orpo_ray.evaluation.answer_formats import FORMATS
from orpo_ray.evaluation.answerer import STOPPED, Loading, Work, packed
from orpo_ray.evaluation.answers_file import AnswersFile
from orpo_ray.evaluation.batches import Batch, in_order, plan_batches, whole_windows
from orpo_ray.evaluation.orders import BASE, Order
from orpo_ray.models.identity import base_fingerprint, trained_fingerprint
from orpo_ray.runs.console import Console
from orpo_ray.runs.results import Generated

Row = dict[str, Any]
Answered = Iterator[tuple[int, list[Row]]]
"""Numbers of batches and their answers, as they come."""
Spread = Callable[[Loading, Sequence[str], Console, str], Iterator[str]]
"""Lets other processes answer batches that are given as JSON; see `distributed.generation`."""


class By(Protocol):
    """Who answers, and what is asked."""

    @property
    def work(self) -> Work:
        """How answers are made."""

    @property
    def asked(self) -> Sequence[Asked]:
        """What is asked."""

    def answers(self, who: str, batches: Sequence[Batch], said: Console) -> Answered:
        """The answers of a model. Raises StoppedError if `said` asks to stop."""


@dataclass(frozen=True)
class Here:
    """This process loads a model and answers."""

    work: Work
    asked: Sequence[Asked]

    def answers(self, who: str, batches: Sequence[Batch], said: Console) -> Answered:
        """The answers, batch by batch. It may stop between two."""
        answerer = self.work.answerer(who)
        for batch in batches:
            if said.stop_requested():
                raise StoppedError(STOPPED)
            yield batch.number, answerer.answer([self.asked[row] for row in batch.rows], batch)


@dataclass(frozen=True)
class Elsewhere:
    """Other processes load the model and answer."""

    work: Work
    asked: Sequence[Asked]
    spread: Spread

    def answers(self, who: str, batches: Sequence[Batch], said: Console) -> Answered:
        """The answers, in any order of batches."""
        texts = [packed(batch, self.asked) for batch in batches]
        for text in self.spread(Loading(self.work, who, Path.cwd()), texts, said, STOPPED):
            found = json.loads(text)
            yield found["number"], found["answers"]


def write_answers(order: Order, by: By, lengths: Sequence[int], said: Console) -> Generated:
    """Answer all that is asked, or go on where an earlier command was ended.

    `lengths` are those of the prompts in tokens. Raises ConfigError for a file that cannot be
    written or that other settings began, and StoppedError if the console asks to stop.
    """
    file = AnswersFile(order.out)
    with file.held():
        return _write(file, order, by, lengths, said)


def _write(
    file: AnswersFile, order: Order, by: By, lengths: Sequence[int], said: Console
) -> Generated:
    work, asked = by.work, by.asked
    settings = _settings(order, by)
    plan = plan_batches(lengths, order.models, work.room)
    kept = file.begin(settings)
    windows, rows = whole_windows(plan, len(kept))
    answers = kept[:rows]
    if kept:
        said.announce(f"going on after {rows} of {len(asked) * len(order.models)} answers")
    file.keep(settings, answers)
    for who in order.models:
        left = [batch for batch in plan if batch.model == who and batch.window >= windows]
        if left:
            answers += _answer(file, left, by, said)
    name = work.config.name
    name = f"{name}-{BASE}" if order.models == (BASE,) else name
    file.finish(FORMATS[order.format](asked, answers, name))
    return Generated(
        file=str(order.out),
        model=" and ".join(order.models),
        answers=len(answers),
        cut=sum(row["stopped"] == "length" for row in answers),
        tokens=sum(row["tokens"] for row in answers),
    )


def _answer(file: AnswersFile, batches: Sequence[Batch], by: By, said: Console) -> list[Row]:
    """The answers of one model, each window of which is kept when it is whole."""
    found: list[Row] = []
    who, total = batches[0].model, len(by.asked)
    done = total - sum(len(batch.rows) for batch in batches)
    begin = time.monotonic()
    for rows in in_order(batches, by.answers(who, batches, said)):
        file.add(rows)
        found += rows
        speed = sum(row["tokens"] for row in found) / max(time.monotonic() - begin, 1e-9)
        said.announce(
            f"{who}: {done + len(found)} of {total} answers, {speed:,.0f} tokens a second"
        )
    return found


def _settings(order: Order, by: By) -> Row:
    """All that shapes the answers. The form of the file does not."""
    work, model = by.work, by.work.config.model
    questions = json.dumps([asdict(one) for one in by.asked])
    return {
        "prompts": hashlib.sha256(questions.encode()).hexdigest(),
        "model": " and ".join(order.models),
        "base": base_fingerprint(model),
        "adapter": work.trained and trained_fingerprint(work.trained),
        "quantization": model.quantization,
        "tokenizer or chat template": by.work.tokenizer,
        "number format": f"{work.decisions.dtype} on {work.decisions.device}",
        **asdict(work.sampling),
        "batch_tokens": work.room.batch_tokens,
    }
