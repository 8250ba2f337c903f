"""`orpo-ray submit`: run a command on a cluster, and follow it from here."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from orpo_ray.cli.on_cluster import Address, Anyone, Hosts, Json, Token

if TYPE_CHECKING:
    from orpo_ray.cli.follower import Follower
    from orpo_ray.jobs.job import Job

app = typer.Typer(add_completion=False)

_OURS = (1, 2, 3, 4)
"""Exit codes that a command gives itself."""
What = Annotated[Literal["train", "tune", "prepare", "evaluate"], typer.Argument(metavar="COMMAND")]


@app.command("submit")
def submit(
    command: What,
    config: Annotated[str, typer.Argument(metavar="CONFIG.yaml")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]... [-- OPTION...]", help="Options behind -- are the command's own."),
    ] = None,
    hosts: Hosts = None,
    address: Address = None,
    token: Token = None,
    env: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="A variable of the job; no secrets. May be repeated.")
    ] = None,
    ship_code: Annotated[
        bool, typer.Option("--ship-code", help="Send this orpo-ray along, instead of theirs.")
    ] = False,
    detach: Annotated[bool, typer.Option("--detach", help="End once it is submitted; it goes on there.")] = False,
    anyone: Anyone = False,
    json: Json = False,
) -> dict[str, Any]:
    """Run train, tune, prepare or evaluate on a cluster; the same command attaches to it, or goes on with it."""
    from orpo_ray.cli.console import announce
    from orpo_ray.cli.follower import Follower
    from orpo_ray.cli.on_cluster import jobs_of, patience
    from orpo_ray.cli.results import print_result
    from orpo_ray.config import load_config
    from orpo_ray.errors import StoppedError
    from orpo_ray.jobs.request import parse_environment, request
    from orpo_ray.jobs.submit import submit as submit_job
    from orpo_ray.jobs.submit import submit_and_follow

    words = overrides or []
    first = next((number for number, word in enumerate(words) if word.startswith("-")), len(words))
    settings = load_config(config, words[:first])
    environment = parse_environment(env or [])
    follower, patient = Follower(), patience()
    with request(command, words[first:], settings, environment, ship_code, announce) as submission:
        try:
            with jobs_of(hosts, address, token, anyone, patient.ask) as jobs:
                if detach:
                    is_new = submit_job(jobs, submission, patient)
                    return {"run": submission.run, "state": "submitted" if is_new else "at work"}
                job = submit_and_follow(jobs, submission, follower, patient)
        except KeyboardInterrupt:
            raise StoppedError(
                f"no longer following; what was submitted goes on: `orpo-ray logs --follow {submission.run}` shows it, "
                f"`orpo-ray stop {submission.run}` ends it with a checkpoint"
            ) from None
        finally:
            follower.end_line()
    result = _conclude(job, follower)
    if result and not json and "--dry-run" not in words:
        print_result(command, result)
    return result


def _conclude(job: "Job", follower: "Follower") -> dict[str, Any]:
    """The command's own result; empty if it has none. Raises what ended it, with the command's own exit code."""
    from orpo_ray.errors import JobError, RunError, StoppedError
    from orpo_ray.jobs.job import last_line

    result = follower.result or {}
    told = result.get("error")
    if job.state == "stopped":
        raise StoppedError(f"run {job.run}: {told or 'stopped; the same command goes on'}")
    if job.exit_code is None:
        raise RunError(f"run {job.run} was lost: {last_line(job.message)}; the same command goes on")
    if job.exit_code in _OURS:
        raise JobError(f"run {job.run}: {told or f'see `orpo-ray logs {job.run}`'}", job.exit_code)
    if job.exit_code:
        raise RunError(
            f"run {job.run} was ended from outside (exit code {job.exit_code}); `orpo-ray logs {job.run}` shows how "
            "far it came, and the same command goes on"
        )
    return result
