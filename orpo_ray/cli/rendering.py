"""Options of the commands that write files for a scheduler or a cluster."""

from pathlib import Path
from typing import Annotated, Any

import typer

from orpo_ray.errors import ConfigError

NodeCount = Annotated[
    int, typer.Option("--nodes", min=1, help="Machines that the workers are spread over.")
]
GpusPerNode = Annotated[
    int | None, typer.Option(min=0, help="Default: as many as the workers of one machine need.")
]
CpusPerNode = Annotated[int, typer.Option(min=1, help="More of them prepare pairs sooner.")]
MemoryPerNode = Annotated[int, typer.Option(min=1, help="In GiB; every worker loads the base.")]
Out = Annotated[Path, typer.Option(metavar="DIR", help="Where the files go.")]


def write_files(files: dict[str, str], out: Path, json: bool) -> dict[str, Any]:
    """Write files into a folder, and print their paths. `files` holds texts by name.

    Raises ConfigError if a file cannot be written.
    """
    written = []
    for name, text in files.items():
        try:
            out.mkdir(parents=True, exist_ok=True)
            (out / name).write_text(text, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--out: {out / name} cannot be written: {error.strerror}") from error
        written.append(str(out / name))
    if not json:
        print("\n".join(written))
    return {"files": written}
