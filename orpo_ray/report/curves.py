"""The curves of a run: train and held-out in one plot, thinned, with intervals."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from orpo_ray.report.content import RunContent
from orpo_ray.report.page import Curve, LinePlot, Mark, Point
from orpo_ray.report.thin import MOST, PARTS, means, spaced, thinned
from orpo_ray.runs.changes import EXTENSIONS
from orpo_ray.runs.files import RESUMED
from orpo_ray.runs.scores import PairScores

Z = 1.959964
"""The 97.5 % quantile of the normal distribution: 95 % lie between it and its negative."""

_PAIR_PLOTS = (
    ("Log-prob margin", "nats a token", (("margin", "margin", 0),)),
    (
        "Log-probs of chosen and rejected answers",
        "nats a token",
        (("chosen_logp", "chosen", 2), ("rejected_logp", "rejected", 3)),
    ),
    ("Log odds ratio", "nats", (("log_odds_ratio", "log odds ratio", 0),)),
)
_TRAIN_PLOTS = (
    ("Preference term's share of the loss", "share", (("preference_share", "share", 4),)),
    (
        "Learning rate",
        "",
        (("learning_rate", "learning rate", 5), ("learning_rate_b", "of the B matrices", 6)),
    ),
    ("Gradient norm", "before clipping", (("grad_norm", "gradient norm", 6),)),
    ("Speed", "pairs a second", (("pairs_per_second", "pairs a second", 7),)),
    ("Memory", "GB, first worker, most so far", (("memory_bytes", "memory", 7),)),
)
_SCALE = {"memory_bytes": 1e-9}


def plots(run: RunContent, most: int = MOST) -> tuple[LinePlot, ...]:
    """All plots of a run that have a curve. Each curve has at most `most` points."""
    marks = marks_of(run)
    found = [_accuracy(run), _loss(run)]
    found += [
        _plot(title, unit, [curve for entry in names for curve in _both(run, *entry)])
        for title, unit, names in _PAIR_PLOTS
    ]
    found += [
        _plot(title, unit, [curve for entry in names for curve in _train(run, *entry)])
        for title, unit, names in _TRAIN_PLOTS
    ]
    return tuple(
        LinePlot(
            title=plot.title,
            x_name="step",
            y_name=plot.y_name,
            curves=tuple(_thin(curve, most) for curve in plot.curves),
            marks=marks,
            note=plot.note,
        )
        for plot in found
        if plot.curves
    )


def _plot(title: str, unit: str, curves: Sequence[Curve]) -> LinePlot:
    return LinePlot(title=title, x_name="step", y_name=unit, curves=tuple(curves))


def _accuracy(run: RunContent) -> LinePlot:
    curves = [*_train(run, "accuracy", "accuracy", 1), *_held_out(run, "accuracy", "accuracy", 1)]
    title, unit = "Preference accuracy", "share of pairs"
    note = "The band is the 95 % interval by Wilson over held-out pairs." if run.held_out else ""
    return LinePlot(title=title, x_name="step", y_name=unit, curves=tuple(curves), note=note)


def _loss(run: RunContent) -> LinePlot:
    """The loss and its parts: the likelihood, and the preference term with its weight."""
    shares = dict(run.values("train/preference_share"))
    preference = [
        (step, loss * shares[step]) for step, loss in run.values("train/loss") if step in shares
    ]
    curves = [*_train(run, "loss", "loss", 0), *_both(run, "nll", "NLL of chosen", 2)]
    if any(value for _, value in preference):
        curves.append(_curve("preference term, train", preference, 4))
    return _plot("Loss and its parts", "nats", curves)


def _both(run: RunContent, metric: str, name: str, hue: int) -> list[Curve]:
    return [*_train(run, metric, name, hue), *_held_out(run, metric, name, hue)]


def _train(run: RunContent, metric: str, name: str, hue: int) -> list[Curve]:
    scale = _SCALE.get(metric, 1)
    points = [(step, scale * value) for step, value in run.values(f"train/{metric}")]
    return [_curve(f"{name}, train", points, hue)] if points else []


def _curve(name: str, points: Sequence[Point], hue: int) -> Curve:
    return Curve(name=name, points=tuple(points), hue=hue, whole=len(points))


def _thin(curve: Curve, most: int) -> Curve:
    """A curve with few points. Of evaluations, whose intervals stay with them, every so many."""
    if curve.held_out:
        return replace(curve, points=spaced(curve.points, most), band=spaced(curve.band, most))
    return replace(curve, points=thinned(curve.points, most), means=means(curve.points))


def _held_out(run: RunContent, metric: str, name: str, hue: int) -> list[Curve]:
    """The curve of all evaluations."""
    points = tuple(run.values(f"eval/{metric}"))
    if not points:
        return []
    ends = [_ends(run, metric, step, value) for step, value in points]
    band = tuple(each for each in ends if each is not None)
    return [
        Curve(
            name=f"{name}, held out",
            points=points,
            hue=hue,
            held_out=True,
            band=band if len(band) == len(points) else (),
            whole=len(points),
        )
    ]


def _ends(run: RunContent, metric: str, step: int, value: float) -> Point | None:
    """The 95 % interval of a held-out mean; None if it cannot be told."""
    scores = run.scores.get(step)
    if metric == "accuracy":
        count = scores.comparable.comparisons if scores else run.held_out
        return wilson(value, count) if count else None
    values = None if scores is None else _of_pairs(scores.comparable, metric)
    if values is None or len(values) < 2:
        return None
    reach = Z * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return value - reach, value + reach


def _of_pairs(scores: PairScores, metric: str) -> np.ndarray | None:
    """A metric of each held-out pair; None for one that is not a mean over pairs."""
    if scores.single_answers is not None:
        return None
    chosen = scores.chosen / scores.chosen_tokens
    rejected = scores.rejected / scores.rejected_tokens
    known = {"margin": chosen - rejected, "chosen_logp": chosen, "rejected_logp": rejected}
    return known.get(metric)


def wilson(share: float, count: int) -> Point:
    """The 95 % interval of a share of `count` independent rows (Wilson 1927).

    Unlike the normal one it never leaves 0 to 1, and it has a width at 0 and at 1.
    """
    squared = Z * Z / count
    middle = (share + squared / 2) / (1 + squared)
    reach = Z * math.sqrt(share * (1 - share) / count + squared / (4 * count)) / (1 + squared)
    return max(0.0, middle - reach), min(1.0, middle + reach)


def marks_of(run: RunContent) -> tuple[Mark, ...]:
    """Where a run was resumed after it was stopped or killed, and where it was extended."""
    resumed = [Mark(float(each["step"]), "resumed") for each in run.facts.get(RESUMED, ())]
    extended = [Mark(float(each["step"]), "extended") for each in run.facts.get(EXTENSIONS, ())]
    return tuple(sorted((*resumed, *extended), key=lambda mark: mark.x))


def notes(run: RunContent, found: Sequence[LinePlot]) -> str:
    """What a reader must know of the plots: where the run was resumed, and what they leave out."""
    told = [
        f"Resumed at step {each['step']:,}, {each.get('again', 0):,} steps were computed again."
        for each in run.facts.get(RESUMED, ())
    ]
    curves = [curve for plot in found for curve in plot.curves]
    most = max(curves, key=lambda curve: curve.whole, default=None)
    if most is not None and most.whole > len(most.points):
        told.append(
            f"Curves of training show {len(most.points):,} of {most.whole:,} points: of each part "
            "of the run the lowest and the highest. Evaluations are all there."
        )
    if most is not None and most.means:
        told.append(f"The line in a scattered curve is the mean of each {PARTS}th of the run.")
    return " ".join(told)
