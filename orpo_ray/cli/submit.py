"""`orpo-ray submit`: run a command on a cluster, and follow it from here."""

from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from orpo_ray.cli.on_cluster import Address, Anyone, Hosts, Token
from orpo_ray.cli.options import ConfigFile, Json

if TYPE_CHECKING:
    from orpo_ray.cli.follower import Follower
    from orpo_ray.jobs.job import Job, Submission

app = typer.Typer(add_completion=False)

_OURS = (1, 2, 3, 4)
"""Exit codes of orpo-ray. Others come from outside, such as from a kill."""
What = Annotated[
    Literal["train", "tune", "compare", "prepare", "evaluate"], typer.Argument(metavar="COMMAND")
]


@app.command("submit")
def submit(
    command: What,
    config: ConfigFile,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]... [-- OPTION...]", help="Options after -- are the command's own."
        ),
    ] = None,
    hosts: Hosts = None,
    address: Address = None,
    token: Token = None,
    env: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE", help="A variable of the job; no secrets. May be repeated."
        ),
    ] = None,
    ship_code: Annotated[
        bool, typer.Option("--ship-code", help="Send this orpo-ray, in place of the cluster's.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Check and pack, say what would be sent, and connect to nothing."
        ),
    ] = False,
    detach: Annotated[
        bool, typer.Option("--detach", help="End after the submission; the run continues.")
    ] = False,
    anyone: Anyone = False,
    json: Json = False,
) -> dict[str, Any]:
    """Run train, tune, compare, prepare or evaluate on a cluster.

    The same command follows a run that is at work, and resumes one that was interrupted.
    """
    from orpo_ray.cli.config_file import load
    from orpo_ray.cli.console import announce
    from orpo_ray.cli.follower import Follower
    from orpo_ray.cli.on_cluster import as_typed, jobs_of, patience, where
    from orpo_ray.cli.results import print_result
    from orpo_ray.jobs.request import parse_environment, request
    from orpo_ray.jobs.submit import submit as submit_job
    from orpo_ray.jobs.submit import submit_and_follow

    words = overrides or []
    first = next((number for number, word in enumerate(words) if word.startswith("-")), len(words))
    settings = load(config, words[:first])
    environment = parse_environment(env or [])
    cluster = (hosts, address, token, anyone)
    follower, patient, at_work = Follower(), patience(), Event()
    asked = request(
        command,
        words[first:],
        settings,
        environment,
        ship_code=ship_code,
        announce=announce,
    )
    with asked as submission:
        if dry_run:
            return _plan(submission, where(*cluster), json)
        try:
            with jobs_of(*cluster, patient.ask) as jobs:
                if detach:
                    is_new = submit_job(jobs, submission, patient)
                    return {"run": submission.run, "state": "submitted" if is_new else "at work"}
                job = submit_and_follow(jobs, submission, follower, patient, at_work.set)
        except KeyboardInterrupt:
            raise _interrupted(submission.run, as_typed(*cluster), at_work.is_set()) from None
        finally:
            follower.end_line()
    result = _conclude(job, follower, as_typed(*cluster))
    if result and not json and "--dry-run" not in words:
        print_result(command, result)
    return result


def _plan(submission: "Submission", cluster: str, json: bool) -> dict[str, Any]:
    """Print what would be submitted, and return it."""
    from orpo_ray.cli.console import announce
    from orpo_ray.jobs.job import job_id
    from orpo_ray.jobs.package import sizes

    job, files = job_id(submission.run), sizes(Path(submission.environment["working_dir"]))
    code = submission.environment.get("py_modules", [])
    if not json:
        print(f"job {job} on {cluster}: {submission.entrypoint}")
        print("\n".join(f"{size:12,} bytes  {name}" for name, size in files.items()))
        print("".join(f"and the code in {folder}\n" for folder in code), end="")
    announce("nothing was submitted, and no connection to the cluster was made")
    described = {
        "run": submission.run,
        "job": job,
        "cluster": cluster,
        "command": submission.entrypoint,
    }
    return {**described, "files": files, "code": code}


def _interrupted(run: str, options: str, at_work: bool) -> Exception:
    """The error that says what becomes of a run after the user stopped waiting for it."""
    from orpo_ray.errors import StoppedError

    if not at_work:
        return StoppedError(
            f"interrupted before the cluster confirmed run {run}; `orpo-ray status{options}` shows "
            "the runs that it has"
        )
    return StoppedError(
        f"no longer following, but run {run} continues: `orpo-ray logs --follow {run}{options}` "
        f"shows it, `orpo-ray stop {run}{options}` ends it with a checkpoint"
    )


def _conclude(job: "Job", follower: "Follower", options: str) -> dict[str, Any]:
    """The command's own result; empty if it has none.

    Raises the error that ended it, with the exit code of the command.
    """
    from orpo_ray.errors import JobError, RunError, StoppedError
    from orpo_ray.jobs.job import last_line

    result = follower.result or {}
    error = result.get("error")
    if job.state == "stopped":
        raise StoppedError(f"run {job.run}: {error or 'stopped; the same command resumes it'}")
    if job.exit_code is None:
        raise RunError(
            f"run {job.run} was lost: {last_line(job.message)}; the same command resumes it"
        )
    if job.exit_code in _OURS:
        raise JobError(
            f"run {job.run}: {error or f'see `orpo-ray logs {job.run}{options}`'}", job.exit_code
        )
    if job.exit_code:
        raise RunError(
            f"run {job.run} was ended from outside (exit code {job.exit_code}); `orpo-ray logs "
            f"{job.run}{options}` shows how far it came, and the same command resumes it"
        )
    return result
