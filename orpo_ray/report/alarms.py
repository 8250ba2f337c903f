"""What a reader of curves should be warned of, decided from numbers alone."""

from dataclasses import dataclass

from orpo_ray.report.page import Level, Remark
from orpo_ray.runs.scores import Change
from orpo_ray.runs.summary import on_preference, remarks

_PERFECT = 0.99
"""From this accuracy on, broken answers show that accuracy is not what was wanted."""
_FLAT_NATS = 0.01
"""A margin that moved by less than this a token has not moved."""


@dataclass(frozen=True, kw_only=True)
class Signs:
    """What can be seen of a run so far."""

    changes: dict[str, Change]
    """From the first to the last evaluation; empty with fewer than two."""
    pairs: int
    """How many held-out pairs were compared."""
    preference_shares: tuple[float, ...] = ()
    """The share of the preference term in the loss, at each step."""
    more_preference: str = ""
    """What raises that share, such as `raise objective.lambda`; empty if the loss has no other
    term."""
    is_to_prefer: bool = True
    """Whether the loss has a preference term at all."""
    broken: float | None = None
    """The share of broken answers at the last evaluation; None if none were taken."""
    accuracy: float | None = None
    """On held-out pairs, at the last evaluation."""
    steps: int = 0


def alarms(signs: Signs) -> list[Remark]:
    """The sentences to show, alarms first."""
    told = [*_on_answers(signs), *_on_flat(signs)]
    for line in remarks(signs.changes, signs.pairs):
        told.append(Remark(line, _level(line)))
    told += [
        Remark(line, "alarm")
        for line in on_preference(signs.preference_shares, signs.more_preference)
    ]
    return sorted(told, key=lambda remark: remark.level != "alarm")


def _level(line: str) -> Level:
    """How a remark of the result is shown: what fell is an alarm."""
    if line.startswith("The chosen answers became less likely"):
        return "alarm"
    if line.startswith("The model prefers"):
        return "good"
    return "alarm" if line.startswith("The model got worse") else "note"


def _on_answers(signs: Signs) -> list[Remark]:
    if not signs.broken:
        return []
    share = f"{100 * signs.broken:.0f} % of the sample answers do not end, are empty or repeat"
    if (signs.accuracy or 0.0) >= _PERFECT:
        return [
            Remark(
                f"Held-out accuracy is {signs.accuracy:.3f}, but {share}. The model tells good "
                "answers from bad ones and writes none: lower the learning rate or the weight of "
                "the preference term.",
                "alarm",
            )
        ]
    return [Remark(f"{share}: read them before the numbers.", "alarm")]


def _on_flat(signs: Signs) -> list[Remark]:
    """Whether neither accuracy nor margin moved, if the loss is to move them."""
    if not (signs.changes and signs.steps and signs.is_to_prefer):
        return []
    accuracy, margin = signs.changes["accuracy"], signs.changes["margin"]
    moved = margin.difference.value
    if not accuracy.is_noise or not (margin.difference.holds_zero or abs(moved) < _FLAT_NATS):
        return []
    return [
        Remark(
            f"Flat: after {signs.steps} steps neither accuracy nor margin has moved "
            f"({moved:+.3f} nats a token). {_too_small(signs.more_preference)}",
            "alarm",
        )
    ]


def _too_small(more_preference: str) -> str:
    """What holds a model back; `more_preference` says which weight of the loss does, if any."""
    advice, _, weight = more_preference.partition(" ")
    if advice == "lower":
        return f"{weight} is too large, or training.learning_rate is too small."
    return f"{weight + ' or ' if weight else ''}training.learning_rate is too small."
