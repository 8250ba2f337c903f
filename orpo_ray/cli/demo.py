"""`orpo-ray demo`: from base to adapter on a laptop CPU in under three minutes.

The base and the pairs are part of the package.
"""

import os
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from orpo_ray.cli.options import Json

app = typer.Typer(add_completion=False)


_FILES = (Path(__file__).parents[1] / "config" / "objectives").glob("[a-z]*.py")
_NAMES = "|".join(sorted(file.stem for file in _FILES if file.stem != "base"))
"""Taken from the names of files, so that `--help` loads no settings."""


def _known(objective: str) -> str:
    from orpo_ray.config.objectives import OBJECTIVES

    if objective not in OBJECTIVES:
        raise typer.BadParameter(f"{objective!r} is not one of {', '.join(OBJECTIVES)}")
    return objective


@app.command("demo")
def demo(
    objective: Annotated[
        str, typer.Option(metavar=_NAMES, callback=_known, help="The loss to train with.")
    ] = "orpo",
    storage: Annotated[str, typer.Option(help="Folder for the run.")] = "runs",
    json: Json = False,
) -> dict[str, Any]:
    """Align a tiny chat model on this machine's CPU, and show what changed.

    The same command resumes an interrupted demo.
    """
    started = time.monotonic()
    # Such a small model gains nothing from more threads. On a busy laptop they wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from orpo_ray.cli.console import Terminal, announce, open_log, prints_to_log
    from orpo_ray.cli.demo_run import demo_outcome, next_demo, print_demo

    open_log()
    config = next_demo(objective, storage)
    from orpo_ray import api
    from orpo_ray.cli.demo_run import judge_prompts
    from orpo_ray.cli.progress import ProgressLine
    from orpo_ray.runs.console import SILENT
    from orpo_ray.runs.run import Run

    run = Run(config)
    trained = run.look(SILENT)
    if trained is None:
        with prints_to_log(verbose=False):
            trained = api.train(config, Terminal(run, ProgressLine()))
    announce("evaluating base and adapter on questions that never occur in training")
    prompts = [prompt["prompt"] for prompt in judge_prompts()]
    with run.lock():  # another demo begins its own
        evaluation = api.evaluate(config, conversations=prompts, max_new_tokens=48, console=SILENT)
    outcome = demo_outcome(config, trained, evaluation)
    outcome["seconds"] = time.monotonic() - started
    if not json:
        print_demo(outcome, evaluation)
    return outcome
