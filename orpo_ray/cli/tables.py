"""Tables for people: two models side by side in numbers and in words."""

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

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


def print_answers(samples: list[dict[str, Any]], console: Console | None = None) -> None:
    """Prompts with both models' greedy answers."""
    console = console or Console()
    for sample in samples:
        console.print(Text(sample["prompt"], style="bold"))
        console.print(Text(f"  before: {sample['base']}", style="red"))
        console.print(Text(f"  after:  {sample['trained']}", style="green"))
