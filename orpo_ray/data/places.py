"""Which files a source means: one, those of a folder or pattern, or a dataset saved to disk."""

import difflib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orpo_ray.config.storage import expanded
from orpo_ray.errors import DataError

_PATTERN = "*?["
_SAVED, _SAVED_SPLITS = "state.json", "dataset_dict.json"


def is_pattern(name: str) -> bool:
    """Whether a name has a sign that stands for several names."""
    return any(sign in name for sign in _PATTERN) and not Path(name).exists()


def has_splits(name: str) -> bool:
    """Whether a source is a folder of several splits, as `DatasetDict.save_to_disk` writes it."""
    return (expanded(name, "source") / _SAVED_SPLITS).is_file()


def files_of(name: str, split: str, is_known: Callable[[str], bool]) -> list[Path]:
    """The files of a source, in the order of their names.

    `is_known` says of a file's name whether its kind can be read. Raises DataError if there is no
    such file.
    """
    path = expanded(name, "source")
    if is_pattern(name):
        start = Path(path.anchor or ".")
        found = sorted(start.glob(str(path.relative_to(path.anchor))))
        files = [match for match in found if match.is_file()]
        if not files:
            raise DataError(f"{name}: no file matches this pattern")
        return files
    if path.is_file():
        return [path]
    if path.is_dir():
        return _files_in(path, split, is_known)
    if not path.parent.is_dir():
        raise DataError(f"{path}: no such file (there is no directory {path.parent})")
    near = difflib.get_close_matches(path.name, [entry.name for entry in path.parent.iterdir()], 1)
    raise DataError(f"{path}: no such file" + (f"; did you mean {near[0]}?" if near else ""))


def _files_in(folder: Path, split: str, is_known: Callable[[str], bool]) -> list[Path]:
    if (folder / _SAVED_SPLITS).is_file():
        splits: list[str] = _read(folder / _SAVED_SPLITS)["splits"]
        if split not in splits:
            raise DataError(f"{folder}: split {split}: it has {', '.join(splits)}")
        folder = folder / split
    if (folder / _SAVED).is_file():
        return [folder / entry["filename"] for entry in _read(folder / _SAVED)["_data_files"]]
    files = sorted(entry for entry in folder.iterdir() if entry.is_file() and is_known(entry.name))
    if not files:
        raise DataError(f"{folder}: there is no file with rows in this directory")
    if len({entry.name.partition(".")[2] for entry in files}) > 1:
        raise DataError(
            f"{folder} has files of several kinds; name some with a pattern, such as "
            f"{folder}/*{files[0].suffix}"
        )
    return files


def _read(file: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot be read: {error}") from error
    return found
