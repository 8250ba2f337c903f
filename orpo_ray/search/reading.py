"""What a comparison says in words: who is better, what is noise, and what accuracy does not show.

All functions are pure.
"""

from collections.abc import Sequence

from orpo_ray.runs.comparison import Comparison, Point, Standing
from orpo_ray.runs.scores import are_few, too_few

_MANY_BROKEN = 0.1
_FELL = 0.1
"""Nats a token: a fall of the chosen answers' log-prob that is told."""
_OFF = 0.1
"""A method that uses more or less of a budget in seconds than this share of it is told."""


def reading(comparison: Comparison) -> list[str]:
    """Lines for a reader: the leaders, their rivals within the noise, and warnings."""
    finished = [each for each in comparison.methods if each.accuracy is not None]
    lines = [*_leader(comparison, finished)]
    for each in finished:
        if each.broken is not None and each.broken >= _MANY_BROKEN:
            lines.append(
                f"{each.method}: {each.broken:.0%} of its greedy answers are broken"
                f"{_of_the_base(each)}, whatever its accuracy: they do not end, repeat themselves, "
                "or leave the words of the pairs."
            )
        if _fell(each):
            lines.append(
                f"{each.method} made the chosen answers less likely than the base has them, "
                f"{each.chosen_log_prob:.2f} after {each.chosen_before:.2f} nats a token."
            )
        if _is_off(comparison, each):
            lines.append(
                f"{each.method}: the clock showed {each.budget_used:,.1f} of "
                f"{comparison.budget['amount']:,.1f} seconds; the machine did not keep the speed "
                "of the short run, so the budgets are not equal."
            )
        if failed := _failed_seeds(comparison, each.method):
            lines.append(f"{each.method}: {failed} runs failed: {each.error}")
    lines += [
        f"{each.method} failed: {each.error}"
        for each in comparison.methods
        if each.accuracy is None
    ]
    judge = comparison.settings.get("judge")
    if judge and any(each.win_rate is not None for each in finished):
        lines.append(f"Wins against the base are verdicts of {judge['model']}.")
    if are_few(comparison.pairs):
        lines.append(too_few(comparison.pairs))
    return lines + _of_curve(comparison.curve)


def _is_off(comparison: Comparison, standing: Standing) -> bool:
    budget, used = comparison.budget, standing.budget_used
    if budget["unit"] != "seconds" or used is None:
        return False
    return abs(used / float(budget["amount"]) - 1) > _OFF


def _failed_seeds(comparison: Comparison, method: str) -> str:
    """How many of a method's runs failed, such as `1 of 3`; "" if none."""
    states = [each.state for each in comparison.entries if each.method == method]
    failed = states.count("failed")
    return f"{failed} of {len(states)}" if failed else ""


def _of_curve(curve: Sequence[Point]) -> list[str]:
    """Who leads with few pairs, and who with many."""
    lines = []
    for point in curve:
        finished = [each for each in point.methods if each.accuracy is not None]
        if len(finished) < 2:
            continue
        leader = finished[0]
        beaten = [
            verdict.other if verdict.method == leader.method else verdict.method
            for verdict in point.verdicts
            if leader.method in (verdict.method, verdict.other)
            and verdict.verdict != "within noise"
        ]
        said = f"better than {', '.join(beaten)}" if beaten else "no better than noise"
        lines.append(
            f"With {point.pairs:,} pairs {leader.method} leads ({leader.accuracy:.1%}), {said}."
        )
    return lines


def _leader(comparison: Comparison, finished: list[Standing]) -> list[str]:
    """Who has the highest accuracy, and who is as good as far as one can tell."""
    if len(finished) < 2:
        return []
    best = finished[0]
    near = [
        other
        for found in comparison.verdicts
        if best.method in (found.method, found.other) and found.verdict == "within noise"
        for other in (found.method, found.other)
        if other != best.method
    ]
    said = (
        f"{best.method} prefers the chosen answer most often, for {best.accuracy:.1%} of "
        f"{comparison.pairs} held-out pairs"
    )
    if len(near) == len(finished) - 1:
        return [f"{said}, but no method differs from it by more than noise."]
    rest = f"; within the noise of it: {', '.join(near)}" if near else ", more than any other"
    return [f"{said}{rest}."]


def _of_the_base(standing: Standing) -> str:
    before = standing.broken_before
    return "" if before is None else f" ({before:.0%} of the base's are)"


def _fell(standing: Standing) -> bool:
    before, after = standing.chosen_before, standing.chosen_log_prob
    return before is not None and after is not None and after < before - _FELL
