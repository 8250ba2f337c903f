"""Verdicts from the log-probs of a trained model, for machines without an endpoint.

The reward of an answer is how much likelier the training made it: the mean log-prob of its tokens
from the trained model less that from the base. With sums in place of means it is the implicit
reward of DPO (Rafailov et al. 2023, arXiv 2305.18290, section 4).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from orpo_ray.config import RunConfig
from orpo_ray.data.checks import explain
from orpo_ray.data.held import HeldPairs
from orpo_ray.data.pairs import Pair, Refusal, TokenPair
from orpo_ray.data.tokenise import PairTokeniser
from orpo_ray.evaluation.evaluate import load_trained, score_table
from orpo_ray.evaluation.judge.answers import Answered
from orpo_ray.evaluation.judge.asking import TIE, UNREADABLE
from orpo_ray.evaluation.judge.judging import Left, Place, Row
from orpo_ray.models.identity import base_fingerprint, trained_fingerprint
from orpo_ray.models.read_traits import read_positions, read_traits
from orpo_ray.models.tokenizer import padding_id, tokenizer_fingerprint
from orpo_ray.runs.console import Console
from orpo_ray.training.decisions import Decisions
from orpo_ray.training.layout_choice import kept_layout

_SIDES = ("A", "B")
Values = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class ByReward:
    """The model that a run trained, and its base."""

    config: RunConfig
    decisions: Decisions
    trained: str
    tokenizer: PreTrainedTokenizerBase

    @property
    def name(self) -> str:
        """The run's name."""
        return f"the reward of {self.config.name}"

    @property
    def orders(self) -> Sequence[str | None]:
        """Each answer is scored by itself, so there is no order."""
        return (None,)

    @property
    def settings(self) -> Row:
        """Both models, and how they are computed."""
        return {
            "judge": "reward",
            "base": base_fingerprint(self.config.model),
            "adapter": trained_fingerprint(self.trained),
            "quantization": self.config.model.quantization,
            "tokenizer or chat template": tokenizer_fingerprint(self.tokenizer),
            "number format": f"{self.decisions.dtype} on {self.decisions.device}",
        }

    def verdicts(self, left: Left, said: Console) -> Iterator[Row]:
        """All verdicts, when both models have scored all answers."""
        found = self._tokenised(left)
        usable = {name: pair for name, pair in found.items() if isinstance(pair, TokenPair)}
        rewards = self._rewards(list(usable.values()), said)
        out = 0
        for place in left.places:
            sides = [f"{place.row}:{side}" for side in _SIDES]
            reasons = [found[side] for side in sides if side not in rewards]
            if reasons:
                out += 1
                yield _kept(place, UNREADABLE, str(reasons[0]))
            else:
                yield _verdict(place, *(rewards[side] for side in sides))
        if out:
            said.announce(f"{out} rows cannot be scored and are left out; the file says why")

    def _tokenised(self, left: Left) -> dict[str, TokenPair | str]:
        """Each answer by its name, or why it cannot be scored."""
        named: dict[str, Answered] = {}
        for place in left.places:
            row = left.rows[place.row]
            named |= {f"{place.row}:A": row.a, f"{place.row}:B": row.b}
        # As single answers, because two models may have been asked after other earlier turns.
        pairs = [
            Pair(
                prompt=one.messages,
                chosen={"role": "assistant", "content": one.answer},
                rejected=None,
            )
            for one in named.values()
        ]
        tokens = PairTokeniser(self.tokenizer).pairs(pairs, list(named))
        positions = read_positions(self.config.model)
        found = zip(named, tokens, strict=True)
        return {name: _fitting(pair, positions) for name, pair in found}

    def _rewards(self, pairs: Sequence[TokenPair], said: Console) -> dict[str, float]:
        """What the training did to the mean log-prob of each answer, by its name."""
        if not pairs:
            return {}
        base, trained = (self._means(pairs, who, said) for who in (None, self.trained))
        names = [pair.pair_id for pair in pairs]
        return dict(zip(names, (trained - base).tolist(), strict=True))

    def _means(self, pairs: Sequence[TokenPair], trained: str | None, said: Console) -> Values:
        """The mean log-prob of each answer, [n], by the trained model, or by the base if None."""
        said.announce(f"scoring {len(pairs)} answers with {trained or self.config.model.base}")
        model = load_trained(self.config, self.decisions, trained)
        table = HeldPairs(pairs)
        # These answers may be longer than all that the run has read.
        layout = kept_layout(self.decisions.layout, read_traits(self.config.model), table.lengths)
        decisions = replace(self.decisions, layout=layout)
        scores = score_table(model, decisions, table, padding_id(self.tokenizer), said)
        return scores.chosen / scores.chosen_tokens


def _fitting(pair: TokenPair | Refusal, positions: int | None) -> TokenPair | str:
    if isinstance(pair, Refusal):
        return explain(pair)
    length = len(pair.prompt) + len(pair.chosen)
    if positions is not None and length > positions:
        return f"prompt and answer have {length} tokens, but the base reads {positions}"
    return pair


def _verdict(place: Place, a: float, b: float) -> Row:
    better = "A" if a > b else "B"
    text = f"reward of A {a:+.6f}, of B {b:+.6f}"
    return _kept(place, TIE if a == b else better, text)


def _kept(place: Place, winner: str, text: str) -> Row:
    at = {"row": place.row, "order": place.order}
    return {**at, "winner": winner, "text": text, "requests": 0}
