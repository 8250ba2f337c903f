"""`orpo-ray plan`: does a run fit, how long does it take, what does it cost, before one rents."""

from pathlib import Path
from typing import Annotated, Any

import typer

from orpo_ray.cli.options import Json, Overrides

app = typer.Typer(add_completion=False)

_DOES_NOT_FIT = 1


@app.command("plan")
def plan(
    context: typer.Context,
    config: Annotated[
        str | None, typer.Argument(metavar="[CONFIG.yaml]", help="The run to plan.")
    ] = None,
    overrides: Overrides = None,
    gpu: Annotated[str, typer.Option(help="GPUs such as l4,h100; all: rank all of them.")] = "all",
    count: Annotated[
        int | None, typer.Option(min=1, help="GPUs of a server; scale.workers, or one.")
    ] = None,
    nodes: Annotated[
        str, typer.Option(metavar="N or 1..N", help="Servers; with 1..N, how the run scales.")
    ] = "1",
    network: Annotated[
        str | None,
        typer.Option(help="Between servers: 1gbit (without it), 25gbit, infiniband-ndr."),
    ] = None,
    prices: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Your prices of a GPU for an hour.")
    ] = None,
    within: Annotated[
        float | None, typer.Option(metavar="HOURS", min=0, help="The most hours that you have.")
    ] = None,
    tuned: Annotated[
        bool | None,
        typer.Option(
            "--tuned/--pretrained", help="Whether the base is instruction-tuned, for the advice."
        ),
    ] = None,
    check: Annotated[
        Path | None,
        typer.Option(metavar="FILE.csv", help="Predict measured rows, and say the errors."),
    ] = None,
    calibrate: Annotated[
        str | None,
        typer.Option(metavar="RUN", help="Learn from a finished run how wrong plans are here."),
    ] = None,
    json: Json = False,
) -> dict[str, Any]:
    """Say whether a run fits into GPUs, how long it takes, and what it costs. Nothing is loaded.

    The exit code is 0 if it fits into one of the GPUs, 1 if not, 3 if it cannot be told.
    """
    from orpo_ray.errors import ConfigError

    if sum(named is not None for named in (config, check, calibrate)) != 1:
        raise ConfigError(
            "plan: name one thing: a config, --check with a file of measured rows, or --calibrate "
            "with a finished run"
        )
    if config is None:
        _refuse_options(context)
    if check is not None:
        return _check(check, json)
    if calibrate is not None:
        return _calibrate(calibrate, json)
    assert config is not None
    from orpo_ray import api
    from orpo_ray.cli.config_file import load
    from orpo_ray.cli.console import Terminal
    from orpo_ray.cli.plan_tables import print_estimate, print_scaling

    settings = load(config, overrides or ())
    first, last = _nodes(nodes)
    found = api.estimate(
        settings,
        gpu,
        count=count,
        nodes=first,
        network=network,
        prices=prices,
        within=within,
        is_tuned=tuned,
        console=Terminal(),
    )
    result = found.to_json()
    if last > first:
        result["scaling"] = api.scaling(found, last)
    if not json:
        print_estimate(found)
        if last > first:
            print_scaling(result["scaling"])
    return {**result, "exit_code": 0 if found.fits else _DOES_NOT_FIT}


def _refuse_options(context: typer.Context) -> None:
    """Raise ConfigError for an option of a plan beside --check or --calibrate, which read none."""
    from orpo_ray.errors import ConfigError

    for name in context.params.keys() - {"check", "calibrate", "json"}:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise ConfigError(f"plan: only the plan of a config reads --{name}; leave it out")


def _nodes(written: str) -> tuple[int, int]:
    """The first and the last number of servers of `4`, or of `1..64`."""
    from orpo_ray.errors import ConfigError

    first, dots, last = written.partition("..")
    ends = (first, last if dots else first)
    if not all(end.isdecimal() and int(end) > 0 for end in ends) or int(ends[0]) > int(ends[1]):
        raise ConfigError(
            f"--nodes: write a number such as 4, or a range such as 1..64, not {written}"
        )
    return int(ends[0]), int(ends[1])


def _check(file: Path, json: bool) -> dict[str, Any]:
    from orpo_ray.cli.plan_tables import print_check
    from orpo_ray.planner.check import check_file

    result = check_file(file)
    if not json:
        print_check(result)
    return result


def _calibrate(run: str, json: bool) -> dict[str, Any]:
    from orpo_ray import api
    from orpo_ray.runs.named import named_config

    learnt = api.calibrate(named_config(run, ()))
    if not json:
        for line in learnt["changes"]:
            print(line)
    return learnt
