"""The file that sbatch reads for a run on Slurm."""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from orpo_ray.config import RunConfig
from orpo_ray.config.storage import local_path
from orpo_ray.errors import ConfigError
from orpo_ray.jobs import ports
from orpo_ray.jobs.nodes import Nodes
from orpo_ray.jobs.render import cluster_file, fill, node_ports

_LOCAL = ("/tmp", "/var/tmp", "/dev/shm", "/run")
_PARTITION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._,-]*")
_TIME = re.compile(r"\d{1,9}(:\d\d){0,2}|\d{1,9}-\d{1,9}(:\d\d){0,2}", re.ASCII)
_SHORTEST_S = 600
"""Slurm warns the job five minutes before the time limit, so that it saves a checkpoint."""


@dataclass(frozen=True)
class Request:
    """What Slurm is asked for. Raises ConfigError for values that Slurm could not read."""

    nodes: Nodes
    time: str
    partition: str | None = None

    def __post_init__(self) -> None:
        """Refuse values that would break the script."""
        if not _TIME.fullmatch(self.time):
            raise ConfigError(
                f"--time: {self.time!r} is not a time that Slurm reads; write minutes, "
                "hours:minutes:seconds or days-hours"
            )
        if 0 < _seconds(self.time) < _SHORTEST_S:  # 0 is no limit at all
            raise ConfigError(
                f"--time: {self.time} is too short: a checkpoint is saved five minutes before the "
                f"end; give {_SHORTEST_S // 60} minutes or more"
            )
        if self.partition is not None and not _PARTITION.fullmatch(self.partition):
            raise ConfigError(f"--partition: {self.partition!r} is not the name of a partition")


def sbatch_file(
    config: RunConfig, train: Sequence[str], request: Request, folder: Path
) -> dict[str, str]:
    """The job's script by its file name; it gives the command `train` in `folder`.

    Raises ConfigError if there are several nodes, and they do not share the storage.
    """
    nodes = request.nodes
    if nodes.count > 1 and "://" not in config.storage:
        _refuse_local_storage(config.storage)
    job = config.name.replace("/", "-")
    values = {
        "job": job,
        "folder": shlex.quote(str(folder)),
        "nodes": str(nodes.count),
        "cpus": str(nodes.cpus),
        "gpus": str(nodes.gpus),
        "memory": str(nodes.memory_gib),
        "time": request.time,
        "also": _also(request),
        "gcs": str(ports.GCS),
        "ray_options": f"{node_ports()} --disable-usage-stats",
        # For a bucket this machine has only a copy, which may be old.
        "result": ""
        if "://" in config.storage
        else shlex.quote(str(config.run_dir / "result.json")),
        "train": shlex.join(train),
    }
    return {f"{job}.sbatch": fill("slurm/settings.sbatch", values) + cluster_file("slurm/run.sh")}


def _seconds(time: str) -> int:
    """The seconds of a time as Slurm writes it.

    Without days: minutes, minutes:seconds or hours:minutes:seconds. With days before a dash: hours,
    hours:minutes or hours:minutes:seconds.
    """
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    hours, minutes, seconds = ([*parts, 0, 0] if dash or len(parts) == 3 else [0, *parts, 0])[:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def _also(request: Request) -> str:
    """Lines for options that are written only if they are used.

    A cluster without GPUs may refuse the option for GPUs.
    """
    wanted = {"gpus-per-node": request.nodes.gpus, "partition": request.partition}
    return "".join(f"\n#SBATCH --{option}={value}" for option, value in wanted.items() if value)


def _refuse_local_storage(storage: str) -> None:
    """Raise ConfigError for a folder whose name shows that nodes do not share it."""
    path = local_path(storage, "storage")
    if not path.is_absolute() or any(path.is_relative_to(folder) for folder in _LOCAL):
        raise ConfigError(
            f"storage: {storage} is not a folder that several nodes share, by its name; "
            "give the absolute path of one that every node sees"
        )
