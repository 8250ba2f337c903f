"""The page of a comparison of methods: intervals, curves, and what each gain cost.

Every number of the record may be missing: a method may have failed, or not have run yet.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from orpo_ray.report.content import RunContent
from orpo_ray.report.page import (
    Axis,
    Block,
    Cell,
    Curve,
    Dot,
    DotPlot,
    Figure,
    Figures,
    Interval,
    IntervalPlot,
    Level,
    LinePlot,
    Page,
    Plot,
    Plots,
    Point,
    Remark,
    Remarks,
    Section,
    Tab,
    Table,
)
from orpo_ray.report.words import between, counted, duration, number, share, size

Method = Mapping[str, Any]
Chains = Mapping[str, Sequence[RunContent]]
"""The runs of one seed of each method, by its name: the stages, in order."""

_INTERVALS = (
    ("accuracy", "Held-out accuracy", "share of pairs", "low", "high"),
    ("margin", "Unscaled margin", "nats a token", "margin_low", "margin_high"),
    ("win_rate", "Win rate against the base", "share of answers", "win_low", "win_high"),
)
_NUMBERS = (
    ("chosen log-prob", "chosen_log_prob"),
    ("rejected log-prob", "rejected_log_prob"),
    ("NLL", "nll"),
)
_GAINS = (("accuracy", "held-out accuracy", "low", "high"),)
_CURVES = (
    ("accuracy", "Held-out accuracy"),
    ("margin", "Held-out margin"),
    ("nll", "Held-out NLL"),
)


def page_of_comparison(record: Mapping[str, Any], place: str, chains: Chains) -> Page:
    """The page of a comparison. `record` is the content of comparison.json."""
    methods = [each for each in record.get("methods") or () if each.get("method")]
    found = [_outcome(record, methods), _plots(methods, chains)]
    found += [
        _table(methods) if methods else None,
        _verdicts(record),
        _by_pairs(record),
        _failed(methods),
    ]
    return Page(
        title=str(record.get("name") or place),
        kind="comparison",
        subtitle=f"{_how_many(record, methods)}, {_budget(record)}",
        tabs=(Tab("comparison", tuple(section for section in found if section is not None)),),
        state=str(record.get("status") or ""),
    )


def _how_many(record: Mapping[str, Any], methods: Sequence[Method]) -> str:
    """How many methods were compared, and with how many numbers of pairs if with several."""
    parts = record.get("curve") or ()
    every = [*methods, *(method for part in parts for method in part.get("methods") or ())]
    found = counted(len({str(method["method"]) for method in every}), "method")
    return f"{found} at {counted(len(parts), 'number')} of pairs" if parts else found


def _budget(record: Mapping[str, Any]) -> str:
    budget = record.get("budget") or {}
    if budget.get("amount") is None:
        return "no budget on record"
    return f"{number(float(budget['amount']))} {budget.get('unit', '')} for each"


def _outcome(record: Mapping[str, Any], methods: Sequence[Method]) -> Section:
    verdicts = record.get("verdicts") or ()
    blocks: list[Block] = []
    states = [str(method.get("state")) for method in methods]
    told_of = f"{states.count('finished')} finished, {states.count('failed')} failed"
    figures = [Figure("methods", str(len(methods)), told_of)] if methods else []
    figures.append(Figure("budget", _budget(record), "all that a method needs counts"))
    hours = [
        method["device_hours"] * (method.get("seeds") or 1)
        for method in methods
        if method.get("device_hours") is not None
    ]
    if hours:
        told_of = "device-hours, all methods and seeds"
        figures.append(Figure("cost", number(sum(hours), 3), told_of))
    blocks.append(Figures(tuple(figures)))
    said = [Remark(str(line), _level(str(line), methods)) for line in record.get("reading") or ()]
    unclear = sum(each.get("verdict") == "within noise" for each in verdicts)
    if unclear:
        said.append(
            Remark(f"{counted(unclear, 'pair')} of methods: the difference is within noise.")
        )
    if said:
        first = sorted(said, key=lambda remark: remark.level != "alarm")
        blocks.append(Remarks(tuple(first)))
    return Section("Outcome", tuple(blocks))


def _level(line: str, methods: Sequence[Method]) -> Level:
    """An alarm if a line is about one method alone: what it broke, lost, or failed by."""
    names = (str(method["method"]) for method in methods)
    warnings = (": ", " made the chosen answers less likely", " failed: ")
    return "alarm" if any(line.startswith(f"{n}{w}") for n in names for w in warnings) else "good"


def _plots(methods: Sequence[Method], chains: Chains) -> Section | None:
    found = [_intervals(methods, *measure) for measure in _INTERVALS]
    shown: list[Plot] = [plot for plot in found if plot.rows]
    shown += _costs(methods)
    shown += _curves(chains)
    return Section("Side by side", (Plots(tuple(shown)),)) if shown else None


def _intervals(
    methods: Sequence[Method], name: str, title: str, unit: str, *ends: str
) -> IntervalPlot:
    rows = tuple(
        Interval(
            name=str(method["method"]),
            value=float(method[name]),
            low=method.get(ends[0]),
            high=method.get(ends[1]),
        )
        for method in methods
        if method.get(name) is not None
    )
    note = "Bars are 95 % intervals over held-out pairs."
    return IntervalPlot(title=title, x_name=unit, rows=rows, note=note)


def _costs(methods: Sequence[Method]) -> list[DotPlot]:
    """What each method cost beside what it gained."""
    costs = (("device_hours", "device-hours a seed"), ("seconds", "seconds a seed"))
    key, name = next(
        (cost for cost in costs if any(method.get(cost[0]) is not None for method in methods)),
        (None, ""),
    )
    if key is None:
        return []
    found = []
    for measure, label, low, high in _GAINS:
        dots = tuple(
            Dot(
                name=str(method["method"]),
                x=float(method[key]),
                y=float(method[measure]),
                tone=1.0,
                told=(("memory", size(method.get("peak_memory_bytes"))),),
                range_y=_range(method.get(low), method.get(high)),
            )
            for method in methods
            if method.get(key) is not None and method.get(measure) is not None
        )
        if dots:
            title = f"Cost and {label.removeprefix('held-out ')}"
            note = "Up is better, left is cheaper."
            x, y = Axis(name=name), Axis(name=label)
            found.append(DotPlot(title=title, x=x, y=y, dots=dots, note=note))
    return found


def _range(low: float | None, high: float | None) -> Point | None:
    return None if low is None or high is None else (float(low), float(high))


def _curves(chains: Chains) -> list[LinePlot]:
    """Held-out curves of all methods, one seed each; the stages of a method follow each other."""
    note = "One seed of each method. Stages follow each other."
    found = []
    for metric, title in _CURVES:
        joined = [(name, _joined(runs, f"eval/{metric}")) for name, runs in chains.items()]
        curves = tuple(
            Curve(name=name, points=points, hue=hue, held_out=True, whole=len(points))
            for hue, (name, points) in enumerate(joined)
            if points
        )
        if curves:
            found.append(LinePlot(title=title, x_name="step", curves=curves, note=note))
    return found


def _joined(stages: Sequence[RunContent], name: str) -> tuple[Point, ...]:
    points: list[Point] = []
    done = 0
    for stage in stages:
        points += [(float(done + step), value) for step, value in stage.values(name)]
        done += stage.steps
    return tuple(points)


def _table(methods: Sequence[Method]) -> Section:
    found = Table(
        title="Gain",
        columns=(
            *("method", "state", "accuracy", "95 %", "margin", "95 %"),
            *(title for title, _ in _NUMBERS),
            *("win rate", "95 %", "broken"),
        ),
        rows=tuple(map(_gain, methods)),
        names=2,
    )
    costs = Table(
        title="Cost",
        columns=(
            *("method", "seeds", "spread", "used", "time"),
            *("pairs a second", "memory", "device-hours"),
        ),
        rows=tuple(map(_cost, methods)),
        note="Spread: the standard deviation of accuracy over seeds. Used: of the budget. Time and "
        "device-hours are those of one seed.",
    )
    return Section("Numbers", (found, costs))


def _gain(method: Method) -> tuple[Cell, ...]:
    return (
        str(method["method"]),
        str(method.get("state") or ""),
        _three(method.get("accuracy")),
        between(method.get("low"), method.get("high")),
        _three(method.get("margin")),
        between(method.get("margin_low"), method.get("margin_high")),
        *(_three(method.get(key)) for _, key in _NUMBERS),
        _three(method.get("win_rate")),
        between(method.get("win_low"), method.get("win_high")),
        share(method.get("broken")),
    )


def _cost(method: Method) -> tuple[Cell, ...]:
    return (
        str(method["method"]),
        "" if method.get("seeds") is None else str(method["seeds"]),
        _three((method.get("spread") or {}).get("accuracy")),
        number(method.get("budget_used")),
        duration(method.get("seconds")),
        number(method.get("pairs_per_second"), 3),
        size(method.get("peak_memory_bytes")),
        number(method.get("device_hours"), 3),
    )


def _three(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _verdicts(record: Mapping[str, Any]) -> Section | None:
    rows = tuple(
        (
            str(each.get("method") or ""),
            str(each.get("verdict") or ""),
            str(each.get("other") or ""),
            "" if each.get("difference") is None else f"{each['difference']:+.3f}",
            between(each.get("low"), each.get("high")),
        )
        for each in record.get("verdicts") or ()
    )
    if not rows:
        return None
    columns = ("method", "is", "against", "difference of accuracy", "95 %")
    return Section("Verdicts", (Table(title="", columns=columns, rows=rows, names=3),))


def _by_pairs(record: Mapping[str, Any]) -> Section | None:
    """Accuracy over the number of pairs, if the comparison was repeated."""
    points: dict[str, list[tuple[float, Method]]] = {}
    for part in record.get("curve") or ():
        for method in part.get("methods") or ():
            if method.get("accuracy") is not None:
                found = points.setdefault(str(method["method"]), [])
                found.append((float(part["pairs"]), method))
    if not points:
        return None
    curves = tuple(
        _over_pairs(name, hue, found) for hue, (name, found) in enumerate(points.items())
    )
    plot = LinePlot(
        title="Held-out accuracy by number of pairs",
        x_name="training pairs",
        y_name="share of pairs",
        curves=curves,
        zooms=False,
    )
    return Section("Few pairs and many", (Plots((plot,)),))


def _over_pairs(name: str, hue: int, found: Sequence[tuple[float, Method]]) -> Curve:
    ends = [_range(method.get("low"), method.get("high")) for _, method in found]
    band = tuple(each for each in ends if each is not None)
    return Curve(
        name=name,
        points=tuple((pairs, float(method["accuracy"])) for pairs, method in found),
        hue=hue,
        held_out=True,
        band=band if len(band) == len(found) else (),
        whole=len(found),
    )


def _failed(methods: Sequence[Method]) -> Section | None:
    said = tuple(
        Remark(f"{method['method']} failed: {method['error']}", "alarm")
        for method in methods
        if method.get("error")
    )
    return Section("What failed", (Remarks(said),)) if said else None
