"""Fewer points for a curve that has more of them than a screen can show."""

from collections.abc import Sequence
from itertools import pairwise
from typing import TypeVar

from orpo_ray.report.page import Point

Item = TypeVar("Item")
MOST = 1000
"""Points of a thinned curve. A plot is hardly as many pixels wide."""
PARTS = 100
"""Means of a long curve."""


def thinned(points: Sequence[Point], most: int = MOST) -> tuple[Point, ...]:
    """At most `most` of the points, in their order: peaks and dips stay.

    The curve is cut into equal parts, and of each the lowest and the highest point are kept. The
    first and the last point always stay.
    """
    if len(points) <= most:
        return tuple(points)
    first, *inner, last = points
    parts = (most - 2) // 2
    edges = [len(inner) * number // parts for number in range(parts + 1)]
    kept: list[Point] = [first]
    for begin, end in pairwise(edges):
        part = inner[begin:end]
        ends = {part.index(min(part, key=_y)), part.index(max(part, key=_y))}
        kept += [part[place] for place in sorted(ends)]
    return (*kept, last)


def spaced(items: Sequence[Item], most: int) -> tuple[Item, ...]:
    """At most `most` of the items at equal distances, in their order; the first and the last stay.

    `most` is 2 or more.
    """
    if len(items) <= most:
        return tuple(items)
    last = len(items) - 1
    return tuple(items[round(place * last / (most - 1))] for place in range(most))


def means(points: Sequence[Point], parts: int = PARTS) -> tuple[Point, ...]:
    """The mean of each of `parts` equal parts of a curve, at the middle of the part.

    Empty for a curve that is too short to have a course beside its points.
    """
    if len(points) < 4 * parts:
        return ()
    edges = [len(points) * number // parts for number in range(parts + 1)]
    cut = [points[begin:end] for begin, end in pairwise(edges)]
    return tuple((_mean([x for x, _ in part]), _mean([y for _, y in part])) for part in cut)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _y(point: Point) -> float:
    return point[1]
