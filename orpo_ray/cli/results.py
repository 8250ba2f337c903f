"""A command's result for people, whether the work was done here or on a cluster."""

from typing import Any


def print_result(command: str, result: dict[str, Any]) -> None:
    """Print what train, tune, evaluate or prepare came to."""
    match command:
        case "train":
            print(f"adapter: {result['adapter']}")
        case "prepare":
            print(f"prepared: {result['artifact']}")
        case "tune":
            from orpo_ray.cli.search_table import print_search
            from orpo_ray.runs.search import search_of

            print_search(search_of(result))
        case "evaluate":
            from orpo_ray.cli.tables import print_answers, print_comparison

            print_comparison(result["metrics"])
            print_answers(result["samples"])
        case _:
            raise AssertionError(f"{command} has no result to print")
