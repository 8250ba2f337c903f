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
_DATA_FILES = "_data_files"
PACKED = (".gz", ".zst")
"""Endings of compressed files."""


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
    raise DataError(f"{path}: {_why_no_file(path)}")


def _why_no_file(path: Path) -> str:
    if path.exists():
        return "a pipe or a device, which cannot be read twice; write its rows to a file"
    if path.is_symlink():
        return f"a link to {path.readlink()}, which is not there"
    if not path.parent.is_dir():
        return f"no such file (there is no directory {path.parent})"
    near = difflib.get_close_matches(path.name, [entry.name for entry in path.parent.iterdir()], 1)
    return "no such file" + (f"; did you mean {near[0]}?" if near else "")


def not_read(name: str, is_known: Callable[[str], bool]) -> list[str]:
    """The names in a folder of which nothing is read: other kinds of files, and folders.

    Hidden files are not among them, nor is what `save_to_disk` wrote.
    """
    folder = expanded(name, "source")
    if is_pattern(name) or not folder.is_dir() or has_splits(name) or _shards(folder) is not None:
        return []
    entries = sorted(entry for entry in folder.iterdir() if not _is_hidden(entry))
    folders = [f"{entry.name}/" for entry in entries if entry.is_dir()]
    return [e.name for e in entries if not e.is_dir() and not is_known(e.name)] + folders


def _files_in(folder: Path, split: str, is_known: Callable[[str], bool]) -> list[Path]:
    if (folder / _SAVED_SPLITS).is_file():
        splits = _read(folder / _SAVED_SPLITS, "splits")
        if split not in splits:
            raise DataError(f"{folder}: split {split}: it has {', '.join(map(str, splits))}")
        folder = folder / split
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder, but {_SAVED_SPLITS} beside it names it")
    saved = _shards(folder)
    if saved is not None:
        return saved
    entries = (entry for entry in folder.iterdir() if not _is_hidden(entry))
    files = sorted(entry for entry in entries if entry.is_file() and is_known(entry.name))
    if not files:
        raise DataError(f"{folder}: there is no file with rows in this directory")
    if len({_kind(entry) for entry in files}) > 1:
        raise DataError(
            f"{folder} has files of several kinds; name some with a pattern, such as "
            f"{folder}/*{_kind(files[0])}"
        )
    return files


def _is_hidden(entry: Path) -> bool:
    return entry.name.startswith(".")


def _kind(file: Path) -> str:
    """The last ending of a name, or the last two if the file is compressed."""
    endings = [ending.lower() for ending in file.suffixes]
    return "".join(endings[-2:] if endings[-1] in PACKED else endings[-1:])


def _shards(folder: Path) -> list[Path] | None:
    """The files that a saved dataset names; None for a folder that is none.

    Other programs, such as trainers, write a state.json, too.
    """
    file = folder / _SAVED
    if not file.is_file() or _DATA_FILES not in _loaded(file):
        return None
    entries = _read(file, _DATA_FILES)
    found = [entry.get("filename") for entry in entries if isinstance(entry, dict)]
    names = [name for name in found if isinstance(name, str)]
    if not names or len(names) < len(entries):
        raise DataError(f"{file}: {_DATA_FILES} names no files; save the dataset again")
    return [folder / name for name in names]


def _read(file: Path, key: str) -> list[Any]:
    """A list in one of the files of a saved dataset."""
    found = _loaded(file).get(key)
    if not isinstance(found, list):
        raise DataError(f"{file}: it has no list of {key}; save the dataset again")
    return found


def _loaded(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file}: cannot be read: {error}") from error
    return found if isinstance(found, dict) else {}
