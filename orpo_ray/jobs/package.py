"""The files that a submitted run takes along.

They are its resolved config, and the files that the config names by relative paths.
"""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from orpo_ray.config import RunConfig, dump, stage_configs
from orpo_ray.errors import ConfigError

CONFIG_FILE, ENTRY_FILE = "run.yaml", "job.py"
"""Names inside the package. The run's own files must not have them."""
_IGNORE_FILES = (".gitignore", ".rayignore")
MOST_BYTES = 50 * 2**20
"""The limit is low because the cluster's head keeps every package in its memory."""


@dataclass(frozen=True)
class Luggage:
    """Which of the paths in a config are carried along, and which are read on the servers."""

    carried: tuple[str, ...]
    """Paths relative to the folder in which the command is given."""
    left: tuple[str, ...]
    """Absolute paths that exist here too. The servers read their own files of these paths."""


def sort_luggage(config: RunConfig, here: Path) -> Luggage:
    """Find what a run carries along: relative paths travel, absolute ones are the servers' own.

    Raises ConfigError for a relative path that leads out of `here`, for too many bytes, and for a
    relative storage.
    """
    refuse_relative_storage(config.storage)
    carried, left = [], []
    for key, path in dict.fromkeys(named_paths(config)):
        at = Path(path)
        if at.is_absolute() or path.startswith("~"):
            left += [path] if is_here(at) else []
        elif is_here(here / at):
            if not at.parts or ".." in at.parts or at.parts[0] in (CONFIG_FILE, ENTRY_FILE):
                raise ConfigError(
                    f"{key}: {path} cannot be carried along; give the command in a folder above "
                    "it, or name its absolute path on the servers"
                )
            carried.append(path)
    size = sum(file.stat().st_size for path in carried for file in _files(here / path))
    if size > MOST_BYTES:
        raise ConfigError(
            f"{', '.join(carried)}: {size / 2**20:.0f} MB are too much to carry along (at most "
            f"{MOST_BYTES >> 20}); put the files on a disk that every server sees, and name their "
            "absolute paths"
        )
    return Luggage(tuple(dict.fromkeys(carried)), tuple(dict.fromkeys(left)))


def pack(config: RunConfig, luggage: Luggage, here: Path, folder: Path) -> None:
    """Fill an empty folder, which becomes the job's working directory."""
    (folder / CONFIG_FILE).write_text(
        yaml.safe_dump(dump(config), sort_keys=False), encoding="utf-8"
    )
    pack_entry(folder)
    for path in luggage.carried:
        for file in _files(here / path):
            target = folder / file.relative_to(here)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)


def pack_entry(folder: Path) -> None:
    """Put the job's script into its working directory."""
    shutil.copyfile(Path(__file__).with_name("entry.py"), folder / ENTRY_FILE)


def sizes(folder: Path) -> dict[str, int]:
    """The bytes of every file that was packed, by its path in the package."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def refuse_relative_storage(storage: str) -> None:
    """Raise ConfigError for a storage whose place depends on the folder of a command."""
    if "://" not in storage and not storage.startswith(("/", "~")):
        raise ConfigError(
            f"storage: {storage} is relative, and would be lost with the job's own folder; name "
            "s3://bucket/folder, or the absolute path of a folder that every server sees"
        )


def is_here(path: Path) -> bool:
    """Whether a path exists on this machine.

    A text that is no valid path here may still be a server's path, or a name on the hub.
    """
    try:
        return path.expanduser().exists()
    except (OSError, RuntimeError):
        return False


def named_paths(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Every setting that may name a file or a folder."""
    for run in (config, *stage_configs(config)):
        for split, sources in (("train", run.data.train), ("eval", run.data.eval)):
            for number, source in enumerate(sources):
                yield f"data.{split}.{number}.source", source.source
        yield "model.base", run.model.base
        for key, path in (
            ("model.chat_template", run.model.chat_template),
            ("adapter.init_from", run.adapter.init_from),
        ):
            if path is not None:
                yield key, path


def _files(path: Path) -> Iterator[Path]:
    """A file, or all files of a folder, with links followed.

    Raises ConfigError for what cannot be carried along.
    """
    if not path.is_dir():
        yield _regular(path)
        return
    above: set[str] = set()
    for folder, _, names in os.walk(path, followlinks=True):
        real = os.path.realpath(folder)
        if real in above:
            raise ConfigError(
                f"{path}: cannot be carried along: a link leads to {folder} again; remove it"
            )
        above.add(real)
        # Ray would leave out the files that an ignore file names.
        yield from (
            _regular(Path(folder, name)) for name in sorted(names) if name not in _IGNORE_FILES
        )


def _regular(path: Path) -> Path:
    if not path.is_file():
        raise ConfigError(
            f"{path}: cannot be carried along: it is not a regular file; remove it, or name another"
        )
    return path
