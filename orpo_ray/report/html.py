"""A page as one HTML file that needs nothing else: no network, no second file."""

import base64
import hashlib
import json
import math
from dataclasses import asdict
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from orpo_ray.report.page import LinePlot, Page, Plots, Section, plots_of
from orpo_ray.report.words import number

_HERE = files("orpo_ray.report")
_DIGITS = 6
"""Digits that count of a number in a plot. A screen shows fewer."""


def html(page: Page) -> str:
    """The page as HTML. Every text of the page is escaped, also inside of its JSON."""
    style, script = (_own(name) for name in ("page.css", "page.js"))
    library = _own("echarts/echarts.min.js")
    numbers = {id(plot): place for place, (_, plot) in enumerate(plots_of(page))}
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    text = environment.from_string(_own("page.html")).render(
        page=page,
        policy=_policy((script, library), style),
        style=Markup(style),
        script=Markup(script),
        library=Markup(library),
        plots=Markup(in_script([_plain(plot) for _, plot in plots_of(page)])),
        number=number,
        number_of=lambda plot: numbers[id(plot)],
        kind_of=lambda block: type(block).__name__,
        zooms=_zooms,
    )
    return text.encode(errors="replace").decode()  # half a character of a text has no UTF-8


def _own(name: str) -> str:
    return _HERE.joinpath(name).read_text(encoding="utf-8")


def _zooms(section: Section) -> bool:
    """Whether a section has plots that are zoomed together."""
    plots = [plot for block in section.blocks if isinstance(block, Plots) for plot in block.plots]
    return any(isinstance(plot, LinePlot) and plot.zooms for plot in plots)


def _policy(scripts: tuple[str, ...], style: str) -> str:
    """What a browser may load for the page: nothing; and which scripts it may run: these."""
    allowed = " ".join(_hash(script) for script in scripts)
    return (
        f"default-src 'none'; script-src {allowed}; style-src {_hash(style)}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def in_script(content: Any) -> str:
    """JSON that may stand inside of a <script>: nothing in it can end the element."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _plain(plot: Any) -> dict[str, Any]:
    return {"kind": plot.kind, **_rounded(asdict(plot))}


def _rounded(value: Any) -> Any:
    """Plain data with few digits, and None for each number that JSON cannot write."""
    match value:
        case dict():
            return {name: _rounded(item) for name, item in value.items()}
        case list() | tuple():
            return [_rounded(item) for item in value]
        case float():
            if not math.isfinite(value):
                return None
            return int(value) if value.is_integer() else float(f"{value:.{_DIGITS}g}")
    return value
