"""The page of a run, of its stages, or of several runs side by side."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from orpo_ray.report import answers, told
from orpo_ray.report.alarms import Signs, alarms
from orpo_ray.report.content import RunContent
from orpo_ray.report.curves import notes, plots, wilson
from orpo_ray.report.page import (
    Answers,
    Block,
    Cell,
    Curve,
    Figure,
    Figures,
    Interval,
    IntervalPlot,
    LinePlot,
    Page,
    Plot,
    Plots,
    Remark,
    Remarks,
    Section,
    Tab,
    Table,
)
from orpo_ray.report.thin import MOST, spaced
from orpo_ray.report.words import between, counted, duration, number, size
from orpo_ray.runs.files import ENDED_BY
from orpo_ray.runs.scores import PairScores
from orpo_ray.runs.stages import have_same_held_out
from orpo_ray.runs.summary import METRIC_LABELS, compared

_POINTS = 3 * MOST // 2
"""Points of each measure on one page, however many runs are on it, so that the file stays small."""
_MOST_ROWS = 500
_COLUMNS = ("accuracy", "margin", "chosen_logp", "rejected_logp", "log_odds_ratio", "nll")
_SIDE_BY_SIDE = (
    ("accuracy", "Preference accuracy", "share of pairs"),
    ("margin", "Log-prob margin", "nats a token"),
    ("chosen_logp", "Chosen log-prob", "nats a token"),
    ("nll", "NLL of chosen answers", "nats a token"),
)


def page_of_run(run: RunContent, leaves: int = 1) -> Page:
    """The page of one run. A run in stages has a tab for each of them, and one for the whole.

    `leaves`: among how many runs or stages the page has to divide its points.
    """
    most = min(MOST, _POINTS // max(leaves, len(run.stages)))
    tabs = [
        Tab(_stage_name(number, stage), _sections(stage, most)) for number, stage in _numbered(run)
    ]
    if run.stages:
        tabs = [Tab("whole run", _whole(run)), *tabs]
    return Page(
        title=run.name,
        kind="run",
        subtitle=_subtitle(run),
        tabs=tuple(tabs) or (Tab(run.name, _sections(run, most)),),
        state=run.state,
    )


def page_of_runs(runs: Sequence[RunContent]) -> Page:
    """Several runs on one page: side by side first, then each on a tab of its own."""
    parts = _parts(runs)
    alone = [(run, page_of_run(run, len(parts))) for run in runs]
    tabs = [
        replace(tab, name=run.name if len(page.tabs) == 1 else f"{run.name}: {tab.name}")
        for run, page in alone
        for tab in page.tabs
    ]
    return Page(
        title=", ".join(run.name for run in runs),
        kind="runs",
        subtitle=f"{counted(len(runs), 'run')} side by side",
        tabs=(Tab("side by side", tuple(side_by_side(parts))), *tabs),
    )


def _parts(runs: Sequence[RunContent]) -> list[RunContent]:
    """The runs that have curves: of a run in stages each stage."""
    found = []
    for run in runs:
        stages = [
            replace(stage, name=f"{run.name}: {_stage_name(number, stage)}")
            for number, stage in _numbered(run)
        ]
        found += stages or [run]
    return found


def _numbered(run: RunContent) -> list[tuple[int, RunContent]]:
    return list(enumerate(run.stages, start=1))


def _stage_name(number: int, stage: RunContent) -> str:
    return f"{number}: {stage.config.objective.kind}"


def _subtitle(run: RunContent) -> str:
    kinds = [stage.config.objective.kind for stage in run.stages] or [run.config.objective.kind]
    return f"{' then '.join(kinds)} on {run.config.model.base}"


def _sections(run: RunContent, most: int) -> tuple[Section, ...]:
    """All sections of one run, or of one stage."""
    found = [_outcome(run), _curves(run, most), _answers(run), told.what_it_is(run)]
    found += [told.of_pairs(run.facts), _numbers(run)]
    return tuple(section for section in found if section is not None)


# --- what came out --------------------------------------------------------------------------------


def _outcome(run: RunContent) -> Section:
    blocks: list[Block] = [Figures(tuple(_figures(run)))]
    if said := _remarks(run, _signs(run)):
        blocks.append(Remarks(tuple(said)))
    blocks += [table for table in (_before_after(run), told.planned(run)) if table is not None]
    note = "" if run.result else f"The run is {run.state}: this is what its files told."
    return Section("Outcome", tuple(blocks), note)


def _remarks(run: RunContent, signs: Signs) -> list[Remark]:
    """What the signs tell, and what else the result tells."""
    found = [*_why_it_ended(run), *alarms(signs)]
    known = {remark.text for remark in found}
    told_of = run.result.remarks if run.result else ()
    return found + [Remark(line) for line in told_of if line not in known]


def _why_it_ended(run: RunContent) -> list[Remark]:
    """Why a run has no result and is not at work."""
    why = run.facts.get(ENDED_BY)
    if not why or run.state in ("finished", "running"):
        return []
    return [Remark(f"It ended before its last step: {why}", "alarm")]


def _signs(run: RunContent) -> Signs:
    first, last = _ends(run)
    objective = run.config.objective
    is_final = run.samples or run.evaluation is None
    broken = answers.broken_share(run.samples) if is_final else _broken_in(run.evaluation or {})
    return Signs(
        changes=compared(first, last),
        pairs=run.held_out or 0,
        preference_shares=tuple(value for _, value in run.values("train/preference_share")),
        more_preference=objective.more_preference if objective.has_likelihood else "",
        is_to_prefer=objective.needs_rejected,
        broken=broken,
        accuracy=_of_adapter(run, "eval/accuracy"),
        steps=run.steps,
    )


def _broken_in(evaluation: dict[str, Any]) -> float | None:
    """The share of broken answers of the trained model in an evaluation."""
    return answers.broken_share(
        {"step": 0, "answer": sample["trained"], "ended": not sample.get("trained_is_cut")}
        for sample in evaluation.get("samples", ())
        if sample.get("trained") is not None
    )


def _signs_of_whole(run: RunContent) -> Signs:
    """What can be seen of all stages together: where the last one ended, by where they began."""
    begun, ended = _begun(run), run.stages[-1]
    found = compared(_ends(begun)[0], _ends(ended)[1])
    return replace(_signs(ended), changes=found, steps=sum(stage.steps for stage in run.stages))


def _begun(run: RunContent) -> RunContent:
    """The stage that the last one is compared with: the first, if both have one held-out set."""
    first, last = run.stages[0], run.stages[-1]
    return first if have_same_held_out(first.config, last.config) else last


def _ends(run: RunContent) -> tuple[PairScores | None, PairScores | None]:
    """The scores of the first evaluation, and those of the adapter or of the latest one."""
    steps = sorted(run.scores)
    if len(steps) < 2:
        return None, None
    of_adapter = run.result.adapter_step if run.result else None
    return run.scores[steps[0]], run.scores.get(of_adapter or steps[-1], run.scores[steps[-1]])


def _last(run: RunContent, name: str) -> float | None:
    """A number as it was last reported."""
    found = run.values(name)
    return found[-1][1] if found else None


def _of_adapter(run: RunContent, name: str) -> float | None:
    """A held-out number of the adapter; the last one until there is an adapter."""
    found = run.result.metrics.get(name) if run.result else None
    return _last(run, name) if found is None else found


def _first(run: RunContent, name: str) -> float | None:
    found = run.values(name)
    return found[0][1] if found else None


def _figures(run: RunContent) -> list[Figure]:
    """The numbers of the first minute."""
    result, found = run.result, _held_out_figures(run, run)
    seconds = sum(value for _, value in run.values("train/seconds"))
    found.append(Figure("training", duration(seconds), counted(run.steps, "step")))
    speed = result.pairs_per_second if result else _last(run, "train/pairs_per_second")
    if speed:
        found.append(Figure("speed", number(speed, 3), "pairs a second"))
    peak = run.facts.get("peak_memory_bytes") or _last(run, "train/memory_bytes")
    if peak:
        found.append(Figure("memory", size(peak), "at most, one worker"))
    return found


def _held_out_figures(begun: RunContent, run: RunContent) -> list[Figure]:
    """The held-out numbers of a run's adapter, beside the first ones of `begun`, or of itself."""
    found = []
    for name, unit in (("accuracy", ""), ("margin", "nats a token"), ("nll", "nats a token")):
        before, last = _first(begun, f"eval/{name}"), _of_adapter(run, f"eval/{name}")
        if before is None or last is None:
            continue
        notes = [f"{before:.3f} before", unit]
        if name == "accuracy" and run.held_out:
            low, high = wilson(last, run.held_out)
            notes.append(f"95 % {low:.3f} to {high:.3f}")
        label = f"held-out {name.replace('nll', 'NLL')}"
        found.append(Figure(label, f"{last:.3f}", "; ".join(filter(None, notes))))
    return found


def _before_after(run: RunContent) -> Table | None:
    """Means before and after with their intervals, of the result or of what is there so far."""
    if run.result and run.result.changes:
        changes = run.result.changes
    else:
        changes = {name: asdict(change) for name, change in compared(*_ends(run)).items()}
    if not changes:
        return None
    rows = []
    for name, label in METRIC_LABELS.items():
        cells: list[Cell] = [label]
        for when in ("before", "after", "difference"):
            mean = changes[name][when]
            sign = "+" if when == "difference" else ""
            cells += [f"{mean['value']:{sign}.3f}", between(mean["low"], mean["high"])]
        rows.append(tuple(cells))
    pairs = run.result.eval_pairs if run.result else run.held_out
    return Table(
        title=f"Before and after, on {counted(pairs or 0, 'held-out pair')}",
        columns=("", "before", "95 %", "after", "95 %", "difference", "95 %"),
        rows=tuple(rows),
    )


# --- the other sections ---------------------------------------------------------------------------


def _curves(run: RunContent, most: int) -> Section | None:
    found = plots(run, most)
    return Section("Curves", (Plots(found),), notes(run, found)) if found else None


def _answers(run: RunContent) -> Section | None:
    blocks: list[Block] = []
    if over_steps := answers.over_steps(run.samples):
        blocks.append(Answers(over_steps))
    if run.evaluation and (judged := answers.of_evaluation(run.evaluation)):
        blocks.append(Answers(judged))
    return Section("Answers", tuple(blocks), _about_answers(run)) if blocks else None


def _about_answers(run: RunContent) -> str:
    evaluations = len({row["step"] for row in run.samples})
    if evaluations <= answers.MOST_STEPS:
        return "Each is greedy."
    return (
        f"Each is greedy. {answers.MOST_STEPS} of {evaluations} evaluations are shown; "
        "samples.jsonl has all."
    )


def _numbers(run: RunContent) -> Section | None:
    """The evaluations as a table: all, or so many of a long run as one may read."""
    shown = [
        name
        for name in _COLUMNS
        if any(record.get(f"eval/{name}") is not None for record in run.evaluations)
    ]
    if not shown:
        return None
    rows = tuple(
        (record["step"], *(record.get(f"eval/{name}") for name in shown))
        for record in spaced(run.evaluations, _MOST_ROWS)
    )
    columns = ("step", *(name.replace("_", " ").replace("logp", "log-prob") for name in shown))
    left = len(run.evaluations) - len(rows)
    note = f"{left:,} of {len(run.evaluations):,} evaluations are left out here." if left else ""
    return Section("Evaluations", (Table(title="", columns=columns, rows=rows),), note)


def _whole(run: RunContent) -> tuple[Section, ...]:
    """What all stages did together."""
    named = [replace(stage, name=_stage_name(number, stage)) for number, stage in _numbered(run)]
    blocks: list[Block] = [Figures(tuple(_figures_of_whole(run)))]
    if said := _remarks(run, _signs_of_whole(run)):
        blocks.append(Remarks(tuple(said)))
    if run.result and (table := _before_after(run)) is not None:
        blocks.append(table)
    judged = _answers(run)
    found = [Section("Outcome", tuple(blocks)), *side_by_side(named)]
    return (*found, *([judged] if judged else []))


def _figures_of_whole(run: RunContent) -> list[Figure]:
    """What the stages cost together, and where the last one ended."""
    last = _held_out_figures(_begun(run), run.stages[-1])
    seconds = sum(value for stage in run.stages for _, value in stage.values("train/seconds"))
    steps = sum(stage.steps for stage in run.stages)
    begun, all_stages = len(run.stages), counted(len(run.config.stages), "stage")
    some = f"{begun} of " if begun < len(run.config.stages) else ""
    told_of = f"{counted(steps, 'step')} in {some}{all_stages}"
    return [*last, Figure("training", duration(seconds), told_of)]


# --- side by side ---------------------------------------------------------------------------------


def side_by_side(runs: Sequence[RunContent]) -> list[Section]:
    """Held-out curves of several runs in one plot for each measure, and their last numbers."""
    overlaid = [_overlaid(runs, *measure) for measure in _SIDE_BY_SIDE]
    shown: list[Plot] = [plot for plot in overlaid if plot.curves]
    shown += _last_accuracy(runs)
    sections = [Section("Held-out curves", (Plots(tuple(shown)),))] if shown else []
    columns = (
        "",
        "steps",
        *(name.replace("_", " ").replace("logp", "log-prob") for name in _COLUMNS),
    )
    rows = tuple(
        (run.name, float(run.steps), *(_last(run, f"eval/{name}") for name in _COLUMNS))
        for run in runs
    )
    table = Table(title="Last evaluation", columns=(*columns, "time"), rows=_with_time(rows, runs))
    return [*sections, Section("Last numbers", (table,))]


def _with_time(
    rows: Sequence[tuple[Cell, ...]], runs: Sequence[RunContent]
) -> tuple[tuple[Cell, ...], ...]:
    times = [sum(value for _, value in run.values("train/seconds")) for run in runs]
    return tuple((*row, duration(spent)) for row, spent in zip(rows, times, strict=True))


def _overlaid(runs: Sequence[RunContent], metric: str, title: str, unit: str) -> LinePlot:
    found = [(run.name, tuple(run.values(f"eval/{metric}"))) for run in runs]
    curves = tuple(
        Curve(name=name, points=points, hue=hue, held_out=True, whole=len(points))
        for hue, (name, points) in enumerate(found)
        if points
    )
    return LinePlot(title=title, x_name="step", y_name=unit, curves=curves)


def _last_accuracy(runs: Sequence[RunContent]) -> list[IntervalPlot]:
    rows = []
    for run in runs:
        accuracy, count = _last(run, "eval/accuracy"), run.held_out
        if accuracy is not None and count:
            low, high = wilson(accuracy, count)
            rows.append(Interval(name=run.name, value=accuracy, low=low, high=high))
    if len(rows) < 2:
        return []
    title, note = "Last held-out accuracy", "Bars are 95 % intervals by Wilson."
    return [IntervalPlot(title=title, x_name="share of pairs", rows=tuple(rows), note=note)]
