"""What a run changed, in numbers with intervals and in words.

This module is pure: it reads and writes no files.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import asdict
from typing import Any

from orpo_ray.runs.scores import Change, Mean, PairScores, are_few, changes, too_few

_HIGH = 0.97
"""From this accuracy on, a base leaves little to learn."""
_NEGLIGIBLE = 0.05
"""Below this share of the loss, the preference term hardly moves the model."""
METRIC_LABELS = {
    "accuracy": "preference accuracy",
    "margin": "log-prob margin per token",
    "chosen_logp": "chosen log-prob per token",
    "rejected_logp": "rejected log-prob per token",
    "nll": "NLL of chosen answers per token",
}
"""What a reader calls each of INTERVAL_METRICS."""


def compared(before: PairScores | None, after: PairScores | None) -> dict[str, Change]:
    """How each mean changed; empty if one of the evaluations is not on record."""
    if before is None or after is None or len(before) != len(after):
        return {}
    return changes(before, after)


def plain(found: Mapping[str, Change | Mean]) -> dict[str, Any]:
    """Changes or means as plain data, for result.json."""
    return {name: asdict(each) for name, each in found.items()}


def remarks(found: Mapping[str, Change], pairs: int) -> list[str]:
    """What was learnt and what was not, one fact a line.

    `pairs`: how many held-out pairs the changes were measured on.
    """
    if not found:
        return []
    lines = []
    if not math.isnan(found["accuracy"].difference.value):  # it is for answers of one kind
        lines.append(_on_accuracy(found["accuracy"], pairs))
    chosen = found["chosen_logp"]
    if chosen.difference.high < 0:
        lines.append(
            f"The chosen answers became less likely ({chosen.difference.value:+.3f} nats a token): "
            "read some answers, and check that they still end."
        )
    is_of_pairs = found["accuracy"].chance is not None
    if is_of_pairs and are_few(pairs) and found["accuracy"].is_noise:
        lines.append(too_few(pairs))
    return lines


def on_preference(shares: Collection[float], advice: str) -> list[str]:
    """A remark if the preference term was a negligible share of the loss, mean over the steps.

    `advice` says what changes that; it is empty if the loss has no other term.
    """
    share = sum(shares) / len(shares) if shares else 1.0
    if not advice or share >= _NEGLIGIBLE:
        return []
    return [
        f"The preference term was {100 * share:.1f} % of the loss, so the run mostly learnt to "
        f"write the chosen answers: {advice}, or run orpo-ray tune."
    ]


def _on_accuracy(change: Change, pairs: int) -> str:
    gain = change.difference
    numbers = f"({change.before.value:.3f} to {change.after.value:.3f} of {pairs} held-out pairs)"
    if change.before.value >= _HIGH and (change.is_noise or gain.value > 0):
        return (
            f"The model preferred the chosen answers before training {numbers}: little was left to "
            "learn."
        )
    if change.is_noise:
        return (
            f"Accuracy did not change by more than the noise {numbers}: try more steps, or run "
            "orpo-ray tune, which tries other learning rates and weights of the objective."
        )
    better = "prefers the chosen answers more often" if gain.value > 0 else "got worse"
    return f"The model {better} {numbers}."
