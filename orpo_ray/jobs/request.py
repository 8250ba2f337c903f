"""Makes a job from a command line: its entrypoint, its files and its name."""

import platform
import shlex
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from orpo_ray.config import RunConfig, dump
from orpo_ray.errors import ConfigError
from orpo_ray.jobs.entry import ANY
from orpo_ray.jobs.job import Submission, describe
from orpo_ray.jobs.package import CONFIG_FILE, ENTRY_FILE, pack, pack_entry, sort_luggage
from orpo_ray.jobs.secrets import refuse_secrets

STOP = {"RAY_JOB_STOP_SIGNAL": "SIGINT", "RAY_JOB_STOP_WAIT_TIME_S": "120"}
"""A stopped job gets time to save its checkpoint. Ray would kill it after 3 s."""


@contextmanager
def request(
    command: str,
    options: Sequence[str],
    config: RunConfig,
    environment: dict[str, str],
    ship_code: bool,
    announce: Callable[[str], None],
) -> Iterator[Submission]:
    """The job that runs a command on the cluster; its files lie in a temporary folder.

    Raises ConfigError for secrets, and for files that cannot be carried along.
    """
    refuse_secrets(dump(config), environment, options)
    if late := next((word for word in options if "=" in word and not word.startswith("-")), None):
        raise ConfigError(
            f"{late}: only options of {command} may follow --; put settings before it"
        )
    here = Path.cwd()
    luggage = sort_luggage(config, here)
    if luggage.carried:
        announce(f"carried along: {', '.join(luggage.carried)}")
    if luggage.left:
        announce(f"read on the servers, where they must be too: {', '.join(luggage.left)}")
    with tempfile.TemporaryDirectory(prefix="orpo-ray-") as folder:
        pack(config, luggage, here, Path(folder))
        yield Submission(
            run=config.name,
            entrypoint=_entrypoint(command, [CONFIG_FILE, *options], ship_code),
            environment={
                "working_dir": folder,
                "env_vars": {**environment, **STOP},
                **(_OUR_CODE if ship_code else {}),
            },
            metadata=describe(command, config, [[*options], environment, ship_code]),
        )


@contextmanager
def checkup(
    config: RunConfig | None, options: Sequence[str], announce: Callable[[str], None]
) -> Iterator[Submission]:
    """The job that looks at every server of the cluster: `orpo-ray doctor`, with its options.

    Raises ConfigError for secrets in the config.
    """
    run = f"doctor-{uuid.uuid4().hex[:8]}"
    if config is not None:
        config = config.model_copy(update={"name": run})
        with request(_DOCTOR, options, config, {}, ship_code=False, announce=announce) as asked:
            yield asked
        return
    with tempfile.TemporaryDirectory(prefix="orpo-ray-") as folder:
        pack_entry(Path(folder))
        yield Submission(
            run=run,
            entrypoint=_entrypoint(_DOCTOR, options, ship_code=False),
            environment={"working_dir": folder, "env_vars": STOP},
            metadata={"command": _DOCTOR},
        )


_DOCTOR = "doctor"
_OUR_CODE: dict[str, Any] = {
    "py_modules": [str(Path(__file__).parents[1])],
    "excludes": ["__pycache__"],
}


def _entrypoint(command: str, words: Sequence[str], ship_code: bool) -> str:
    python = ".".join(platform.python_version_tuple()[:2])
    made_for = [python, version("ray"), ANY if ship_code else version("orpo-ray")]
    return shlex.join(["python", ENTRY_FILE, *made_for, command, *words, "--json"])


def parse_environment(words: Sequence[str]) -> dict[str, str]:
    """The job's variables, from words of the form NAME=VALUE."""
    environment = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name.isidentifier():
            raise ConfigError(f"--env {name}: write NAME=VALUE, such as HF_HOME=/data/hub")
        environment[name] = value
    return environment
