"""`orpo-ray stop`: end a submitted run with a checkpoint."""

from typing import Any

import typer

from orpo_ray.cli.on_cluster import Address, Anyone, Hosts, Run, Token
from orpo_ray.cli.options import Json

app = typer.Typer(add_completion=False)


@app.command("stop")
def stop(
    run: Run,
    hosts: Hosts = None,
    address: Address = None,
    token: Token = None,
    anyone: Anyone = False,
    json: Json = False,
) -> dict[str, Any]:
    """Make a run save a checkpoint and end; the same submit command resumes it."""
    from orpo_ray.cli.on_cluster import jobs_of, known, patience
    from orpo_ray.jobs.submit import stop as stop_job

    with jobs_of(hosts, address, token, anyone) as jobs:
        job = known(stop_job(jobs, run, patience()), run)
    if not json:
        print(f"{run}: {job.state}")
    return {"run": run, "state": job.state}
