"""What a search found: the best trial, what accuracy cost elsewhere, and how to read both. Pure."""

from collections.abc import Sequence
from typing import Any

from orpo_ray.config.search import ACCURACY
from orpo_ray.runs.search import Search, Trial
from orpo_ray.search.score import MARGIN, score

NLL = "eval/nll"
_NOTICED_NATS = 0.01


def best_trial(search: Search) -> Trial | None:
    """The best of the trials that were trained to their end, by their last evaluation; None where there is none."""
    finished = _finished(search.trials)
    return max(finished, key=lambda trial: score(search.metric, trial.last, search.pairs), default=None)


def pareto_front(trials: Sequence[Trial]) -> list[Trial]:
    """Finished trials that no other one beats in both preference accuracy and chosen NLL, best accuracy first.

    Of trials that are equal in both, the one with the larger margin stands for all.
    """
    front: list[Trial] = []
    by_accuracy = sorted(_finished(trials), key=lambda t: (-t.last[ACCURACY], t.last[NLL], -t.last[MARGIN]))
    for trial in by_accuracy:
        if not front or trial.last[NLL] < front[-1].last[NLL]:
            front.append(trial)
    return front


def trial_steps(trials: Sequence[Trial]) -> int:
    """Optimizer steps that all trials took together."""
    return sum(trial.steps for trial in trials)


def reading(search: Search) -> list[str]:
    """Three lines for somebody who has never seen a search: which won, what it cost, what to do next."""
    best, front = best_trial(search), pareto_front(search.trials)
    assert best is not None, "a search without a finished trial has nothing to read"
    counts = {state: sum(t.state == state for t in search.trials) for state in ("finished", "stopped", "failed")}
    failed = f", {counts['failed']} failed" if counts["failed"] else ""
    whole = max(search.trial_count, len(search.trials)) * best.total_steps
    return [
        f"Trial {best.number} is best: {shown_values(best.values)} prefers the chosen answer for "
        f"{best.last[ACCURACY]:.1%} of {search.pairs} held-out pairs, by {best.last[MARGIN]:.2f} nats a token.",
        f"{counts['finished']} trials were trained to the end, {counts['stopped']} given up early{failed}: "
        f"{trial_steps(search.trials)} steps of the {whole} that all would take.",
        _price(front, best) + " Read the answers before the numbers; then train best.yaml with more data or steps.",
    ]


def _price(front: list[Trial], best: Trial) -> str:
    """What accuracy cost in likelihood of the chosen answers."""
    gentle = front[-1]
    if best.last[NLL] - gentle.last[NLL] < _NOTICED_NATS:
        return "No finished trial keeps the chosen answers noticeably likelier."
    return (
        f"Trial {gentle.number} keeps them likelier (NLL {gentle.last[NLL]:.2f} against {best.last[NLL]:.2f} a token) "
        f"at accuracy {gentle.last[ACCURACY]:.1%}."
    )


def shown_values(values: dict[str, Any]) -> str:
    """Searched values on one line, numbers short."""
    return ", ".join(f"{name}={_short(value)}" for name, value in values.items())


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else " ".join(str(value).split())


def _finished(trials: Sequence[Trial]) -> list[Trial]:
    """Those that were trained to the end, and to numbers that are finite."""
    needed = (ACCURACY, MARGIN, NLL)
    return [t for t in trials if t.state == "finished" and all(t.last[name] is not None for name in needed)]
