"""Tables for people: two models side by side in numbers and in words."""

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from orpo_ray.cli.progress import hours_minutes_seconds

_ROWS = (
    ("accuracy", "preference accuracy"),
    ("margin", "log-prob margin per token"),
    ("chosen_logp", "chosen log-prob per token"),
    ("rejected_logp", "rejected log-prob per token"),
    ("nll", "NLL of chosen answers"),
)


def print_comparison(
    metrics: dict[str, dict[str, dict[str, float]]], console: Console | None = None
) -> None:
    """Metrics by source of the base and the trained model; over all of them where there are
    several.
    """
    console = console or Console()
    for source, base in metrics["base"].items():
        if source == "all" and len(metrics["base"]) == 2:
            continue  # the only source says the same
        trained = metrics["trained"][source]
        table = Table(title=f"{source}: {int(base['pairs'])} pairs", title_justify="left")
        for column in ("", "base", "trained"):
            table.add_column(column, justify="right" if column else "left")
        for name, label in _ROWS:
            table.add_row(label, f"{base[name]:.3f}", f"{trained[name]:.3f}")
        console.print(table)


def print_summary(result: dict[str, Any], console: Console | None = None) -> None:
    """Show what a run made: before and after with intervals, in words, and at what cost."""
    console = console or Console()
    changes = result["changes"]
    if changes:
        title = "on held-out pairs (95 % intervals)"
        table = Table(title=title, title_justify="left")
        for column in ("", "before", "after", "difference"):
            table.add_column(column, justify="right" if column else "left")
        for name, label in _ROWS:
            change = changes[name]
            cells = [_with_interval(change[when], "") for when in ("before", "after")]
            table.add_row(label, *cells, _with_interval(change["difference"], "+"))
        console.print(table)
    for line in result["remarks"]:
        console.print(Text(line))
    console.print(Text(_cost(result)))
    console.print(Text(f"adapter: {result['adapter']}"), soft_wrap=True)


def _with_interval(mean: dict[str, float], sign: str) -> str:
    value, low, high = (f"{mean[name]:{sign}.3f}" for name in ("value", "low", "high"))
    return f"{value}\n{low} to {high}"


def _cost(result: dict[str, Any]) -> str:
    """Steps, time, memory, and which step's weights the adapter has."""
    told = [f"{result['steps']} steps"]
    if result["seconds"] is not None:
        told.append(f"{hours_minutes_seconds(result['seconds'])} of training")
    if result["pairs_per_second"] is not None:
        told.append(f"{result['pairs_per_second']:.1f} pairs a second")
    if result["peak_memory_bytes"] is not None:
        told.append(f"at most {result['peak_memory_bytes'] / 1e9:.1f} GB a worker")
    if result["adapter_step"] is not None:
        told.append(f"the adapter is that of step {result['adapter_step']}")
    return ", ".join(told)


def print_answers(samples: list[dict[str, Any]], console: Console | None = None) -> None:
    """Prompts with both models' greedy answers."""
    console = console or Console()
    for sample in samples:
        console.print(Text(sample["prompt"], style="bold"))
        console.print(Text(f"  before: {sample['base']}", style="red"))
        console.print(Text(f"  after:  {sample['trained']}", style="green"))
