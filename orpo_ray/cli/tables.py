"""Tables that compare two models, in numbers and in answers."""

import math
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from orpo_ray.cli.progress import hours_minutes_seconds
from orpo_ray.runs.summary import METRIC_LABELS


def print_evaluation(result: dict[str, Any], console: Console) -> None:
    """Print the result of `evaluate`: of two models, or of a base that is judged alone."""
    pairs = int(result["metrics"]["base"]["all"]["pairs"])
    print_comparison(result["metrics"], console)
    print_answers(result["samples"], console)
    if means := result.get("base"):  # absent in a result of an older version
        print_means(means, pairs, console)
    print_changes(result["changes"], result["remarks"], pairs, console)


def print_benchmarks(result: dict[str, Any], console: Console) -> None:
    """Print what lm-evaluation-harness found: each metric with its standard error."""
    metrics, settings = result["metrics"], result["settings"]
    rows = "all rows" if settings["limit"] is None else f"at most {settings['limit']} rows a task"
    asked = "as a chat" if settings["chat_template"] else "as plain text"
    told = f"lm-eval {settings['versions']['lm_eval']}: {rows}, asked {asked}"
    console.print(Text(told), soft_wrap=True)
    table = Table()
    for column in ("", "", *metrics):
        table.add_column(column, justify="right" if column else "left")
    first = next(iter(metrics.values()))
    for task, names in first.items():
        for name in names:
            cells = [_with_stderr(by_task[task][name]) for by_task in metrics.values()]
            table.add_row(task, name.removesuffix(",none"), *cells)
    console.print(table)


def _with_stderr(number: dict[str, float | None]) -> str:
    """A value and its standard error, if there are any."""
    if number["value"] is None:
        return ""
    error = "" if number["stderr"] is None else f" ± {number['stderr']:.3f}"
    return f"{number['value']:.3f}{error}"


def print_comparison(
    metrics: dict[str, dict[str, dict[str, float]]], console: Console | None = None
) -> None:
    """Print metrics by source, with a column for each model.

    `print_changes` and `print_means` print the figures of all pairs, with intervals.
    """
    console = console or Console()
    sources = [source for source in metrics["base"] if source != "all"]
    if len(sources) < 2:
        return
    for source in sources:
        pairs = int(metrics["base"][source]["pairs"])
        table = Table(title=f"{source}: {pairs} pairs", title_justify="left")
        for column in ("", *metrics):
            table.add_column(column, justify="right" if column else "left")
        for name, label in METRIC_LABELS.items():
            numbers = (by_source[source].get(name, math.nan) for by_source in metrics.values())
            table.add_row(label, *("" if math.isnan(one) else f"{one:.3f}" for one in numbers))
        console.print(table)


def print_summary(result: dict[str, Any], console: Console | None = None) -> None:
    """Print the result of a run: before and after with intervals, remarks, and the cost."""
    console = console or Console()
    print_changes(result["changes"], result["remarks"], result["eval_pairs"], console)
    console.print(Text(_cost(result)))
    console.print(Text(f"adapter: {result['adapter']}"), soft_wrap=True)
    if result.get("report"):
        console.print(Text(f"report:  {result['report']}"), soft_wrap=True)


def print_changes(
    changes: dict[str, Any], remarks: Sequence[str], pairs: int | None, console: Console
) -> None:
    """Print means before and after with their 95 % intervals, and the remarks on them."""
    if changes:
        table = Table(title=f"{pairs} held-out pairs (95 % intervals)", title_justify="left")
        for column in ("", "before", "after", "difference"):
            table.add_column(column, justify="right" if column else "left")
        for name, label in METRIC_LABELS.items():
            change = changes[name]
            cells = [_with_interval(change[when], "") for when in ("before", "after")]
            table.add_row(label, *cells, _with_interval(change["difference"], "+"))
        console.print(table)
    for line in remarks:
        console.print(Text(line))


def print_means(means: dict[str, Any], pairs: int, console: Console) -> None:
    """Print the means of a base that is judged alone, with their 95 % intervals."""
    table = Table(title=f"{pairs} held-out pairs (95 % intervals)", title_justify="left")
    for column in ("", "base"):
        table.add_column(column, justify="right" if column else "left")
    for name, label in METRIC_LABELS.items():
        table.add_row(label, _with_interval(means[name], ""))
    console.print(table)


def _with_interval(mean: dict[str, float], sign: str) -> str:
    """A mean with its interval; nothing for one that the answers do not have."""
    if math.isnan(mean["value"]):
        return ""
    value, low, high = (f"{mean[name]:{sign}.3f}" for name in ("value", "low", "high"))
    return f"{value}\n{low} to {high}"


def _cost(result: dict[str, Any]) -> str:
    """Steps, time, memory, and the step of the adapter."""
    parts = [f"{result['steps']} steps"]
    if result["seconds"] is not None:
        parts.append(f"{hours_minutes_seconds(result['seconds'])} of training")
    if result["pairs_per_second"] is not None:
        parts.append(f"{result['pairs_per_second']:.1f} pairs a second")
    if result["peak_memory_bytes"] is not None:
        parts.append(f"at most {result['peak_memory_bytes'] / 1e9:.1f} GB a worker")
    if result["adapter_step"] is not None:
        stage = " of the last stage" if result.get("stages") else ""
        parts.append(f"the adapter is that of step {result['adapter_step']}{stage}")
    return ", ".join(parts)


def print_answers(samples: list[dict[str, Any]], console: Console | None = None) -> None:
    """Print prompts with the models' greedy answers."""
    console = console or Console()
    for sample in samples:
        console.print(Text(sample["prompt"], style="bold"))
        if sample["trained"] is None:
            console.print(Text(f"  base: {_answer(sample, 'base')}"))
            continue
        console.print(Text(f"  before: {_answer(sample, 'base')}", style="red"))
        console.print(Text(f"  after:  {_answer(sample, 'trained')}", style="green"))


def _answer(sample: dict[str, Any], who: str) -> str:
    return f"{sample[who]} [cut]" if sample[f"{who}_is_cut"] else str(sample[who])
