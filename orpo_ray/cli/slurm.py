"""`orpo-ray slurm`: runs as jobs of Slurm."""

from pathlib import Path
from typing import Annotated, Any

import typer

from orpo_ray.cli.options import ConfigFile, Json, Overrides
from orpo_ray.cli.rendering import (
    CpusPerNode,
    GpusPerNode,
    MemoryPerNode,
    NodeCount,
    Out,
    write_files,
)

app = typer.Typer(add_completion=False, help="Runs as jobs of Slurm.")


@app.callback()
def _group() -> None:
    """With this function Typer keeps `render` as a command, though it is the only one."""


@app.command("render")
def render(
    config: ConfigFile,
    overrides: Overrides = None,
    nodes: NodeCount = 1,
    gpus_per_node: GpusPerNode = None,
    cpus_per_node: CpusPerNode = 8,
    memory_per_node: MemoryPerNode = 64,
    time: Annotated[
        str, typer.Option(help="Time limit; after it the job is queued again and resumes.")
    ] = "24:00:00",
    partition: Annotated[str | None, typer.Option(help="Default: the site's.")] = None,
    out: Out = Path(),
    json: Json = False,
) -> dict[str, Any]:
    """Write the file that sbatch reads to train CONFIG."""
    from orpo_ray.cli.config_file import load
    from orpo_ray.config.storage import is_url
    from orpo_ray.jobs.nodes import nodes_for
    from orpo_ray.jobs.secrets import refuse_secrets_of_overrides
    from orpo_ray.jobs.slurm import Request, sbatch_file

    settings = load(config, overrides or ())
    asked = nodes_for(settings.scale, nodes, gpus_per_node, cpus_per_node, memory_per_node)
    refuse_secrets_of_overrides(overrides or ())
    train = [
        "orpo-ray",
        "train",
        config if is_url(config) else str(Path(config).absolute()),
        *(overrides or ()),
    ]
    return write_files(
        sbatch_file(settings, train, Request(asked, time, partition), Path.cwd()), out, json
    )
