"""`orpo-ray prepare`: checks and tokenises preference pairs, and shows the result."""

import json as json_module
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orpo_ray.cli.options import Json
from orpo_ray.errors import ConfigError

if TYPE_CHECKING:
    from orpo_ray.config import RunConfig

app = typer.Typer(add_completion=False)


@app.command("prepare")
def prepare(
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="[CONFIG.yaml] [KEY=VALUE]...")
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Model or tokenizer; the same as model.base=DIR."),
    ] = None,
    train: Annotated[
        list[str] | None, typer.Option(metavar="FILE", help="Training pairs; may be repeated.")
    ] = None,
    evaluation: Annotated[
        list[str] | None, typer.Option("--eval", metavar="FILE", help="Evaluation pairs.")
    ] = None,
    storage: Annotated[
        str | None, typer.Option(metavar="DIR", help="Where the prepared pairs go.")
    ] = None,
    columns: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Columns of an unknown format: prompt=..,chosen=..,rejected=.. or "
            "prompt=..,completion=..,label=..",
        ),
    ] = None,
    show: Annotated[
        int, typer.Option(min=0, metavar="N", help="Print N pairs as they will be trained.")
    ] = 0,
    json: Json = False,
) -> dict[str, Any]:
    """Check and tokenise preference pairs.

    They come from a config, or from --tokenizer, --train and --storage.
    """
    from orpo_ray.cli.console import Terminal, open_log

    options = _as_overrides(tokenizer, train, evaluation, storage, columns)
    config = _resolve(settings or [], list(options))
    open_log()
    from orpo_ray import api
    from orpo_ray.cli.results import print_result
    from orpo_ray.runs.run import Run

    kept_in = Run(config).storage
    kept_in.check()
    artifact = api.prepare(config, Terminal())
    if show:
        from orpo_ray.cli.show_pairs import show_artifact
        from orpo_ray.models.tokenizer import load_tokenizer
        from orpo_ray.runs.console import SILENT

        show_artifact(artifact, load_tokenizer(config.model, SILENT.announce), show, to_stderr=json)
    result = {
        "artifact": kept_in.place_of(artifact.path),
        "quarantine": kept_in.place_of(artifact.path / "quarantine.jsonl"),
        **{
            name: value
            for name, value in artifact.summary.to_json().items()
            if name not in ("settings", "files")
        },
    }
    if not json:
        print_result("prepare", result)
    return result


def _as_overrides(
    tokenizer: str | None,
    train: Sequence[str] | None,
    evaluation: Sequence[str] | None,
    storage: str | None,
    columns: str | None,
) -> Iterator[str]:
    """The options as `key=value`. They mean the same with a config and without one."""
    values = {
        "model.base": tokenizer,
        "data.train": [{"source": file} for file in train or ()],
        "data.eval": [{"source": file} for file in evaluation or ()],
        "storage": storage,
        "data.columns": _parse_columns(columns) if columns is not None else None,
    }
    return (
        f"{key}={json_module.dumps(value)}"
        for key, value in values.items()
        if value not in (None, [])
    )


def _parse_columns(text: str) -> dict[str, str]:
    names = dict(part.split("=", 1) for part in text.split(",") if part.count("=") == 1)
    if len(names) != len(text.split(",")):
        raise ConfigError(
            f"--columns: {text!r} is not of the form prompt=..,chosen=..,rejected=.. "
            "(and system=.. if there is such a column)"
        )
    return {key.strip(): value.strip() for key, value in names.items()}


def _resolve(arguments: Sequence[str], options: Sequence[str]) -> "RunConfig":
    """The config of the file with its overrides; without a file, of the options alone."""
    from orpo_ray.cli.config_file import load
    from orpo_ray.config import RunConfig, build
    from orpo_ray.config.load import parse_override, set_dotted
    from orpo_ray.config.plain_yaml import Key

    if arguments and "=" not in arguments[0]:
        return load(arguments[0], [*options, *arguments[1:]])
    given = {option.partition("=")[0] for option in options}
    if not {"model.base", "data.train"} <= given:
        raise ConfigError(
            "prepare: name a CONFIG.yaml, or give --tokenizer DIR --train FILE --storage DIR"
        )
    tree: dict[str, Any] = {"name": "prepare"}
    places: dict[Key, str] = {(): "the command line"}
    for override in [*options, *arguments]:
        key, value = parse_override(override)
        set_dotted(tree, key, value)
        places[key] = f"override {override!r}"
    return build(RunConfig, tree, places)
