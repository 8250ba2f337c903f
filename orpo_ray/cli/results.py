"""Prints the result of a command, from this machine or from a cluster."""

import shlex
from collections.abc import Sequence
from typing import Any

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

            from orpo_ray.cli.tables import print_evaluation

            print_evaluation(result, Console())
        case _:
            raise AssertionError(f"{command} has no result to print")


def print_next(config: str, overrides: Sequence[str], steps: int, has_epochs: bool) -> None:
    """Print the commands that usually follow a run. `has_epochs`: its config sets epochs."""
    given = [override for override in overrides if not override.startswith(_LENGTH)]
    same = shlex.join([config, *overrides])
    was_unset = any(override.startswith("training.epochs=") for override in overrides)
    unset = ["training.epochs=null"] if has_epochs or was_unset else []
    longer = shlex.join([config, *given, *unset, f"training.max_steps={2 * steps}"])
    print(f"next:    orpo-ray evaluate {same}")
    print(f"         orpo-ray train {longer} --extend")
