"""`orpo-ray compare`: methods on the same pairs and the same budget."""

from typing import Annotated, Any

import typer

from orpo_ray.cli.options import Json, Overrides, Verbose

app = typer.Typer(add_completion=False)


@app.command("compare")
def compare(
    config: Annotated[str | None, typer.Argument(metavar="CONFIG.yaml")] = None,
    overrides: Overrides = None,
    show: Annotated[
        str | None,
        typer.Option("--show", metavar="RUN", help="Print a comparison's table, and end."),
    ] = None,
    verbose: Verbose = False,
    json: Json = False,
) -> dict[str, Any]:
    """Train several methods on the same pairs with the same budget, and compare what they reach.

    The same command resumes an unfinished comparison.
    """
    from orpo_ray.cli.compare_table import print_comparison
    from orpo_ray.errors import ConfigError
    from orpo_ray.runs.comparison_run import find_comparison

    if show is not None:
        if config is not None:
            raise ConfigError("--show RUN takes no config: it reads a comparison; leave one out")
        found = find_comparison(show)
    elif config is None:
        raise ConfigError("name a CONFIG.yaml to compare with, or a comparison with --show RUN")
    else:
        found = _compare(config, overrides or [], verbose)
    if not json:
        print_comparison(found)
    return found.to_json()


def _compare(path: str, overrides: list[str], verbose: bool) -> Any:
    from orpo_ray.cli.config_file import load
    from orpo_ray.cli.console import Terminal, open_log, prints_to_log

    settings = load(path, overrides)
    open_log(verbose)
    from orpo_ray import api
    from orpo_ray.runs.comparison_run import comparison_for

    with prints_to_log(verbose):
        return api.compare(settings, Terminal(comparison_for(settings)), verbose)
