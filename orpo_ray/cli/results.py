"""Prints the result of a command, from this machine or from a cluster."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orpo_ray.runs.run import Run

_LENGTH = ("training.max_steps=", "training.epochs=")


def print_result(command: str, result: dict[str, Any]) -> None:
    """Print the result of train, tune, compare, evaluate, judge or prepare."""
    match command:
        case "train":
            from orpo_ray.cli.tables import print_summary

            print_summary(result)
        case "prepare":
            print(f"prepared: {result['artifact']}")
        case "tune":
            from orpo_ray.cli.search_table import print_search
            from orpo_ray.runs.search import search_of

            print_search(search_of(result))
        case "compare":
            from orpo_ray.cli.compare_table import print_comparison
            from orpo_ray.runs.comparison import comparison_of

            print_comparison(comparison_of(result))
        case "evaluate":
            from rich.console import Console

            from orpo_ray.cli.tables import print_benchmarks, print_evaluation

            is_lm_eval = "models" in result
            (print_benchmarks if is_lm_eval else print_evaluation)(result, Console())
        case "judge":
            _print_win_rate(result)
        case _:
            raise AssertionError(f"{command} has no result to print")


def _print_win_rate(found: dict[str, Any]) -> None:
    print(f"A: {found['a']}, {found['a_length']:,.0f} characters an answer")
    print(f"B: {found['b']}, {found['b_length']:,.0f} characters an answer")
    low, high = 100 * found["low"], 100 * found["high"]
    print(f"A wins {100 * found['win_rate']:.1f} % [{low:.1f}, {high:.1f}], by {found['judge']}")
    low, high = (100 * found[f"length_controlled_{end}"] for end in ("low", "high"))
    controlled = 100 * found["length_controlled"]
    print(f"       {controlled:.1f} % [{low:.1f}, {high:.1f}] at equal length of the answers")
    counts = f"{found['wins']} wins, {found['losses']} losses, {found['ties']} ties"
    print(f"rows: {found['rows']}, of which {counts}, {found['unreadable']} without a verdict")
    print(
        f"ties: {found['identical']} with identical answers, {found['disagreements']} on which the "
        "two orders disagree"
    )
    print(f"verdicts: {found['file']}, after {found['requests']} requests")


def print_next(run: Run, file: str, overrides: Sequence[str], steps: int) -> None:
    """Print the usual next commands. `file` has the config of the run, which trained `steps`."""
    named = shlex.join([file, *overrides])
    print(f"next:    orpo-ray evaluate {named}")
    print(f"         orpo-ray chat {named}")
    if not run.can_be_extended:
        return
    given = [override for override in overrides if not override.startswith(_LENGTH)]
    was_unset = any(override.startswith("training.epochs=") for override in overrides)
    has_epochs = run.config.training.epochs is not None or was_unset
    unset = ["training.epochs=null"] if has_epochs else []
    longer = shlex.join([file, *given, *unset, f"training.max_steps={2 * steps}"])
    print(f"         orpo-ray train {longer} --extend")
