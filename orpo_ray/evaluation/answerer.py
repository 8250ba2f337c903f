"""Answers what the rows of a file ask, turn by turn, with one loaded model."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

from transformers import PreTrainedTokenizerBase

from orpo_ray.config import RunConfig
from orpo_ray.data.pairs import Message
from orpo_ray.data.prompts import Asked
from orpo_ray.data.tokenise import PairTokeniser
from orpo_ray.errors import DataError
from orpo_ray.evaluation.batches import Batch
from orpo_ray.evaluation.evaluate import load_trained
from orpo_ray.evaluation.orders import TRAINED
from orpo_ray.models.tokenizer import load_tokenizer
from orpo_ray.runs.console import SILENT
from orpo_ray.training.decisions import Decisions
from orpo_ray.training.generate import Answer, Speaker
from orpo_ray.training.sampling import Room, Sampling, cut_batches
from orpo_ray.training.setup import fetch_inputs

STOPPED = "stopped; the same command goes on where it was"
_SEED_BITS = 31


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a worker must know to answer, as plain data."""

    config: RunConfig
    decisions: Decisions
    trained: str | None
    """The folder or URL of the adapter or model; None if the base alone answers."""
    sampling: Sampling
    room: Room
    tokenizer: str
    """What identifies the tokenizer with its chat template, and the tokens that end an answer."""

    def answerer(self, who: str) -> "Answerer":
        """The base or the trained model, loaded."""
        fetch_inputs(self.config)
        model = load_trained(self.config, self.decisions, self.trained if who == TRAINED else None)
        tokenizer = load_tokenizer(self.config.model, SILENT.announce)
        return Answerer(Speaker(model, tokenizer), self, who)


@dataclass(frozen=True)
class Loading:
    """Loads a model in another process, which answers batches that come as JSON."""

    work: Work
    who: str
    directory: Path
    """The folder in which the command was given."""

    def __call__(self) -> Callable[[str], str]:
        """Load the model; returns a function from a batch to its answers."""
        if self.directory.is_dir():
            os.chdir(self.directory)  # relative paths in the config start there
        answerer = self.work.answerer(self.who)

        def answer(packed: str) -> str:
            batch, asked = _unpacked(packed)
            return json.dumps({"number": batch.number, "answers": answerer.answer(asked, batch)})

        return answer


def packed(batch: Batch, asked: Sequence[Asked]) -> str:
    """A batch and what it asks, as JSON. The rows' own columns stay with the driver."""
    questions = [asdict(replace(asked[number], row={})) for number in batch.rows]
    return json.dumps({"batch": asdict(batch), "asked": questions})


def _unpacked(text: str) -> tuple[Batch, list[Asked]]:
    found = json.loads(text)
    batch = Batch(**{**found["batch"], "rows": tuple(found["batch"]["rows"])})
    return batch, [Asked(**one) for one in found["asked"]]


class Answerer:
    """A loaded model that answers batches of rows."""

    def __init__(self, speaker: Speaker, work: Work, who: str) -> None:
        self._speaker = speaker
        self._tokeniser = PairTokeniser(speaker.tokenizer)
        self._work = work
        self._who = who

    def answer(self, asked: Sequence[Asked], batch: Batch) -> list[dict[str, Any]]:
        """One row of JSON for each prompt of the batch, in order. `asked` is what it asks."""
        said: list[list[Message]] = [list(one.messages) for one in asked]
        answers: list[Answer | None] = [None] * len(asked)
        for turn in range(1 + max(len(one.later) for one in asked)):
            open_ = [place for place, one in enumerate(asked) if turn <= len(one.later)]
            for place in open_ if turn else ():
                before = answers[place]
                assert before is not None, "the turn before was answered"
                said[place] += [
                    {"role": "assistant", "content": before.text},
                    {"role": "user", "content": asked[place].later[turn - 1]},
                ]
            found = self._turn([said[place] for place in open_], asked, open_, (batch, turn))
            for place, answer in zip(open_, found, strict=True):
                answers[place] = answer
        rows = zip(said, answers, strict=True)
        return [_row(messages, answer, self._who) for messages, answer in rows if answer]

    def _turn(
        self,
        conversations: Sequence[list[Message]],
        asked: Sequence[Asked],
        places: Sequence[int],
        when: tuple[Batch, int],
    ) -> list[Answer]:
        """The answers to one turn of some rows."""
        contexts = [asked[place].context for place in places]
        given = [len(asked[place].messages) for place in places]
        prompts = self._tokeniser.prompts(conversations, contexts, given)
        sampling = self._work.sampling
        lengths = [len(prompt) for prompt in prompts]
        found: dict[int, Answer] = {}
        for numbers in cut_batches(lengths, self._work.room):
            batch, turn = when
            first = batch.rows[places[numbers[0]]]
            seed = Random(f"{sampling.seed}:{first}:{turn}").getrandbits(_SEED_BITS)
            some = self._speaker.answer(
                [prompts[number] for number in numbers], replace(sampling, seed=seed)
            )
            found.update(zip(numbers, some, strict=True))
        return [found[number] for number in range(len(prompts))]


def prompt_lengths(
    tokenizer: PreTrainedTokenizerBase, asked: Sequence[Asked], positions: int | None, file: str
) -> list[int]:
    """The number of tokens of each first question.

    Raises DataError for one that the template refuses, or that leaves no room for an answer.
    """
    tokeniser = PairTokeniser(tokenizer)
    lengths = []
    for number, one in enumerate(asked, start=1):
        try:
            (ids,) = tokeniser.prompts([one.messages], [one.context])
        except DataError as error:
            raise DataError(f"{file}: prompt {number}: {error}") from error
        if positions is not None and len(ids) >= positions:
            raise DataError(
                f"{file}: prompt {number} has {len(ids)} tokens, but the base reads {positions}, "
                "so there is no room for an answer; leave it out"
            )
        lengths.append(len(ids))
    return lengths


def _row(messages: list[Message], answer: Answer, who: str) -> dict[str, Any]:
    return {
        "prompt": messages[-1]["content"],
        "messages": messages,
        "answer": answer.text,
        "tokens": answer.tokens,
        "stopped": "length" if answer.is_cut else "end",
        "model": who,
    }
