"""A page in the terminal: its numbers, its sentences and its plots, drawn in characters."""

from collections.abc import Iterator

import plotext

from orpo_ray.report.page import (
    DotPlot,
    Figures,
    IntervalPlot,
    LinePlot,
    Page,
    ParallelPlot,
    Plot,
    Plots,
    Remarks,
)
from orpo_ray.report.words import number

_HEIGHT = 15
_COLOURS = ("blue", "magenta", "green", "red", "orange", "cyan", "gray", "white")
_MARKERS = ("dot", "x", "o", "+", "#", "s", "d", "z")
"""What tells curves apart where there are no colours."""
_CONTROLS = dict.fromkeys((*range(32), *range(127, 160)), "\N{REPLACEMENT CHARACTER}")
"""Characters with which a text could give orders to the terminal."""


def text(page: Page, width: int, colours: bool) -> str:
    """The page as text of at most `width` columns, where plots have room for it."""
    return "\n".join(_lines(page, width, colours)) + "\n"


def _lines(page: Page, width: int, colours: bool) -> Iterator[str]:
    yield _plain(f"{page.title}: {page.kind} {page.state}".rstrip())
    yield _plain(page.subtitle)
    for tab in page.tabs:
        if len(page.tabs) > 1:
            yield f"\n== {_plain(tab.name)} =="
        for section in tab.sections:
            for block in section.blocks:
                match block:
                    case Figures(figures):
                        for figure in figures:
                            yield _plain(f"{figure.name}: {figure.value}  ({figure.note})")
                    case Remarks(remarks):
                        yield from (_plain(f"{each.level}: {each.text}") for each in remarks)
                    case Plots(plots):
                        yield from (_drawn(plot, width, colours) for plot in plots)


def _drawn(plot: Plot, width: int, colours: bool) -> str:
    match plot:
        case LinePlot():
            return _lines_of(plot, width, colours)
        case DotPlot():
            return _dots_of(plot, width, colours)
        case IntervalPlot():
            return _intervals_of(plot, width)
        case ParallelPlot():
            return ""  # lines that cross many axes cannot be read in characters


def _begin(title: str, x_name: str, width: int, colours: bool) -> None:
    plotext.clear_figure()
    plotext.theme("pro" if colours else "clear")
    plotext.plotsize(width, _HEIGHT)
    plotext.title(_plain(title))
    plotext.xlabel(_plain(x_name))


def _lines_of(plot: LinePlot, width: int, colours: bool) -> str:
    _begin(f"{plot.title} {plot.y_name}".rstrip(), plot.x_name, width, colours)
    for place, curve in enumerate(plot.curves):
        xs, ys = zip(*curve.points, strict=True)
        look = _look(place, curve.hue if curve.tone is None else place, colours)
        plotext.plot(xs, ys, label=_plain(curve.name), **look)
    for mark in plot.marks:
        plotext.vline(mark.x, "gray" if colours else None)
    return _built(colours)


def _built(colours: bool) -> str:
    """The drawing, which plotext ends with orders to the terminal in any case."""
    built = str(plotext.build())
    return "\n" + (built if colours else plotext.uncolorize(built))


def _look(place: int, hue: int, colours: bool) -> dict[str, str]:
    if colours:
        return {"marker": "braille", "color": _COLOURS[hue % len(_COLOURS)]}
    return {"marker": _MARKERS[place % len(_MARKERS)]}


def _dots_of(plot: DotPlot, width: int, colours: bool) -> str:
    dots = [dot for dot in plot.dots if isinstance(dot.x, float) and isinstance(dot.y, float)]
    if not dots:
        return ""
    _begin(plot.title, f"{plot.x.name}; up: {plot.y.name}", width, colours)
    if plot.x.log:
        plotext.xscale("log")
    if plot.y.log:
        plotext.yscale("log")
    best = [dot for dot in dots if dot.look == "best"]
    for label, some in (("trials", [dot for dot in dots if dot not in best]), ("best", best)):
        if some:
            marker = "x" if label == "best" else "dot"
            xs, ys = [dot.x for dot in some], [dot.y for dot in some]
            plotext.scatter(xs, ys, label=label, marker=marker)
    return _built(colours)


def _intervals_of(plot: IntervalPlot, width: int) -> str:
    """Each value on a line of its own, its interval as a bar."""
    ends = [end for row in plot.rows for end in (row.low, row.value, row.high) if end is not None]
    low, high = min([*ends, 0.0] if plot.from_zero else ends), max(ends)
    names = max(len(_plain(row.name)) for row in plot.rows)
    room = max(10, width - names - 12)

    def at(value: float) -> int:
        return round((value - low) / (high - low) * (room - 1)) if high > low else 0

    lines = [f"\n{_plain(plot.title)}"]
    for row in plot.rows:
        bar = [" "] * room
        if row.low is not None and row.high is not None:
            first, last = at(row.low), at(row.high)
            bar[first : last + 1] = "-" * (last - first + 1)
        bar[at(row.value)] = "o"
        lines.append(f"{_plain(row.name):>{names}} {''.join(bar)} {number(row.value)}")
    return "\n".join(lines)


def _plain(line: str) -> str:
    return line.translate(_CONTROLS)
