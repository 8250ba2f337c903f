"""`orpo-ray logs`: what a submitted run prints."""

from typing import Annotated, Any

import typer

from orpo_ray.cli.on_cluster import Address, Anyone, Hosts, Run, Token
from orpo_ray.cli.options import Json

app = typer.Typer(add_completion=False)


@app.command("logs")
def logs(
    run: Run,
    follow: Annotated[bool, typer.Option("--follow", help="Continue until the run ends.")] = False,
    hosts: Hosts = None,
    address: Address = None,
    token: Token = None,
    anyone: Anyone = False,
    json: Json = False,
) -> dict[str, Any]:
    """Print what a run has printed on the cluster; with --follow, until it ends."""
    from orpo_ray.cli.on_cluster import jobs_of, known, patience
    from orpo_ray.jobs.submit import follow as follow_job

    lines: list[str] = []
    show = lines.append if json else print
    with jobs_of(hosts, address, token, anyone) as jobs:
        job = known(jobs.find(run), run)
        if follow:
            job = follow_job(jobs, run, show, patience())
        else:
            for line in jobs.printed(run):
                show(line)
    return {"run": run, "state": job.state, "lines": lines}
