"""The page of a search: which trials were tried, given up and best, and what that cost."""

import math
from dataclasses import dataclass
from typing import Any

from orpo_ray.config.search import METRICS
from orpo_ray.config.space import Domain, Options, Span, parse_domain
from orpo_ray.report import answers
from orpo_ray.report.importance import FEWEST, importances
from orpo_ray.report.page import (
    Answers,
    Axis,
    Block,
    Cell,
    Curve,
    Dot,
    DotPlot,
    Facts,
    Figure,
    Figures,
    Interval,
    IntervalPlot,
    LinePlot,
    Look,
    Mark,
    Page,
    ParallelPlot,
    Plot,
    Plots,
    Remark,
    Remarks,
    Section,
    Strand,
    Tab,
    Table,
)
from orpo_ray.report.words import counted, plain, share
from orpo_ray.runs.search import Search, Trial, rungs

_STATES = {"running": "running", "finished": "finished", "stopped": "given up", "failed": "failed"}
_COLUMNS = ("eval/accuracy", "eval/margin", "eval/nll")
_LOOKS: dict[str, Look] = {
    "running": "small",
    "finished": "plain",
    "stopped": "small",
    "failed": "cross",
}


@dataclass(frozen=True)
class _Seen:
    """A search, and what all its plots need."""

    search: Search
    domains: dict[str, Domain]

    @property
    def metric(self) -> str:
        return self.search.metric

    @property
    def best(self) -> int | None:
        return self.search.outcome.best if self.search.outcome else None

    @property
    def ends(self) -> tuple[float, float]:
        """The worst and the best number of all trials: the ends of the colours."""
        numbers = map(self.number, self.search.trials)
        found = [number for number in numbers if number is not None]
        if not found:
            return 0.0, 1.0
        low, high = min(found), max(found)
        return (low, high) if METRICS.get(self.metric) != "min" else (high, low)

    def number(self, trial: Trial) -> float | None:
        """What a trial is ranked by, at its last evaluation."""
        found = trial.last.get(self.metric)
        return found if found is not None and math.isfinite(found) else None

    def tone(self, trial: Trial) -> float | None:
        found, (worst, best) = self.number(trial), self.ends
        if found is None:
            return None
        return 1.0 if worst == best else (found - worst) / (best - worst)

    def look(self, trial: Trial) -> Look:
        return "best" if trial.number == self.best else _LOOKS[trial.state]

    @property
    def tones(self) -> tuple[str, float, float]:
        return (_bare(self.metric), *self.ends)


def page_of_search(search: Search, place: str) -> Page:
    """The page of a search that has begun."""
    seen = _Seen(search, _domains(search))
    sections = [_outcome(seen), _map(seen), _course(seen)]
    if search.outcome and search.outcome.answers:
        asked = answers.of_search(search.outcome.answers)
        sections.append(Section("Answers", (Answers(asked),)))
    sections += [_trials(seen), _settings(seen, place)]
    return Page(
        title=search.name.removesuffix("/search"),
        kind="search",
        subtitle=f"{counted(len(search.trials), 'trial')} of {', '.join(seen.domains)}",
        tabs=(Tab("search", tuple(sections)),),
        state=search.status,
    )


def _domains(search: Search) -> dict[str, Domain]:
    return {name: parse_domain(text) for name, text in search.settings.get("space", {}).items()}


def _bare(name: str) -> str:
    return name.removeprefix("eval/").replace("_", " ").replace("logp", "log-prob")


# --- what came out --------------------------------------------------------------------------------


def _outcome(seen: _Seen) -> Section:
    search = seen.search
    blocks: list[Block] = [Figures(tuple(_figures(seen)))]
    if search.outcome:
        blocks.append(Remarks(tuple(Remark(line) for line in search.outcome.reading)))
    failed = [trial for trial in search.trials if trial.error]
    if failed:
        said = (Remark(f"Trial {trial.number} failed: {trial.error}", "alarm") for trial in failed)
        blocks.append(Remarks(tuple(said)))
    note = "" if search.outcome else "The search has not ended: this is what it found so far."
    return Section("Outcome", tuple(blocks), note)


def _figures(seen: _Seen) -> list[Figure]:
    search = seen.search
    states = [trial.state for trial in search.trials]
    trained = sum(trial.steps for trial in search.trials)
    length = max((trial.total_steps for trial in search.trials), default=0)
    whole = length * max(search.trial_count, len(search.trials))
    found = [
        Figure(
            "trials",
            str(len(states)),
            f"{states.count('finished')} finished, {states.count('stopped')} given up, "
            f"{states.count('failed')} failed",
        )
    ]
    if whole:
        saved = 1 - trained / whole
        told_of = f"{trained:,} of {whole:,} steps were trained"
        name = "cost saved" if search.outcome else "not trained yet, or saved"
        found.append(Figure(name, share(saved), told_of))
    best = next((trial for trial in search.trials if trial.number == seen.best), None)
    if best is not None:
        of = f"trial {best.number}, of {search.pairs} held-out pairs"
        number = seen.number(best)
        found.append(Figure(f"best {_bare(seen.metric)}", f"{number or 0:.3f}", of))
        found += [Figure(_short(name), plain(value), "best") for name, value in best.values.items()]
    return found


def _short(name: str) -> str:
    return name.rpartition(".")[2].replace("_", " ")


# --- plots ----------------------------------------------------------------------------------------


def _map(seen: _Seen) -> Section:
    """Where the good values lie."""
    shown: list[Plot] = []
    if len(seen.domains) >= 2:
        shown.append(_plane(seen))
    if len(seen.domains) >= 1:
        shown.append(_parallel(seen))
    shown += _importances(seen)
    if front := _front(seen):
        shown.append(front)
    return Section("Where good values lie", (Plots(tuple(shown)),))


def _axis(seen: _Seen, name: str) -> Axis:
    """The range of a setting. A given value may be none of its options, and stands behind them."""
    domain = seen.domains[name]
    if isinstance(domain, Options):
        tried = (trial.values[name] for trial in seen.search.trials)
        options = dict.fromkeys(plain(value) for value in (*domain.values, *tried))
        return Axis(name=_short(name), options=tuple(options))
    return Axis(name=_short(name), log=domain.log, ends=(domain.low, domain.high))


def _coordinate(domain: Domain, value: Any) -> float | str:
    if isinstance(domain, Options) or not isinstance(value, int | float):
        return plain(value)
    return float(value)


def _plane(seen: _Seen) -> DotPlot:
    """The first two settings as a map, coloured by what trials are ranked by."""
    (x, of_x), (y, of_y) = list(seen.domains.items())[:2]
    dots = tuple(
        Dot(
            name=_name(seen, trial),
            x=_coordinate(of_x, trial.values[x]),
            y=_coordinate(of_y, trial.values[y]),
            tone=seen.tone(trial),
            look=seen.look(trial),
            told=_told(seen, trial),
        )
        for trial in seen.search.trials
        if _can_be_drawn(of_x, trial.values[x]) and _can_be_drawn(of_y, trial.values[y])
    )
    return DotPlot(
        title=f"{_short(x)} by {_short(y)}",
        x=_axis(seen, x),
        y=_axis(seen, y),
        dots=dots,
        tones=seen.tones,
        note="Small: given up or running. Ringed: the best.",
    )


def _can_be_drawn(domain: Domain, value: Any) -> bool:
    """Whether a given value has a place on the axis: there is no zero on a log scale."""
    return not (isinstance(domain, Span) and domain.log and value <= 0)


def _name(seen: _Seen, trial: Trial) -> str:
    mark = ", the given one" if trial.number == 0 and seen.search.settings.get("try_given") else ""
    return f"trial {trial.number}{mark}"


def _told(seen: _Seen, trial: Trial) -> tuple[tuple[str, str], ...]:
    number = seen.number(trial)
    return (
        (_bare(seen.metric), "" if number is None else f"{number:.3f}"),
        ("state", _STATES[trial.state]),
        ("steps", f"{trial.steps} of {trial.total_steps}"),
    )


def _parallel(seen: _Seen) -> ParallelPlot:
    shown = [name for name in _COLUMNS if any(trial.last.get(name) for trial in seen.search.trials)]
    strands = tuple(
        Strand(
            name=_name(seen, trial),
            values=(
                *(
                    _coordinate(of, trial.values[name])
                    if _can_be_drawn(of, trial.values[name])
                    else None
                    for name, of in seen.domains.items()
                ),
                *(trial.last.get(name) for name in shown),
            ),
            tone=seen.tone(trial),
            is_best=trial.number == seen.best,
        )
        for trial in seen.search.trials
        if trial.last
    )
    axes = (
        *(_axis(seen, name) for name in seen.domains),
        *(Axis(name=_bare(name)) for name in shown),
    )
    note = "Each line is a trial at its last evaluation. Thick: the best."
    return ParallelPlot(title="All trials", axes=axes, strands=strands, tones=seen.tones, note=note)


def _importances(seen: _Seen) -> list[IntervalPlot]:
    sign = -1 if METRICS.get(seen.metric) == "min" else 1
    numbers = [(trial, seen.number(trial)) for trial in seen.search.trials]
    ended = [
        (trial.values, sign * number)
        for trial, number in numbers
        if trial.state in ("finished", "stopped") and number is not None
    ]
    found = importances(seen.domains, ended)
    if not found:
        return []
    rows = tuple(Interval(name=_short(name), value=value) for name, value in found.items())
    few = "; with few trials the shares are rough" if len(ended) < 3 * FEWEST else ""
    note = f"What sets the best third of {len(ended)} trials apart, by PED-ANOVA{few}."
    return [
        IntervalPlot(
            title="Importance of each setting", x_name="share", rows=rows, from_zero=True, note=note
        )
    ]


def _front(seen: _Seen) -> DotPlot | None:
    """Accuracy against likelihood, with the front of trials that no other beats in both."""
    x, y = "eval/nll", "eval/accuracy"
    dots = tuple(
        Dot(
            name=_name(seen, trial),
            x=trial.last[x],
            y=trial.last[y],
            tone=seen.tone(trial),
            look=seen.look(trial),
            told=_told(seen, trial),
        )
        for trial in seen.search.trials
        if trial.last.get(x) is not None and trial.last.get(y) is not None
    )
    if not dots:
        return None
    points = seen.search.outcome.pareto if seen.search.outcome else []
    path = tuple(sorted((float(point["nll"]), float(point["accuracy"])) for point in points))
    return DotPlot(
        title="Accuracy and likelihood",
        x=Axis(name="NLL of chosen answers, lower is likelier"),
        y=Axis(name="accuracy"),
        dots=dots,
        path=path,
        tones=seen.tones,
        note="The dashed line is the Pareto front: no trial beats those on it in both.",
    )


def _course(seen: _Seen) -> Section:
    """Every trial over its steps, with the rungs at which it may be given up."""
    settings, length = (
        seen.search.settings,
        max((trial.total_steps for trial in seen.search.trials), default=0),
    )
    marks: tuple[Mark, ...] = ()
    if settings.get("scheduler") == "asha" and length:
        shares = rungs(settings["grace"], settings["eta"])
        marks = tuple(Mark(part * length, f"rung {n}") for n, part in enumerate(shares, start=1))
    found = (seen.metric, *(name for name in _COLUMNS[:2] if name != seen.metric))
    shown = tuple(
        LinePlot(
            title=f"{_bare(name)} of each trial".capitalize(),
            x_name="step",
            curves=_curves(seen, name),
            marks=marks,
            tones=seen.tones,
            note="Thick: trained to the end.",
        )
        for name in found
    )
    given_up = [
        (f"trial {trial.number}", f"given up at step {int(trial.last['step'])}")
        for trial in seen.search.trials
        if trial.state == "stopped" and trial.last
    ]
    blocks: list[Block] = [Plots(tuple(plot for plot in shown if plot.curves))]
    if given_up:
        blocks.append(Facts(tuple(given_up), "Who was given up"))
    return Section("Course", tuple(blocks))


def _curves(seen: _Seen, name: str) -> tuple[Curve, ...]:
    found = [
        (
            trial,
            tuple(
                (float(each["step"]), each[name])
                for each in trial.evaluations
                if each.get(name) is not None
            ),
        )
        for trial in seen.search.trials
    ]
    return tuple(
        Curve(
            name=_name(seen, trial) + (", best" if trial.number == seen.best else ""),
            points=points,
            tone=seen.tone(trial) or 0.0,
            held_out=trial.state == "finished",
            whole=len(points),
        )
        for trial, points in found
        if points
    )


# --- tables ---------------------------------------------------------------------------------------


def _trials(seen: _Seen) -> Section:
    rows = tuple(_row(seen, trial) for trial in seen.search.trials)
    columns = ("trial", "state", *map(_short, seen.domains), "step", *map(_bare, _COLUMNS))
    return Section("Trials", (Table(title="", columns=columns, rows=rows, names=2),))


def _row(seen: _Seen, trial: Trial) -> tuple[Cell, ...]:
    state = _STATES[trial.state] + (", best" if trial.number == seen.best else "")
    values = (plain(trial.values[name]) for name in seen.domains)
    return (
        str(trial.number),
        state,
        *values,
        f"{trial.steps} of {trial.total_steps}",
        *(trial.last.get(name) for name in _COLUMNS),
    )


def _settings(seen: _Seen, place: str) -> Section:
    search = seen.search
    told = [(name, plain(value)) for name, value in search.settings.items() if name != "space"]
    ranges = [(name, plain(text)) for name, text in search.settings.get("space", {}).items()]
    found = [("folder", place)]
    if search.outcome:
        found += [("best config", search.outcome.config), ("best adapter", search.outcome.adapter)]
    facts = (Facts(tuple(ranges), "Ranges"), Facts(tuple(told), "Settings"), Facts(tuple(found)))
    return Section("What was searched", tuple(block for block in facts if block.rows))
