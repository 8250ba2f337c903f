"""Answers of a model to prompts: the likeliest ones, or drawn ones."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
)

from orpo_ray.data.endings import end_ids
from orpo_ray.errors import ResourceError
from orpo_ray.models.tokenizer import padding_id
from orpo_ray.runs.console import Announce
from orpo_ray.training.pair_model import PairModel
from orpo_ray.training.sampling import Room, Sampling, cut_batches

TOKENS_PER_BATCH = 8192
"""The most tokens of a batch, with its padding and with answers of full length."""


@dataclass(frozen=True)
class Answer:
    """An answer of a model, without special tokens.

    `tokens` counts those that the model wrote. `is_cut`: it reached a limit before it ended.
    """

    text: str
    is_cut: bool
    tokens: int


@dataclass(frozen=True)
class Listener:
    """Hears one answer piece by piece, and may end it.

    `hears` gets whole words, which together are the text of the answer. The answer ends, cut, after
    the token at which `has_enough` says so.
    """

    hears: Announce
    has_enough: Callable[[], bool]


def answers_of(
    model: PairModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    tokens_per_batch: int = TOKENS_PER_BATCH,
) -> list[Answer]:
    """One answer for each prompt of token ids, in order.

    No answer goes beyond the positions that the base can read. An answer ends with any token that
    ends one in training, or that the base's own generation_config.json lists.
    """
    found: dict[int, Answer] = {}
    lengths = [len(prompt) for prompt in prompts]
    room = Room(sampling.max_new_tokens, tokens_per_batch, model.positions)
    speaker = Speaker(model, tokenizer)
    for batch in cut_batches(lengths, room):
        some = speaker.answer([prompts[number] for number in batch], sampling)
        found.update(zip(batch, some, strict=True))
    return [found[number] for number in range(len(prompts))]


class Speaker:
    """A loaded model that answers, and the tokens that end its answers."""

    def __init__(self, model: PairModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.ends = end_ids(tokenizer, model.model.generation_config)

    @torch.no_grad()
    def answer(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        listener: Listener | None = None,
    ) -> list[Answer]:
        """Answers to prompts that are padded on the left to one width.

        Drawn answers depend on the seed and on the batch alone. A listener hears the answer to a
        single prompt. Raises ResourceError if there is not enough memory.
        """
        self.model.eval()
        width = max(map(len, prompts))
        room = _room(self.model, width, sampling.max_new_tokens)
        if room < 1:
            return [Answer("", is_cut=True, tokens=0) for _ in prompts]
        pad_id = padding_id(self.tokenizer)
        ids, mask = _padded(prompts, pad_id)
        device, autocast = self.model.device, self.model.autocast
        generate: Any = self.model.model.generate
        if sampling.temperature:
            torch.manual_seed(sampling.seed)  # the likeliest answers leave the random state alone
        try:
            with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
                out = generate(
                    input_ids=ids.to(device),
                    attention_mask=mask.to(device),
                    max_new_tokens=room,
                    pad_token_id=pad_id,
                    eos_token_id=self.ends,
                    use_cache=True,
                    **_choice(sampling),
                    **({} if listener is None else self._heard_by(listener)),
                )
        except torch.OutOfMemoryError as error:
            lower = "--max-new-tokens" if listener else "--batch-tokens or --max-new-tokens"
            raise ResourceError(
                f"no room in memory for {len(prompts)} answers of {room} tokens to prompts of "
                f"{width}; lower {lower}"
            ) from error
        return [self._answer(said) for said in out[:, width:].cpu()]

    def _heard_by(self, listener: Listener) -> dict[str, Any]:
        return {
            "streamer": _Words(self, listener.hears),
            "stopping_criteria": StoppingCriteriaList([_Enough(listener.has_enough)]),
            "num_beams": 1,  # a base may ask for more, but only one can be heard
        }

    def _answer(self, said: Tensor) -> Answer:
        """What was said up to its end token. Padding follows that token."""
        ended = torch.isin(said, torch.tensor(self.ends)).nonzero()
        stop = int(ended[0]) if len(ended) else len(said)
        text: Any = self.tokenizer.decode(said[:stop], skip_special_tokens=True)
        return Answer(text.strip(), is_cut=not len(ended), tokens=stop)


class _Words(TextStreamer):
    """Tells the words of an answer, without its end token and without white space around it."""

    def __init__(self, speaker: Speaker, tell: Announce) -> None:
        super().__init__(speaker.tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._ends = speaker.ends
        self._tell = tell
        self._has_told = False
        self._space = ""

    def put(self, value: Tensor) -> None:
        """Take the prompt, or the next token. An end token need not be a special one."""
        if self.next_tokens_are_prompt or int(value) not in self._ends:
            super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Tell the text. White space waits for what follows it."""
        text = self._space + text if self._has_told else text.lstrip()
        words = text.rstrip()
        self._space = text[len(words) :]
        if words:
            self._has_told = True
            self._tell(words)


class _Enough(StoppingCriteria):
    """Ends an answer when somebody says so."""

    def __init__(self, has_enough: Callable[[], bool]) -> None:
        self._has_enough = has_enough

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """Whether each row ends here, [rows]."""
        return torch.full((len(input_ids),), self._has_enough(), device=input_ids.device)


def _padded(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Ids and attention mask of prompts, each [prompts, longest prompt]."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.as_tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return ids, mask


def _room(model: PairModel, width: int, wanted: int) -> int:
    """How many tokens an answer may have after prompts of this width."""
    return wanted if model.positions is None else min(wanted, model.positions - width)


def _choice(sampling: Sampling) -> dict[str, Any]:
    if not sampling.temperature:
        return {"do_sample": False}
    # top_k is the library's own limit, which nobody asked for.
    return {
        "do_sample": True,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": 0,
    }
