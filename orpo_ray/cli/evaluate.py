"""`orpo-ray evaluate`: compares the base with what a run made of it."""

from typing import Annotated, Any

import typer

from orpo_ray.cli.options import Adapter, Json, NamedRun, Overrides

app = typer.Typer(add_completion=False)


@app.command("evaluate")
def evaluate(
    run: NamedRun,
    overrides: Overrides = None,
    adapter: Adapter = None,
    base_only: Annotated[
        bool, typer.Option("--base-only", help="Judge the base alone, before training.")
    ] = False,
    samples: Annotated[int, typer.Option(min=0, help="Prompts to answer with both models.")] = 3,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Length of an answer in tokens.")
    ] = 128,
    json: Json = False,
) -> dict[str, Any]:
    """Compare base and trained model on held-out pairs: accuracy, margin, log-probs, answers."""
    from orpo_ray.cli.console import Terminal, open_log
    from orpo_ray.runs.named import named_config

    settings = named_config(run, overrides or ())
    open_log()
    from orpo_ray import api
    from orpo_ray.cli.results import print_result

    judged = api.evaluate(
        settings,
        adapter,
        samples=samples,
        max_new_tokens=max_new_tokens,
        base_only=base_only,
        console=Terminal(),
    )
    result = judged.to_json()
    if not json:
        print_result("evaluate", result)
    return result
