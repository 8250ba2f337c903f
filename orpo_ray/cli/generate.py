"""`orpo-ray generate`: a model's answers to the prompts of a file."""

from typing import Annotated, Any, Literal

import typer

from orpo_ray.cli.options import (
    Adapter,
    Json,
    MaxNewTokens,
    NamedRun,
    Overrides,
    Seed,
    Temperature,
    TopP,
)

app = typer.Typer(add_completion=False)


@app.command("generate")
def generate(
    run: NamedRun,
    prompts: Annotated[
        str,
        typer.Option(metavar="FILE", help="Rows with prompts, or text with one on each line."),
    ],
    out: Annotated[str, typer.Option(metavar="FILE", help="The file to write.")],
    overrides: Overrides = None,
    model: Annotated[
        Literal["trained", "base", "both"], typer.Option(help="Who answers.")
    ] = "trained",
    format: Annotated[
        Literal["jsonl", "alpaca-eval", "mt-bench", "openai"],
        typer.Option(help="The form of the file."),
    ] = "jsonl",
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    batch_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of a batch, padding and full answers included.")
    ] = 8192,
    adapter: Adapter = None,
    json: Json = False,
) -> dict[str, Any]:
    """Answer the prompts of a file. A command that was ended goes on where it was."""
    from orpo_ray.cli.console import Terminal, open_log
    from orpo_ray.runs.named import named_config

    settings = named_config(run, overrides or ())
    open_log()
    from orpo_ray import api

    written = api.generate(
        settings,
        prompts,
        out,
        model=model,
        format=format,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        batch_tokens=batch_tokens,
        adapter=adapter,
        console=Terminal(),
    )
    if not json:
        print(f"answers: {written.file}")
    return written.to_json()
