"""Prints the result of a command, from this machine or from a cluster."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orpo_ray.runs.run import Run

_LENGTH = ("training.max_steps=", "training.epochs=")


def print_result(command: str, result: dict[str, Any]) -> None:
    """Print the result of train, tune, evaluate or prepare."""
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
        case "evaluate":
            from rich.console import Console

            from orpo_ray.cli.tables import print_benchmarks, print_evaluation

            is_lm_eval = "models" in result
            (print_benchmarks if is_lm_eval else print_evaluation)(result, Console())
        case _:
            raise AssertionError(f"{command} has no result to print")


def print_next(run: Run, file: str, overrides: Sequence[str], steps: int) -> None:
    """Print the usual next commands. `file` has the config of the run, which trained `steps`."""
    print(f"next:    orpo-ray evaluate {shlex.join([file, *overrides])}")
    if not run.can_be_extended:
        return
    given = [override for override in overrides if not override.startswith(_LENGTH)]
    was_unset = any(override.startswith("training.epochs=") for override in overrides)
    has_epochs = run.config.training.epochs is not None or was_unset
    unset = ["training.epochs=null"] if has_epochs else []
    longer = shlex.join([file, *given, *unset, f"training.max_steps={2 * steps}"])
    print(f"         orpo-ray train {longer} --extend")
