"""`orpo-ray doctor`: what would stop a run, found before it starts."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orpo_ray.cli.on_cluster import Address, Anyone, Token
from orpo_ray.cli.options import Json, Overrides

if TYPE_CHECKING:
    from orpo_ray.config import RunConfig
    from orpo_ray.doctor.facts import Asked
    from orpo_ray.jobs.job import Jobs, Submission

app = typer.Typer(add_completion=False)

_CONFIG = typer.Argument(metavar="[CONFIG.yaml]", help="Look for what this run would use.")
_HOSTS = typer.Option(
    "--hosts",
    metavar="HOSTS.yaml",
    help="Every server of a hosts.yaml, over SSH, before Ray runs there.",
)


@app.command("doctor")
def doctor(
    config: Annotated[str | None, _CONFIG] = None,
    overrides: Overrides = None,
    base: Annotated[
        str | None, typer.Option(help="A base, whose tokenizer and template are tried.")
    ] = None,
    storage: Annotated[
        str | None, typer.Option(metavar="PLACE", help="A folder or s3://bucket/folder to try.")
    ] = None,
    hosts: Annotated[Path | None, _HOSTS] = None,
    address: Address = None,
    token: Token = None,
    anyone: Anyone = False,
    json: Json = False,
) -> dict[str, Any]:
    """Look for what would stop a run, and say how to repair it. It changes nothing.

    It looks at this machine; at every server if RAY_ADDRESS, --address or --hosts names a cluster.
    The exit code is 3 if something would stop a run.
    """
    from orpo_ray.cli.doctor_screen import print_checkup
    from orpo_ray.errors import ConfigError, ResourceError

    if hosts is not None and address is not None:
        raise ConfigError("--hosts and --address both name a cluster; keep one of them")
    options = _options({"--base": base, "--storage": storage})
    settings = _settings(config, overrides or [], base, storage)
    asked = _asked(settings, base, storage, is_elsewhere=bool(hosts or address))
    if hosts is not None:
        result = _over_ssh(asked, hosts)
    elif address is not None or token is not None:
        result = _by_a_job(asked, settings, options, (address, token, anyone))
    else:
        result = _from_here(asked)
    if not json:
        print_checkup(result)
    return {**result, "exit_code": ResourceError.exit_code if result["stops"] else 0}


def _options(named: dict[str, str | None]) -> list[str]:
    """The words of the options that are given. Raises ConfigError for one without a value."""
    from orpo_ray.errors import ConfigError

    given = {name: value for name, value in named.items() if value is not None}
    if empty := next((name for name, value in given.items() if not value.strip()), None):
        raise ConfigError(f"{empty}: has no value; name one, or leave {empty} out")
    return [word for option in given.items() for word in option]


def _settings(
    config: str | None, overrides: list[str], base: str | None, storage: str | None
) -> "RunConfig | None":
    from orpo_ray.cli.config_file import load

    if config is None:
        return None
    named = {"model.base": base, "storage": storage}
    more = [f"{key}={value}" for key, value in named.items() if value is not None]
    return load(config, [*overrides, *more])


def _asked(
    settings: "RunConfig | None", base: str | None, storage: str | None, *, is_elsewhere: bool
) -> "Asked":
    """What to look at: what the config names, else what the options name.

    A relative storage is a folder of this machine. Raises ConfigError if other servers are asked.
    """
    from orpo_ray.config import ModelConfig, build, stage_configs
    from orpo_ray.doctor.facts import Asked
    from orpo_ray.jobs.package import refuse_relative_storage
    from orpo_ray.jobs.reach import LOOPBACK
    from orpo_ray.jobs.token import DEFAULT_FILE

    place = settings.storage if settings else _checked(storage)
    if not place and not is_elsewhere and "RAY_ADDRESS" not in os.environ:
        place = "runs"
    if place and is_elsewhere:
        refuse_relative_storage(place)
    named = build(ModelConfig, {"base": base}, {(): "--base"}) if base else None
    return Asked(
        storage=place,
        model=settings.model if settings else named,
        runs=tuple(stage_configs(settings) or [settings]) if settings else (),
        token_file=DEFAULT_FILE,
        dashboard=os.environ.get("RAY_API_SERVER_ADDRESS") or LOOPBACK,
    )


def _checked(storage: str | None) -> str:
    from orpo_ray.config.storage import checked_place
    from orpo_ray.errors import ConfigError

    try:
        return checked_place(storage) if storage else ""
    except ValueError as error:
        raise ConfigError(f"--storage: {error}") from error


def _from_here(asked: "Asked") -> dict[str, Any]:
    """This machine, or every server of the cluster of RAY_ADDRESS if that can be joined."""
    from orpo_ray.cli.console import announce, prints_to_log
    from orpo_ray.doctor.checkup import conclude
    from orpo_ray.doctor.findings import stops
    from orpo_ray.errors import ResourceError
    from orpo_ray.ray_runtime import joins_cluster, start_ray

    others = []
    if joins_cluster():
        from orpo_ray.doctor.cluster import ask_through_ray

        try:
            with prints_to_log(verbose=False):
                start_ray()
                return conclude(asked, ask_through_ray(asked))
        except ResourceError as error:
            fix = "orpo-ray cluster up HOSTS.yaml starts a cluster; unset RAY_ADDRESS to use none"
            others.append(stops("cluster", str(error), fix))
    from orpo_ray.doctor.cluster import ask_this_machine

    announce("looking at this machine, which takes about ten seconds")
    return conclude(asked, ask_this_machine(asked), others)


def _over_ssh(asked: "Asked", hosts: Path) -> dict[str, Any]:
    from orpo_ray.cli.console import announce
    from orpo_ray.doctor.checkup import conclude
    from orpo_ray.doctor.cluster import ask_over_ssh
    from orpo_ray.jobs.hosts import load_hosts
    from orpo_ray.jobs.ssh import ssh_to

    cluster = load_hosts(hosts)
    announce(f"looking at {len(cluster.addresses)} servers over SSH")
    found = ask_over_ssh(asked, cluster.addresses, cluster.environment, ssh_to(cluster).run)
    return conclude(asked, found)


def _by_a_job(
    asked: "Asked",
    settings: "RunConfig | None",
    options: list[str],
    cluster: tuple[str | None, Path | None, bool],
) -> dict[str, Any]:
    """Every server of a running cluster, asked by a job there, which is deleted afterwards."""
    from orpo_ray.cli.console import announce
    from orpo_ray.cli.on_cluster import jobs_of
    from orpo_ray.doctor.checkup import conclude
    from orpo_ray.doctor.findings import stops
    from orpo_ray.jobs.job import UnreachableError
    from orpo_ray.jobs.request import checkup

    try:
        with (
            checkup(settings, options, announce) as submission,
            jobs_of(None, *cluster) as jobs,
        ):
            return _followed(jobs, submission)
    except UnreachableError as error:
        fix = "orpo-ray cluster up HOSTS.yaml starts a cluster; --address names its dashboard"
        return conclude(asked, [], [stops("cluster", str(error), fix)])


def _followed(jobs: "Jobs", submission: "Submission") -> dict[str, Any]:
    """The result of the job. Raises JobError if it has none."""
    from orpo_ray.cli.follower import Follower
    from orpo_ray.cli.on_cluster import patience
    from orpo_ray.errors import JobError, RunError
    from orpo_ray.jobs.submit import submit_and_follow

    follower, run = Follower(), submission.run
    try:
        job = submit_and_follow(jobs, submission, follower, patience())
    except KeyboardInterrupt:
        jobs.stop(run)
        raise
    printed = jobs.printed(run)
    jobs.delete(run)
    result = follower.result or {}
    if "servers" not in result:
        why = result.get("error") or (printed or ["it printed nothing"])[-1]
        raise JobError(f"the cluster could not look: {why}", job.exit_code or RunError.exit_code)
    return result
