"""`orpo-ray status`: what runs on a cluster."""

import time
from typing import TYPE_CHECKING, Any

import typer

from orpo_ray.cli.on_cluster import Address, Anyone, AnyRun, Hosts, Token
from orpo_ray.cli.options import Json

if TYPE_CHECKING:
    from orpo_ray.jobs.job import Job

app = typer.Typer(add_completion=False)


@app.command("status")
def status(
    run: AnyRun = None,
    hosts: Hosts = None,
    address: Address = None,
    token: Token = None,
    anyone: Anyone = False,
    json: Json = False,
) -> dict[str, Any]:
    """Show the runs that were submitted to a cluster, and their states."""
    from orpo_ray.cli.on_cluster import jobs_of, known

    with jobs_of(hosts, address, token, anyone) as jobs:
        found = jobs.all() if run is None else [known(jobs.find(run), run)]
    if not json:
        for job in found:
            print(_line(job, time.time()))
        if not found:
            print("nothing was submitted to this cluster")
    return {"runs": [_as_json(job) for job in found]}


def _line(job: "Job", now: float) -> str:
    from orpo_ray.cli.progress import hours_minutes_seconds

    code = f" (exit code {job.exit_code})" if job.exit_code else ""
    ago = hours_minutes_seconds(max(0.0, now - job.submitted_at))
    command = job.metadata.get("command", "unknown command")
    return f"{job.run}: {command}, {job.state}{code}, submitted {ago} ago"


def _as_json(job: "Job") -> dict[str, Any]:
    return {
        "run": job.run,
        "command": job.metadata.get("command"),
        "state": job.state,
        "exit_code": job.exit_code,
        "submitted_at": job.submitted_at,
    }
