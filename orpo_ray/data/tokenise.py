"""From a pair to token ids: a tokenizer call takes the texts of a whole batch.

The prompt's ids are those from which generation starts, whatever the answer is. Each trained turn
ends with exactly one end token.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any, Literal, NamedTuple

import numpy as np

from orpo_ray.data.checks import OVERLONG_PAIR, OVERLONG_PROMPT
from orpo_ray.data.pairs import (
    Context,
    Message,
    Pair,
    Ranges,
    Refusal,
    TokenPair,
    Trained,
    ranges_of,
)
from orpo_ray.data.rendering import Answer, Rendered, Renderer, unused_sign
from orpo_ray.data.turns import Bounds, turn_bounds
from orpo_ray.data.words import words_of
from orpo_ray.errors import DataError

# Some tokenizers mark the start of a text. If an answer is tokenised without its prompt, one of
# these goes before it, so that the answer gets no such mark.
_ANCHORS = ("\n", ".", "a")


@dataclass(frozen=True, slots=True)
class Limits:
    """The most tokens of a prompt and of a whole pair, and what happens to a longer pair."""

    max_prompt_length: int
    max_length: int
    overlong: Literal["drop", "truncate-prompt-left", "error"]


class _Ids(NamedTuple):
    """Ids of a pair; those of the answers do not have their end token."""

    prompt: list[int]
    answers: dict[str, list[int]]


class _Turns(NamedTuple):
    """Where the trained turns are in the ids of their side."""

    prompt: list[Bounds]
    answers: dict[str, list[Bounds]]


class _Cut(NamedTuple):
    """A place in a text and in its ids."""

    character: int
    token: int


class PairTokeniser:
    """Applies one tokenizer, whose chat template is set, to batches of pairs.

    With `all_turns` the earlier assistant turns are trained, too. Raises DataError if the tokenizer
    has no chat template or names no end token.
    """

    def __init__(self, tokenizer: Any, *, all_turns: bool = False) -> None:
        if not tokenizer.chat_template:
            raise DataError("the tokenizer has no chat template; set model.chat_template")
        if tokenizer.eos_token_id is None:
            raise DataError(
                "the tokenizer names no end token (eos_token), so an answer could never end"
            )
        self._tokenizer = tokenizer
        self._renderer = Renderer(tokenizer, all_turns=all_turns)
        self._bos: int | None = tokenizer.bos_token_id
        first_id = list(tokenizer("a")["input_ids"])[:1]
        self._adds_bos = self._bos is not None and first_id == [self._bos]
        self._words = words_of(tokenizer)
        self._marks_start = self._finds_start_marker()
        self._cuts = _cutting_tokens(tokenizer)

    @property
    def bos_id(self) -> int | None:
        """The tokenizer's start token, or None. A prompt need not have it."""
        return self._bos

    def prompts(
        self,
        conversations: Sequence[list[Message]],
        contexts: Sequence[Context] = (),
        given: Sequence[int] = (),
    ) -> list[list[int]]:
        """Token ids from which generation starts, one list for each conversation.

        Without `contexts` no conversation has tools or documents. `given` counts the messages of
        each that come from the user; without it all do. Assistant turns after them were generated:
        a mark in one is ordinary text, because nobody could correct it. Raises DataError if the
        template refuses a conversation.
        """
        texts = []
        contexts = contexts or [Context()] * len(conversations)
        given = given or [len(messages) for messages in conversations]
        for messages, context, count in zip(conversations, contexts, given, strict=True):
            sign = unused_sign(messages)
            found = self._renderer.prompt(
                [*messages[:count], *self._renderer.without_marks(messages[count:], sign)], context
            )
            if isinstance(found, Refusal):
                raise DataError(f"the chat template refuses a conversation: {found.detail}")
            texts.append(found.text.split(sign))
        first = self._encode([text for text, *_ in texts])
        # A mark whose two parts are tokenised apart cannot become a control token.
        after = iter(self._encode_apart([part for _, *parts in texts for part in parts]))
        return [
            self._with_bos([*ids, *chain.from_iterable(islice(after, len(text) - 1))])
            for ids, text in zip(first, texts, strict=True)
        ]

    def mark_in(self, text: str) -> str | None:
        """The first mark of a turn, or special token, that a user's text spells; None without."""
        return self._renderer.endings.in_text.first_in(text)

    def pairs(self, pairs: Sequence[Pair], pair_ids: Sequence[str]) -> list[TokenPair | Refusal]:
        """Token ids of each pair, or why there are none, in order."""
        rendered = [self._renderer.pair(pair) for pair in pairs]
        usable = [texts for texts in rendered if isinstance(texts, Rendered)]
        ids = self._tokenise(usable)
        found = zip(ids, self._find_turns(usable, ids), strict=True)
        return [
            texts if isinstance(texts, Refusal) else self._finish(pair_id, texts, *next(found))
            for pair_id, texts in zip(pair_ids, rendered, strict=True)
        ]

    def ignored_fields(self, pair: Pair) -> list[str]:
        """The fields of a pair that make no difference to what the template writes."""
        return self._renderer.ignored_fields(pair)

    def _tokenise(self, texts: Sequence[Rendered]) -> list[_Ids]:
        """Ids of prompts and answers without end tokens, in a few tokenizer calls.

        An answer is tokenised together with its prompt, so that it gets the tokens that it has in
        context. Text before the last safe cut (`_find_cut`) cannot change these, so it is left out.
        Sometimes the answer changes the last tokens of the prompt. Such an answer is tokenised
        without its prompt, because generation starts from the prompt's own tokens.
        """
        prompts = self._encode([text.prompt for text in texts])
        cuts = [self._find_cut(text.prompt, ids) for text, ids in zip(texts, prompts, strict=True)]
        tails = [text.prompt[cut.character :] for text, cut in zip(texts, cuts, strict=True)]
        tail_ids = [ids[cut.token :] for ids, cut in zip(prompts, cuts, strict=True)]
        places = [(index, side) for index, text in enumerate(texts) for side in text.answers]
        answers = [texts[index].answers[side].text for index, side in places]
        wholes = self._encode(
            [tails[index] + answer for (index, _), answer in zip(places, answers, strict=True)]
        )
        found: list[dict[str, list[int]]] = [{} for _ in texts]
        apart: list[int] = []
        for number, ((index, side), whole) in enumerate(zip(places, wholes, strict=True)):
            tail = tail_ids[index]
            found[index][side] = whole[len(tail) :]
            if whole[: len(tail)] != tail:
                apart.append(number)
        alone = self._encode_apart([answers[number] for number in apart])
        for number, ids in zip(apart, alone, strict=True):
            index, side = places[number]
            found[index][side] = ids
        return [_Ids(*each) for each in zip(prompts, found, strict=True)]

    def _find_turns(
        self, texts: Sequence[Rendered], ids: Sequence[_Ids]
    ) -> Iterator[_Turns | Refusal]:
        """Where the trained turns of each pair are."""
        turns = (
            turn
            for text in texts
            for some in (text.turns, *(answer.turns for answer in text.answers.values()))
            for turn in some
        )
        before = iter(self._encode([turn.before for turn in turns]))
        for text, (prompt, answers) in zip(texts, ids, strict=True):
            found = [turn_bounds(text.turns, before, prompt)]
            for side, answer in text.answers.items():
                found.append(_bounds_of(answer, before, prompt, answers[side]))
            refused = [each for each in found if isinstance(each, Refusal)]
            if refused:
                yield refused[0]
                continue
            in_prompt, *of_answers = (each for each in found if isinstance(each, list))
            yield _Turns(in_prompt, dict(zip(text.answers, of_answers, strict=True)))

    def _find_cut(self, text: str, ids: list[int]) -> _Cut:
        """The last place at which a prompt can be cut without changing the tokens after it."""
        cutting = (place for place in reversed(range(len(ids))) if ids[place] in self._cuts)
        place = next(cutting, None)
        if place is None:
            return _Cut(0, 0)
        mark = self._cuts[ids[place]]
        # If the text has as many marks as there are such tokens, each mark is one such token. Then
        # the last mark is the last such token.
        if text.count(mark) != ids.count(ids[place]):
            return _Cut(0, 0)
        return _Cut(text.rindex(mark), place)

    def _encode(self, texts: list[str]) -> list[list[int]]:
        if self._words is not None and not self._tokenizer.split_special_tokens:
            return self._words.encode(texts, self._by_library)
        return self._by_library(texts)

    def _by_library(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        if self._tokenizer.is_fast:
            # This gives the ids of the usual call, but makes no masks. Padding is switched off,
            # because other code may have switched it on.
            backend = self._tokenizer.backend_tokenizer
            backend.no_padding()
            backend.no_truncation()
            backend.encode_special_tokens = self._tokenizer.split_special_tokens
            return [
                encoding.ids
                for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)
            ]
        encoded = self._tokenizer(
            texts,
            add_special_tokens=False,
            padding=False,
            truncation=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        return [list(ids) for ids in encoded["input_ids"]]

    def _finds_start_marker(self) -> bool:
        """Whether the tokenizer marks the start of a text, as Llama 2's does with a space sign."""
        alone, anchor, together = self._encode(["a", "\n", "\na"])
        return together[len(anchor) :] != alone

    def _encode_apart(self, texts: list[str]) -> list[list[int]]:
        """Ids of texts that continue another text, so without the mark of a text's start."""
        if not texts or not self._marks_start:
            return self._encode(texts)
        results: list[list[int] | None] = [None] * len(texts)
        for anchor in _ANCHORS:
            open_ = [index for index, ids in enumerate(results) if ids is None]
            anchor_ids, *together = self._encode(
                [anchor, *(anchor + texts[index] for index in open_)]
            )
            for index, ids in zip(open_, together, strict=True):
                if ids[: len(anchor_ids)] == anchor_ids:
                    results[index] = ids[len(anchor_ids) :]
        # A text that merges with every anchor is tokenised alone. No known vocabulary merges a text
        # with all three.
        return [
            self._encode([text])[0] if ids is None else ids
            for ids, text in zip(results, texts, strict=True)
        ]

    def _finish(
        self, pair_id: str, texts: Rendered, ids: _Ids, turns: _Turns | Refusal
    ) -> TokenPair | Refusal:
        if isinstance(turns, Refusal):
            return turns
        ended = {
            side: np.asarray([*ids.answers[side], said.end], dtype=np.int32)
            for side, said in texts.answers.items()
        }
        for side, bounds in turns.answers.items():
            inside = (ended[side][start : stop - 1] for start, stop in bounds)
            if any((some == end).any() for some in inside for end in self._renderer.endings.ids):
                return Refusal("end-token-inside", side)
        if ids.answers.get("chosen") == ids.answers.get("rejected"):
            return Refusal("identical", "the chat template makes them so")
        prompt = self._with_bos(ids.prompt)
        moved = len(prompt) - len(ids.prompt)
        trained = Trained(
            ranges_of(*((start + moved, stop + moved) for start, stop in turns.prompt)),
            *(ranges_of(*turns.answers.get(side, [])) for side in ("chosen", "rejected")),
        )
        nothing = np.zeros(0, dtype=np.int32)
        return TokenPair(
            pair_id=pair_id,
            prompt=np.asarray(prompt, dtype=np.int32),
            chosen=ended.get("chosen", nothing),
            rejected=ended.get("rejected", nothing),
            trained=trained,
            written=texts.prompt,
        )

    def _with_bos(self, ids: list[int]) -> list[int]:
        """The ids with exactly one start token, if the tokenizer or the template wants one.

        The template may write it, the tokenizer may add it, and a prompt that was rendered before
        may have it already.
        """
        if self._bos is None:
            return ids
        start = 0
        while ids[start : start + 2] == [self._bos, self._bos]:
            start += 1
        ids = ids[start:]
        return [self._bos, *ids] if self._adds_bos and ids[:1] != [self._bos] else ids


def _bounds_of(
    answer: Answer, before: Iterator[list[int]], prompt: list[int], ids: list[int]
) -> list[Bounds] | Refusal:
    """Where the turns of an answer are in its ids; most answers are one turn."""
    if not answer.turns:
        return [(0, len(ids) + 1)]
    found = turn_bounds(answer.turns, before, [*prompt, *ids, answer.end])
    if isinstance(found, Refusal):
        return found
    return [(start - len(prompt), stop - len(prompt)) for start, stop in found]


def _cutting_tokens(tokenizer: Any) -> dict[int, str]:
    """Tokens, as id and text, before which a text can be cut without changing any token.

    A tokenizer splits a text at its added tokens before it does anything else. There are four
    exceptions: tokens that are searched after normalisation, that take the white space before them,
    that must be a whole word, or that are a part of another added token.
    """
    if not tokenizer.is_fast or tokenizer.split_special_tokens:
        return {}
    added = tokenizer.added_tokens_decoder
    everything = "\0".join(token.content for token in added.values())
    normalises = tokenizer.backend_tokenizer.normalizer is not None
    return {
        token_id: token.content
        for token_id, token in added.items()
        if not (token.lstrip or token.single_word or (token.normalized and normalises))
        and everything.count(token.content) == 1
    }


def fit(pair: TokenPair, limits: Limits, bos_id: int | None) -> TokenPair | Refusal:
    """The pair within the limits: as it is, or with its prompt cut on the left, or refused.

    A cut prompt keeps its start token.
    """
    answer = max(len(pair.chosen), len(pair.rejected))
    prompt = len(pair.prompt)
    room = min(limits.max_prompt_length, limits.max_length - answer)
    if prompt <= room:
        return pair
    has_bos = bos_id is not None and pair.prompt[:1].tolist() == [bos_id]
    start = pair.prompt[: int(has_bos)]
    if limits.overlong == "truncate-prompt-left" and room > len(start):
        end = pair.prompt[prompt - (room - len(start)) :]
        trained = Trained(_moved(pair.trained.prompt, prompt - room), *pair.trained[1:])
        return replace(pair, prompt=np.concatenate([start, end]), trained=trained)
    code = OVERLONG_PROMPT if prompt + answer <= limits.max_length else OVERLONG_PAIR
    return Refusal(code, f"prompt {prompt} tokens, longer answer {answer}")


def _moved(ranges: Ranges, lost: int) -> Ranges:
    """The ranges after a prompt has lost tokens at its start.

    A turn that is cut is not trained: the model would learn to write the rest of it from nothing.
    """
    whole = ranges[ranges[:, 0] > lost]
    return ranges_of(*((start - lost, stop - lost) for start, stop in whole.tolist()))
