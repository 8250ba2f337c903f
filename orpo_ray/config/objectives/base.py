"""What the settings of an objective say to the rest of a run, which never compares names."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from orpo_ray.config.section import Section
from orpo_ray.config.suited import Suited


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
    only_in_trl: ClassVar[bool] = False
    """Whether our own engine has no such loss."""
    compares_below_adapter: ClassVar[bool] = False
    """Whether its reference is the model below the adapter that is trained."""

    @property
    def has_likelihood(self) -> bool:
        """Whether the loss has a likelihood term.

        That term keeps the text readable at higher learning rates.
        """
        return False

    trl_reward_weight: ClassVar[str | None] = None
    """The setting by which TRL multiplies a mean log-prob to get what it calls a reward.

    None if TRL's metrics are of other quantities than ours.
    """

    def trl_metrics(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Our metrics under the names that TRL gives to the same quantities."""
        assert self.trl_reward_weight is not None, "refused when the config was read"
        weight = getattr(self, self.trl_reward_weight)
        found = {"nll_loss": metrics["nll"]}
        if "margin" in metrics:
            found |= {
                "rewards/accuracies": metrics["accuracy"],
                "rewards/margins": weight * metrics["margin"],
                "rewards/chosen": weight * metrics["chosen_logp"],
                "rewards/rejected": weight * metrics["rejected_logp"],
                "logps/chosen": metrics["chosen_logp"],
                "logps/rejected": metrics["rejected_logp"],
                "log_odds_chosen": metrics["log_odds_ratio"],
            }
        return found

    def in_trl(self) -> InTrl | str:
        """How TRL computes these settings; or why it cannot, and what to set instead."""
        return (
            f"objective.kind: TRL has no trainer that computes {self.kind} on pairs; use another "
            "objective"
        )
