"""The plots of a page as PNG files, for a README."""

import re
from pathlib import Path
from typing import Any

from orpo_ray.errors import ConfigError, ResourceError
from orpo_ray.report.page import (
    Axis,
    DotPlot,
    IntervalPlot,
    LinePlot,
    Page,
    ParallelPlot,
    Plot,
    plots_of,
)

_COLOURS = (
    *("#2563a8", "#7b4fa3", "#1c7c4f", "#c4502a"),
    *("#a87400", "#0f7f8a", "#a0446f", "#59656f"),
)
_SIZE, _DPI = (6.4, 3.6), 150
_NO_NAME = re.compile(r"[^a-z0-9]+")


def refuse_without_matplotlib() -> None:
    """Raise ResourceError if matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ResourceError(
            "--png draws with matplotlib, which is not installed; pip install 'orpo-ray[report]'"
        ) from error


def write_pictures(page: Page, folder: Path) -> list[str]:
    """Write each plot of a page as a PNG. Returns the paths.

    Raises ResourceError without matplotlib, ConfigError if the folder cannot be written.
    """
    refuse_without_matplotlib()
    from matplotlib.figure import Figure

    written = []
    for place, (tab, plot) in enumerate(plots_of(page), start=1):
        if isinstance(plot, ParallelPlot):
            continue  # matplotlib has no parallel axes
        figure = Figure(figsize=_SIZE, dpi=_DPI, layout="constrained")
        axes = figure.subplots()
        _draw(axes, plot)
        name = f"{place:02} {tab if len(page.tabs) > 1 else ''} {plot.title}".lower()
        path = folder / f"{_NO_NAME.sub('-', name).strip('-')}.png"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            figure.savefig(path)
        except OSError as error:
            raise ConfigError(f"--png: {path}: cannot be written: {error.strerror}") from error
        written.append(str(path))
    return written


def _draw(axes: Any, plot: Plot) -> None:
    axes.set_title(_plain(plot.title), loc="left", fontsize=11)
    axes.grid(alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    match plot:
        case LinePlot():
            _lines(axes, plot)
        case DotPlot():
            _dots(axes, plot)
        case IntervalPlot():
            _intervals(axes, plot)


def _plain(text: str) -> str:
    """A text as it is: matplotlib would set what is between two dollars as a formula."""
    return text.replace("$", r"\$")


def _lines(axes: Any, plot: LinePlot) -> None:
    for curve in plot.curves:
        xs, ys = zip(*curve.points, strict=True)
        colour: Any = _COLOURS[curve.hue % len(_COLOURS)]
        if curve.tone is not None:
            colour = _toned(curve.tone)
        strong = curve.held_out or plot.in_stairs
        few = 60 if curve.held_out else 2
        axes.plot(
            xs,
            ys,
            label=_plain(curve.name),
            color=colour,
            linewidth=2 if strong else 1,
            alpha=1 if strong else 0.6,
            marker="o" if len(xs) < few else None,
            markersize=4,
            drawstyle="steps-post" if plot.in_stairs else "default",
        )
        if curve.band:
            lows, highs = zip(*curve.band, strict=True)
            axes.fill_between(xs, lows, highs, color=colour, alpha=0.15, linewidth=0)
    for mark in plot.marks:
        axes.axvline(mark.x, color="#59656f", linestyle="--", linewidth=1)
        axes.annotate(
            _plain(mark.text), (mark.x, 1), xycoords=("data", "axes fraction"), fontsize=7
        )
    axes.set_xlabel(_plain(plot.x_name))
    axes.set_ylabel(_plain(plot.y_name))
    if plot.tones is None:
        axes.legend(frameon=False, fontsize=8)


def _toned(tone: float) -> tuple[float, float, float]:
    """From a pale blue to a dark one."""
    depth = 0.25 + 0.75 * tone
    return 1 - depth * 0.92, 1 - depth * 0.69, 1 - depth * 0.44


def _dots(axes: Any, plot: DotPlot) -> None:
    for dot in plot.dots:
        place = (_at(plot.x, dot.x), _at(plot.y, dot.y))
        for ends, flat in ((dot.range_x, True), (dot.range_y, False)):
            if ends is not None:
                xs, ys = (ends, (place[1],) * 2) if flat else ((place[0],) * 2, ends)
                axes.plot(xs, ys, color="#59656f", linewidth=1)
        axes.scatter(
            *place,
            s={"best": 90, "plain": 45, "small": 18, "cross": 40}[dot.look],
            color=_toned(0.5 if dot.tone is None else dot.tone),
            edgecolors="#b3401f" if dot.look == "best" else "#59656f",
            linewidths=2 if dot.look == "best" else 0.5,
            zorder=3,
        )
        if dot.look == "best" or len(plot.dots) <= 12:
            axes.annotate(
                _plain(dot.name), place, xytext=(0, 7), textcoords="offset points", fontsize=7
            )
    if plot.path:
        axes.plot(*zip(*plot.path, strict=True), color="#59656f", linestyle="--", linewidth=1)
    _scale(axes.set_xscale, axes.set_xticks, axes.set_xlabel, plot.x)
    _scale(axes.set_yscale, axes.set_yticks, axes.set_ylabel, plot.y)


def _at(axis: Axis, value: float | str) -> float:
    return float(axis.options.index(str(value))) if axis.options else float(value)


def _scale(scale: Any, ticks: Any, label: Any, axis: Axis) -> None:
    if axis.log:
        scale("log")
    if axis.options:
        ticks(range(len(axis.options)), [_plain(name) for name in axis.options])
    label(_plain(axis.name))


def _intervals(axes: Any, plot: IntervalPlot) -> None:
    for place, row in enumerate(plot.rows):
        if row.low is not None and row.high is not None:
            axes.plot((row.low, row.high), (place, place), color=_COLOURS[0], alpha=0.6)
        axes.scatter(row.value, place, color=_COLOURS[0], zorder=3)
    axes.set_yticks(range(len(plot.rows)), [_plain(row.name) for row in plot.rows])
    axes.invert_yaxis()
    axes.set_xlabel(_plain(plot.x_name))
    if plot.from_zero:
        axes.set_xlim(left=0)
