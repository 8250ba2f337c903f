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
    curve: Annotated[
        str | None,
        typer.Option(metavar="N,N,...", help="Repeat it with these numbers of training pairs."),
    ] = None,
    verbose: Verbose = False,
    json: Json = False,
) -> dict[str, Any]:
    """Train methods on the same pairs with the same budget, and say who is better.

    The same command resumes an unfinished comparison.
    """
    from orpo_ray.cli.results import print_result
    from orpo_ray.errors import ConfigError
    from orpo_ray.runs.comparison_run import find_comparison

    if show is not None:
        if config is not None or curve is not None:
            raise ConfigError(
                "--show RUN takes no config and no --curve: it reads a comparison; leave them out"
            )
        result = find_comparison(show).to_json()
    elif config is None:
        raise ConfigError("name a CONFIG.yaml to compare with, or a comparison with --show RUN")
    else:
        result = _compare(config, overrides or [], _counts(curve), verbose)
    if not json:
        print_result("compare", result)
    return result


def _counts(written: str | None) -> list[int]:
    """The numbers of `250,1000,4000`."""
    from orpo_ray.errors import ConfigError

    words = [] if written is None else [word.strip() for word in written.split(",")]
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise ConfigError(f"--curve: write numbers of pairs such as 250,1000,4000, not {written}")
    return [int(word) for word in words]


def _compare(path: str, overrides: list[str], curve: list[int], verbose: bool) -> dict[str, Any]:
    from orpo_ray.cli.config_file import load
    from orpo_ray.cli.console import Terminal, open_log, prints_to_log

    settings = load(path, overrides)
    open_log(verbose)
    from orpo_ray import api
    from orpo_ray.runs.comparison_run import comparison_for

    with prints_to_log(verbose):
        console = Terminal(comparison_for(settings))
        return api.compare(settings, console, verbose, curve).to_json()
