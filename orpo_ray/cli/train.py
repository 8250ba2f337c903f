"""`orpo-ray train`: trains a run to its end, or resumes it."""

from typing import Annotated, Any

import typer

from orpo_ray.cli.options import ConfigFile, DryRun, Json, Overrides, Verbose
from orpo_ray.errors import ConfigError

app = typer.Typer(add_completion=False)


@app.command("train")
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    extend: Annotated[
        bool, typer.Option("--extend", help="Continue a finished run with more steps.")
    ] = False,
    verbose: Verbose = False,
    json: Json = False,
) -> dict[str, Any]:
    """Train an adapter on preference pairs; the same command resumes an unfinished run."""
    if dry_run and extend:
        raise ConfigError("--extend: cannot be used together with --dry-run; leave one of them out")
    from orpo_ray.cli.config_file import load
    from orpo_ray.cli.console import Terminal, announce, open_log, prints_to_log

    settings = load(config, overrides or ())
    open_log(verbose)
    from orpo_ray import api
    from orpo_ray.cli.progress import ProgressLine
    from orpo_ray.cli.results import print_next, print_result
    from orpo_ray.runs.run import Run

    if dry_run:
        plan = api.plan(settings, Terminal())
        announce(f"the plan has {plan.steps} steps; nothing was started")
        return plan.to_json()
    run = Run(settings)
    with prints_to_log(verbose):
        result = api.train(settings, Terminal(run, ProgressLine()), verbose, extend).to_json()
    if not json:
        print_result("train", result)
        print_next(run, config, overrides or [], result["steps"])
    return result
