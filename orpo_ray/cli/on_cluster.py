"""Options and connections that the commands for a cluster share."""

import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from orpo_ray.jobs.job import Job, Jobs
    from orpo_ray.jobs.ray_jobs import RayJobs
    from orpo_ray.jobs.submit import Patience

    Connect = Callable[[], RayJobs]


def _named(run: str | None) -> str | None:
    if run is not None and not run.strip("/:. "):
        raise typer.BadParameter("must be the name of a run")
    return run


Run = Annotated[str, typer.Argument(metavar="RUN", callback=_named)]
AnyRun = Annotated[
    str | None,
    typer.Argument(metavar="[RUN]", help="Its name; all runs if not given.", callback=_named),
]
Hosts = Annotated[
    Path | None,
    typer.Option("--hosts", metavar="HOSTS.yaml", help="The cluster of a hosts.yaml, over SSH."),
]
Address = Annotated[
    str | None,
    typer.Option(
        "--address",
        metavar="URL",
        help="URL of the cluster's dashboard; default: http://127.0.0.1:8265.",
    ),
]
Token = Annotated[
    Path | None,
    typer.Option(
        "--token",
        metavar="FILE",
        help="File with the cluster's token; default: ~/.ray/orpo-ray.token.",
    ),
]
Anyone = Annotated[
    bool,
    typer.Option(
        "--anyone-may-run-code",
        help="Use a cluster without a token; all who reach it can run code there.",
    ),
]


def _once(connect: "Connect") -> "RayJobs":
    return connect()


@contextmanager
def jobs_of(
    hosts: Path | None,
    address: str | None,
    token: Path | None,
    anyone: bool,
    ask: "Callable[[Connect], RayJobs]" = _once,
) -> Iterator["Jobs"]:
    """The jobs of the cluster that these options name.

    `ask` makes the connection. It may try again while the cluster does not answer.
    """
    from orpo_ray.cli.console import announce
    from orpo_ray.jobs.reach import is_loopback, way_to

    with way_to(hosts, address, token, anyone) as way:
        from orpo_ray.jobs.ray_jobs import RayJobs, check_address

        url = check_address(way.address)

        def before_token() -> None:
            if url.startswith("http://") and not is_loopback(url):
                advice = "use --hosts or a tunnel, if the network is not yours alone"
                announce(f"the token is sent to {url} unencrypted; {advice}")

        yield ask(lambda: RayJobs(url, way.token, way.connect, before_token, needs_no_token=anyone))


def where(hosts: Path | None, address: str | None, token: Path | None, anyone: bool) -> str:
    """The name of the cluster that these options name. No connection is made."""
    from orpo_ray.jobs.reach import way_to

    with way_to(hosts, address, token, anyone) as way:
        from orpo_ray.jobs.ray_jobs import check_address

        return way.through or check_address(way.address)


def as_typed(hosts: Path | None, address: str | None, token: Path | None, anyone: bool) -> str:
    """The options that name a cluster, as text for a command that a message suggests.

    Each has a space before it.
    """
    named = {"--hosts": hosts, "--address": address, "--token": token}
    words = [
        word
        for option, value in named.items()
        if value is not None
        for word in (option, str(value))
    ]
    if anyone:
        words.append("--anyone-may-run-code")
    return "".join(f" {shlex.quote(word)}" for word in words)


def patience() -> "Patience":
    """How long to wait for a cluster; what it waits for is announced."""
    from orpo_ray.cli.console import announce
    from orpo_ray.jobs.submit import Patience

    return Patience(announce)


def known(job: "Job | None", run: str) -> "Job":
    """The job of a run. Raises ConfigError if the cluster has none."""
    from orpo_ray.errors import ConfigError

    if job is None:
        raise ConfigError(
            f"the cluster has no job of run {run}; `orpo-ray status` lists those it has"
        )
    return job
