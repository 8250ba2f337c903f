"""Answers to a few held-out prompts at each evaluation, so that a reader sees how a model changes.

Greedy answers, made in evaluation mode, draw no random numbers, so training does not notice them.
"""

from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from orpo_ray.data.held import Pairs
from orpo_ray.errors import ResourceError
from orpo_ray.runs.console import Announce
from orpo_ray.runs.samples import SampleAnswer
from orpo_ray.training.generate import answers_of
from orpo_ray.training.pair_model import PairModel
from orpo_ray.training.plan import Layout
from orpo_ray.training.sampling import SAMPLE_TOKENS, Sampling
from orpo_ray.training.strategy import Strategy


def refuse_samples(strategy: Strategy) -> str | None:
    """Why no answers can be taken while a run trains by this strategy; None if they can."""
    if strategy.shares_weights:
        return (
            "training.samples: none are taken, because ZeRO stage 3 shares out the weights, and "
            "one worker alone cannot answer; orpo-ray generate answers afterwards"
        )
    return None


def draw_prompts(table: Pairs, count: int, seed: int) -> list[int]:
    """Numbers of at most `count` pairs with different prompts, in the table's order."""
    found: dict[bytes, int] = {}
    for index in np.random.default_rng(seed).permutation(len(table)):
        if len(found) == count:
            break
        found.setdefault(table[int(index)].prompt.tobytes(), int(index))
    return sorted(found.values())


class Sampler:
    """Lets a model in training answer the same few held-out prompts again and again."""

    def __init__(
        self,
        model: PairModel,
        tokenizer: PreTrainedTokenizerBase,
        table: Pairs,
        numbers: list[int],
        announce: Announce,
    ) -> None:
        self._model, self._tokenizer, self._announce = model, tokenizer, announce
        self._pairs = [table[number] for number in numbers]

    def take(self, step: int) -> list[SampleAnswer]:
        """The answers of the model as it is now. The model is afterwards as it was.

        A lack of memory is announced, and ends the taking of samples, not the run.
        """
        model, training, layout = self._model, self._model.training, self._model.layout
        prompts = [pair.prompt.tolist() for pair in self._pairs]
        model.use_layout(Layout.PADDED)
        try:
            answers = answers_of(
                model, self._tokenizer, prompts, Sampling(max_new_tokens=SAMPLE_TOKENS)
            )
        except ResourceError:
            self._announce("training.samples: no more are taken, because memory is short")
            self._pairs = []
            return []
        finally:
            model.use_layout(layout)
            model.train(training)
        return [
            SampleAnswer(
                step=step,
                id=pair.pair_id,
                prompt=self._text(pair.prompt) or "",
                answer=answer.text,
                ended=not answer.is_cut,
                chosen=self._text(pair.chosen),
                rejected=self._text(pair.rejected),
            )
            for pair, answer in zip(self._pairs, answers, strict=True)
        ]

    def _text(self, ids: np.ndarray) -> str | None:
        """Tokens as text, without special ones; None if there are none."""
        if not len(ids):
            return None
        text: Any = self._tokenizer.decode(ids.tolist(), skip_special_tokens=True)
        return str(text).strip()
