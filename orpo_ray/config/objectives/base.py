"""What a run asks the settings of its objective, so that no other code tests for its name."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from orpo_ray.config.section import Section
from orpo_ray.config.suited import Suited

_MEANS = {
    "accuracy": "accuracy",
    "chosen": "chosen_logp",
    "rejected": "rejected_logp",
    "chosen_log_probs": "chosen_logp",
    "rejected_log_probs": "rejected_logp",
}
"""For each number of TRL, our metric that gives it, if TRL's rewards are mean log-probs."""
_GAINS = {
    "accuracy": "gain_accuracy",
    "chosen": "chosen_gain",
    "rejected": "rejected_gain",
    "chosen_log_probs": "chosen_sum",
    "rejected_log_probs": "rejected_sum",
}
"""The same, if its rewards are gains."""


@dataclass(frozen=True)
class InTrl:
    """How stock TRL computes an objective: which of its trainers, and with which settings."""

    trainer: Literal["ORPO", "CPO", "DPO", "KTO"]
    settings: Mapping[str, Any] = field(default_factory=dict)


class ObjectiveConfig(Section):
    """Settings of an objective.

    `kind` is its name. The files with its settings and its loss have the same name.
    """

    kind: str
    search_space: ClassVar[Mapping[str, Suited]] = {}
    """Ranges that suit it, by dotted field."""
    special_spaces: ClassVar[Mapping[tuple[str, Any], Mapping[str, Suited]]] = {}
    """Ranges in place of these, by a setting and the value with which they hold."""
    needs_reference: ClassVar[bool] = False
    """Whether the loss compares with the log-probs of a frozen model."""
    needs_rejected: ClassVar[bool] = True
    """Whether the rejected answers take part in the loss."""
    only_in_trl: ClassVar[bool] = False
    """Whether our own engine has no such loss."""
    compares_below_adapter: ClassVar[bool] = False
    """Whether its reference is the model below the adapter that is trained."""

    reads_single_answers: ClassVar[bool] = False
    """Whether it trains on rows with one answer that is labelled good or bad, too."""

    @property
    def suited_space(self) -> Mapping[str, Suited]:
        """The ranges that suit these settings."""
        for (name, value), space in self.special_spaces.items():
            if getattr(self, name) == value:
                return space
        return self.search_space

    @property
    def scores_prompt(self) -> bool:
        """Whether the likelihood runs over the tokens of the prompt, too."""
        return self.has_likelihood and getattr(self, "nll_on", "response") == "full"

    @property
    def has_likelihood(self) -> bool:
        """Whether the loss has a likelihood term.

        That term keeps the text readable at higher learning rates.
        """
        return False

    more_preference: ClassVar[str] = ""
    """What to do if the preference term is too small a share of the loss; "" if it is the loss."""

    trl_reward_weight: ClassVar[str | None] = None
    """The setting by which TRL multiplies log-probs to get what it calls a reward.

    None if this objective has no metrics under TRL's names of rewards.
    """
    trl_rewards: ClassVar[Literal["means", "gains"]] = "means"
    """What TRL multiplies: mean log-probs, or what the summed ones gained over the reference.

    Without a reference a gain is the sum itself.
    """

    def trl_metrics(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Our metrics under the names that TRL gives to the same quantities."""
        found = {"nll_loss": metrics["nll"]} if "nll" in metrics else {}
        ours = _MEANS if self.trl_rewards == "means" else _GAINS
        if self.trl_reward_weight is None or not metrics.keys() >= set(ours.values()):
            return found
        weight = getattr(self, self.trl_reward_weight)
        values = {name: metrics[own] for name, own in ours.items()}
        chosen, rejected = weight * values["chosen"], weight * values["rejected"]
        return {
            **found,
            "rewards/accuracies": values["accuracy"],
            "rewards/margins": chosen - rejected,
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "logps/chosen": values["chosen_log_probs"],
            "logps/rejected": values["rejected_log_probs"],
            "log_odds_chosen": metrics["log_odds_ratio"],
        }

    def in_trl(self) -> InTrl | str:
        """How TRL computes these settings; or why it cannot, and what to set instead."""
        return (
            f"objective.kind: TRL has no trainer that computes {self.kind} on pairs; use another "
            "objective"
        )
