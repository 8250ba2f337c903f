"""`orpo-ray config`: the full settings of a YAML, the schema, and configs of other projects."""

import json as json_module
from typing import Annotated, Any

import typer

from orpo_ray.cli.options import ConfigFile, Json, Overrides

app = typer.Typer(
    add_completion=False,
    help="Show a resolved config or the JSON Schema, or translate a config of another project.",
)


@app.command("show")
def show(
    config: ConfigFile,
    overrides: Overrides = None,
    json: Json = False,
) -> dict[str, Any]:
    """Print every setting of a run, defaults and overrides included."""
    import yaml

    from orpo_ray.cli.config_file import load
    from orpo_ray.config import dump

    settings = dump(load(config, overrides or ()))
    if not json:
        print(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True), end="")
    return settings


@app.command("schema")
def schema(
    json: Annotated[bool, typer.Option("--json", help="The schema is JSON in any case.")] = False,
) -> dict[str, Any]:
    """Print the JSON Schema of a config, for editors that complete and check YAML."""
    from orpo_ray.config.schema import schema as schema_of_a_file

    described = schema_of_a_file()
    if not json:
        print(json_module.dumps(described, indent=2))
    return described


@app.command("from")
def from_other(
    file: Annotated[str, typer.Argument(metavar="FILE")],
    json: Json = False,
) -> dict[str, Any]:
    """Print a config of TRL, LLaMA-Factory or Axolotl as one of ours; comments say what differs."""
    from orpo_ray.config.foreign.file import translated
    from orpo_ray.config.foreign.written import as_yaml, tree_of
    from orpo_ray.storage import file_at

    draft = translated(file_at(file))
    if not json:
        print(as_yaml(draft, file), end="")
    return {"project": draft.project, "config": tree_of(draft), "no_counterpart": draft.lacking}
