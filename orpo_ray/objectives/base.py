"""What every objective is made of: a preference term for each pair, an NLL term, two weights."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

NllTokens = Literal["response", "full"]


@dataclass(frozen=True, kw_only=True)
class PairLogps:
    """Log-probabilities of n pairs, summed over tokens; each tensor is float32 of shape [n].

    Logarithms are natural. `chosen` and `rejected` are over the trained tokens of the answers;
    `chosen_tokens` and `rejected_tokens` count these. `nll_sum` is the negative log-likelihood of
    the chosen side: over all its trained tokens, or over prompt and answer.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    nll_sum: Tensor
    reference_chosen: Tensor | None = None
    reference_rejected: Tensor | None = None

    @property
    def chosen_mean(self) -> Tensor:
        """Mean log-prob per trained token of the chosen answer, [n]."""
        return self.chosen / self.chosen_tokens

    @property
    def rejected_mean(self) -> Tensor:
        """Mean log-prob per trained token of the rejected answer, [n]."""
        return self.rejected / self.rejected_tokens

    @property
    def reference(self) -> tuple[Tensor, Tensor]:
        """Summed reference log-probs (chosen, rejected).

        Only an objective with `needs_reference` has them.
        """
        assert self.reference_chosen is not None and self.reference_rejected is not None
        return self.reference_chosen, self.reference_rejected

    @property
    def gains(self) -> tuple[Tensor, Tensor]:
        """How much likelier than by the reference the answers are: log-ratios of sums, each [n]."""
        reference_chosen, reference_rejected = self.reference
        return self.chosen - reference_chosen, self.rejected - reference_rejected

    @property
    def mean_gains(self) -> tuple[Tensor, Tensor]:
        """The gains per trained token, each [n]."""
        chosen, rejected = self.gains
        return chosen / self.chosen_tokens, rejected / self.rejected_tokens


@dataclass(frozen=True, kw_only=True)
class Objective:
    """A loss of two terms.

    It is preference_weight * (mean of `preference` over pairs) + nll_weight * (mean of the NLL over
    tokens).
    """

    kind: str
    preference: Callable[[PairLogps], Tensor] | None
    preference_weight: float = 1.0
    nll_weight: float = 0.0
    nll_on: NllTokens = "response"
    needs_reference: bool = False

    @property
    def needs_rejected(self) -> bool:
        """Whether the rejected answers take part in the loss."""
        return self.preference is not None


@dataclass(frozen=True)
class LossParts:
    """The two terms of a loss, scalars that autograd can follow."""

    preference: Tensor
    nll: Tensor

    @property
    def total(self) -> Tensor:
        """The loss."""
        return self.preference + self.nll


def loss_parts(
    objective: Objective, pairs: PairLogps, pair_count: int, token_count: int
) -> LossParts:
    """This pack's share of the step's loss.

    The shares of all packs of a step add up to the loss. `pair_count` and `token_count` are those
    of the whole step, over all packs and ranks.
    """
    nll = objective.nll_weight * pairs.nll_sum.sum() / token_count
    if objective.preference is None:
        return LossParts(preference=nll.new_zeros(()), nll=nll)
    preference = objective.preference_weight * objective.preference(pairs).sum() / pair_count
    return LossParts(preference=preference, nll=nll)
