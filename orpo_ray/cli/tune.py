"""`orpo-ray tune`: searches settings of a run, or shows how far a search has come."""

from typing import Annotated, Any

import typer

from orpo_ray.cli.options import DryRun, Json, Overrides, Verbose

app = typer.Typer(add_completion=False)


@app.command("tune")
def tune(
    config: Annotated[str | None, typer.Argument(metavar="CONFIG.yaml")] = None,
    overrides: Overrides = None,
    show: Annotated[
        str | None,
        typer.Option(
            "--show", metavar="RUN", help="Print a search's table from its folder, and end."
        ),
    ] = None,
    dry_run: DryRun = False,
    verbose: Verbose = False,
    json: Json = False,
) -> dict[str, Any]:
    """Search lambda, learning rate or any other setting.

    The same command resumes an unfinished search.
    """
    from orpo_ray.cli.results import print_result
    from orpo_ray.cli.search_table import SearchTable, print_search
    from orpo_ray.errors import ConfigError
    from orpo_ray.runs.search_run import find_search

    if show is not None:
        if config is not None or dry_run:
            raise ConfigError(
                "--show RUN takes no config and no --dry-run: it reads a search; leave them out"
            )
        found = find_search(show)
        if not json:
            print_search(found)
        return found.to_json()
    if config is None:
        raise ConfigError("name a CONFIG.yaml to search with, or a search to print with --show RUN")
    if dry_run:
        return _plan(config, overrides or [])
    result = _search(config, overrides or [], verbose, SearchTable())
    if not json:
        print_result("tune", result)
    return result


def _search(path: str, overrides: list[str], verbose: bool, table: Any) -> dict[str, Any]:
    from orpo_ray.cli.config_file import load
    from orpo_ray.cli.console import Terminal, open_log, prints_to_log

    settings = load(path, overrides)
    open_log(verbose)
    from orpo_ray import api
    from orpo_ray.cli.progress import ProgressLine
    from orpo_ray.runs.search_run import search_for

    with prints_to_log(verbose), table:
        return api.tune(
            settings, Terminal(search_for(settings), ProgressLine(), table), verbose
        ).to_json()


def _plan(path: str, overrides: list[str]) -> dict[str, Any]:
    from orpo_ray.cli.config_file import load
    from orpo_ray.cli.console import Terminal, announce, open_log

    settings = load(path, overrides)
    open_log()
    from orpo_ray import api

    plan = api.plan_search(settings, Terminal())
    announce(
        f"{plan.trials} trials of {plan.trial.steps} steps, {plan.at_once} at once; nothing was "
        "started"
    )
    return plan.to_json()
