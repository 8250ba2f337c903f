"""`orpo-ray export`: a trained model as a folder that other programs load."""

from typing import Annotated, Any, Literal

import typer

from orpo_ray.cli.options import Adapter, Json, NamedRun, Overrides

app = typer.Typer(add_completion=False)


@app.command("export")
def export(
    run: NamedRun,
    to: Annotated[str, typer.Option(metavar="FOLDER", help="The folder to write.")],
    overrides: Overrides = None,
    merge: Annotated[
        Literal["auto", "original", "dequantised", "none"],
        typer.Option(
            help="The base to merge into; auto measures both and keeps the nearer one. With none, "
            "the adapter alone is written."
        ),
    ] = "auto",
    adapter_only: Annotated[
        bool, typer.Option("--adapter-only", help="Write the adapter alone, as vLLM serves it.")
    ] = False,
    base_name: Annotated[
        str | None,
        typer.Option(metavar="OWNER/NAME", help="The adapter's base on the hub, if it is local."),
    ] = None,
    answers: Annotated[
        int, typer.Option(min=0, help="Greedy answers to compare, beside the held-out pairs.")
    ] = 8,
    adapter: Adapter = None,
    json: Json = False,
) -> dict[str, Any]:
    """Write a model that transformers, vLLM, llama.cpp and Ollama load, and compare it."""
    from orpo_ray.cli.console import Terminal, open_log
    from orpo_ray.runs.named import named_config

    settings = named_config(run, overrides or ())
    open_log()
    from orpo_ray import api

    exported = api.export(
        settings,
        to,
        merge=merge,
        adapter_only=adapter_only,
        base_name=base_name,
        answers=answers,
        adapter=adapter,
        console=Terminal(),
    )
    if not json:
        print(f"exported: {exported.folder} (merge: {exported.merge})")
    return exported.to_json()
