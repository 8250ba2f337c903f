"""A page as plain data: what it says, before anybody decides how it is shown.

The builders of pages know no HTML, and those who show a page know no run. Every text may come from
a model or from data: whoever shows it, escapes it.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

Point = tuple[float, float]
Look = Literal["plain", "best", "small", "cross"]
Level = Literal["good", "note", "alarm"]
Cell = str | float | None
"""What a table holds: text, a number that is shown with few digits, or nothing."""
Tones = tuple[str, float, float]
"""What colours mean: the name of a number, and its values at tones 0 and 1."""


@dataclass(frozen=True)
class Remark:
    """One sentence that a reader should not miss."""

    text: str
    level: Level = "note"


@dataclass(frozen=True)
class Figure:
    """A number that answers a question of the first minute, with a word on what it is."""

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Facts:
    """Names and values, one pair a line."""

    rows: tuple[tuple[str, str], ...]
    title: str = ""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows under column names. The first `names` columns hold names, the others numbers."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    names: int = 1
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One line of a plot.

    `hue` is the number of its colour: a measure keeps it in training and on held-out pairs. `band`
    has the ends (low, high) of an interval at each point. `means` shows the course of a curve whose
    points scatter.
    """

    name: str
    points: tuple[Point, ...]
    hue: int = 0
    tone: float | None = None
    """In place of a hue, where colours mean a number."""
    held_out: bool = False
    band: tuple[Point, ...] = ()
    means: tuple[Point, ...] = ()
    whole: int = 0
    """How many points there were before the curve was thinned."""


@dataclass(frozen=True)
class Mark:
    """A vertical line at a place of the x axis, such as a step at which a run was resumed."""

    x: float
    text: str


@dataclass(frozen=True, kw_only=True)
class LinePlot:
    """Curves over one x axis. All plots whose `zooms` is true show the same steps."""

    kind: ClassVar = "lines"
    title: str
    x_name: str
    y_name: str = ""
    curves: tuple[Curve, ...]
    marks: tuple[Mark, ...] = ()
    note: str = ""
    in_stairs: bool = False
    """Whether the points are the left ends of bins."""
    zooms: bool = True
    tones: Tones | None = None


@dataclass(frozen=True, kw_only=True)
class Dot:
    """One thing in a plane. `tone` from 0 to 1 gives its colour, None a neutral one."""

    name: str
    x: float | str
    y: float | str
    tone: float | None = None
    look: Look = "plain"
    told: tuple[tuple[str, str], ...] = ()
    """What is said of it beside its place."""
    range_x: Point | None = None
    range_y: Point | None = None


@dataclass(frozen=True, kw_only=True)
class Axis:
    """An axis of numbers; with `options`, of names in that order. `ends` are those to show."""

    name: str
    log: bool = False
    options: tuple[str, ...] = ()
    ends: Point | None = None


@dataclass(frozen=True, kw_only=True)
class DotPlot:
    """Dots in a plane. `path` joins places, such as a Pareto front."""

    kind: ClassVar = "dots"
    title: str
    x: Axis
    y: Axis
    dots: tuple[Dot, ...]
    path: tuple[Point, ...] = ()
    tones: Tones | None = None
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A value with the ends of its interval, if it has one."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, kw_only=True)
class IntervalPlot:
    """Values with intervals, one below the other."""

    kind: ClassVar = "intervals"
    title: str
    x_name: str
    rows: tuple[Interval, ...]
    from_zero: bool = False
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Strand:
    """One thing in a plot of parallel axes; None where it has no value."""

    name: str
    values: tuple[float | str | None, ...]
    tone: float | None = None
    is_best: bool = False


@dataclass(frozen=True, kw_only=True)
class ParallelPlot:
    """Things of many values: each is a line that crosses one axis for each value."""

    kind: ClassVar = "parallel"
    title: str
    axes: tuple[Axis, ...]
    strands: tuple[Strand, ...]
    tones: Tones | None = None
    note: str = ""


Plot = LinePlot | DotPlot | IntervalPlot | ParallelPlot


@dataclass(frozen=True)
class Plots:
    """Plots side by side, as many as the screen has room for."""

    plots: tuple[Plot, ...]


@dataclass(frozen=True)
class Remarks:
    """Sentences, the most important first."""

    remarks: tuple[Remark, ...]


@dataclass(frozen=True)
class Figures:
    """Numbers side by side."""

    figures: tuple[Figure, ...]


@dataclass(frozen=True, kw_only=True)
class Said:
    """An answer, or part of one, and who gave it."""

    who: str
    text: str
    note: str = ""
    held_up: bool = False
    """Whether it is an answer of the data, to compare the others with."""


@dataclass(frozen=True)
class Asked:
    """A prompt and the answers to it."""

    prompt: str
    answers: tuple[Said, ...]


@dataclass(frozen=True)
class Answers:
    """Prompts with their answers. The `first` of them are seen at once, the others on demand."""

    asked: tuple[Asked, ...]
    title: str = ""
    first: int = 4


Block = Remarks | Figures | Facts | Table | Plots | Answers


@dataclass(frozen=True)
class Section:
    """A heading with what stands below it."""

    title: str
    blocks: tuple[Block, ...]
    note: str = ""


@dataclass(frozen=True)
class Tab:
    """One of several leaves of a page."""

    name: str
    sections: tuple[Section, ...]


@dataclass(frozen=True, kw_only=True)
class Page:
    """A whole page. With one tab it has no row of tabs."""

    title: str
    kind: str
    """What it shows: a run, a search, a comparison."""
    subtitle: str
    tabs: tuple[Tab, ...]
    made: str = ""
    """When, and by which version."""
    state: str = ""


def plots_of(page: Page) -> list[tuple[str, Plot]]:
    """Every plot of a page with the name of its tab, in reading order."""
    return [
        (tab.name, plot)
        for tab in page.tabs
        for section in tab.sections
        for block in section.blocks
        if isinstance(block, Plots)
        for plot in block.plots
    ]
