"""Checkpoints that do not depend on the number of GPUs.

They hold tensors by name and plain JSON. The manifest is written last.

step-000040/
    adapter/            the adapter (or the whole model) with tokenizer, loadable by PEFT as it is
    state.safetensors   per trained parameter: its float32 value and its optimizer state
    position.json       step, scheduler, random states, metrics
    MANIFEST.json       size and SHA-256 of each file above
"""

import errno
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from orpo_ray.models.fingerprint import file_sha256
from orpo_ray.runs.console import Announce
from orpo_ray.runs.files import CHECKPOINT_MANIFEST

MANIFEST, POSITION = CHECKPOINT_MANIFEST, "position.json"
_NAME = re.compile(r"step-\d{6,}")


@dataclass(frozen=True, kw_only=True)
class Position:
    """How far a run has come.

    `random_states` has one item per rank. `metrics` are those of the evaluation at this step, if
    there was one.
    """

    step: int
    total_steps: int
    scheduler_steps: int
    random_states: list[dict[str, Any]]
    loss_scale: dict[str, Any] | None = None
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Saved:
    """What `steps_to_keep` needs of a checkpoint. If it was not evaluated, it has no accuracy."""

    step: int
    accuracy: float | None
    margin: float | None


def save(parent: Path, position: Position, write: Callable[[Path], None]) -> Path:
    """Fill a new folder, write the manifest last, then move the folder to its place."""
    final = folder_of(parent, position.step)
    building = parent / f".building-{uuid.uuid4().hex[:8]}"
    building.mkdir(parents=True)
    try:
        write(building)
        (building / POSITION).write_text(json.dumps(asdict(position)), encoding="utf-8")
        write_manifest(building)
        if final.exists():
            _delete(final)
        building.replace(final)
        _sync_folders(final)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return final


def folder_of(parent: Path, step: int) -> Path:
    """The folder of a step's checkpoint, whether it exists or not."""
    return parent / f"step-{step:06d}"


def write_manifest(folder: Path) -> None:
    """Record size and SHA-256 of every file, and make them durable."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        _sync(path)
    entries = {
        path.relative_to(folder).as_posix(): {
            "size": path.stat().st_size,
            "sha256": file_sha256(path),
        }
        for path in files
    }
    (folder / MANIFEST).write_text(json.dumps({"files": entries}, indent=1), encoding="utf-8")
    _sync(folder / MANIFEST)


def find_damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint; None if every file is as it was written."""
    try:
        entries = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        for name, expected in entries.items():
            path = folder / name
            if path.stat().st_size != expected["size"] or file_sha256(path) != expected["sha256"]:
                return f"{name} is not as it was written"
    except OSError as error:
        return f"{Path(error.filename).name if error.filename else folder.name} cannot be read"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be understood"
    return None


def newest_whole(parent: Path, announce: Announce) -> Path | None:
    """The newest undamaged checkpoint.

    Remains of a killed run are deleted. Damaged checkpoints get another name, so that they do not
    count as the newest when others are deleted.
    """
    for left in [*parent.glob(".building-*"), *parent.glob(".deleting-*")]:
        shutil.rmtree(left)
    for folder in reversed(_folders(parent)):
        damage = find_damage(folder)
        if damage is None:
            return folder
        announce(f"checkpoint {folder.name} is damaged ({damage}); trying the one before it")
        aside = parent / f"damaged-{folder.name}"
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
    return None


def read_position(folder: Path) -> Position:
    """The position that a checkpoint holds."""
    return Position(**json.loads((folder / POSITION).read_text(encoding="utf-8")))


def prune(parent: Path, keep: int) -> list[Path]:
    """Delete the checkpoints that `steps_to_keep` does not name. Returns their folders."""
    folders = {int(folder.name.removeprefix("step-")): folder for folder in _folders(parent)}
    saved = [_saved(step, folder) for step, folder in folders.items()]
    doomed = [folders[step] for step in set(folders) - steps_to_keep(saved, keep)]
    for folder in doomed:
        _delete(folder)
    return doomed


def steps_to_keep(saved: Sequence[Saved], keep: int) -> set[int]:
    """The steps to keep: the newest, the best, then the next newest, until `keep` are named.

    The best one has the highest accuracy. If several have it, the largest margin decides.
    """
    newest_first = sorted((s.step for s in saved), reverse=True)
    ranked = list(dict.fromkeys(newest_first[:1] + _best_first(saved)[:1] + newest_first))
    return set(ranked[:keep])


def _best_first(saved: Sequence[Saved]) -> list[int]:
    """The evaluated steps, best first; of equal ones the newer first."""
    judged = [s for s in saved if s.accuracy is not None and s.margin is not None]
    ranked = sorted(judged, key=lambda s: (s.accuracy, s.margin, s.step), reverse=True)
    return [s.step for s in ranked]


def best_whole(parent: Path, announce: Announce) -> Path:
    """The best checkpoint of a finished run, among those without damage.

    The newest one always counts, because the last step is always evaluated.
    """
    folders = {int(folder.name.removeprefix("step-")): folder for folder in _folders(parent)}
    for step in _best_first([_saved(step, folder) for step, folder in folders.items()]):
        damage = find_damage(folders[step])
        if damage is None:
            return folders[step]
        announce(f"checkpoint {folders[step].name} is damaged ({damage}); taking the next best")
    return folders[max(folders)]


def _saved(step: int, folder: Path) -> Saved:
    metrics = _metrics(folder)
    return Saved(step, metrics.get("eval/accuracy"), metrics.get("eval/margin"))


def _metrics(folder: Path) -> dict[str, float]:
    try:
        return read_position(folder).metrics
    except (OSError, ValueError, TypeError):
        return {}  # a checkpoint that was damaged after it was written is never the best


def _delete(folder: Path) -> None:
    """Delete a checkpoint. If the process is killed here, no half of it looks like a whole one."""
    doomed = folder.with_name(f".deleting-{uuid.uuid4().hex[:8]}")
    folder.rename(doomed)
    shutil.rmtree(doomed)


def _folders(parent: Path) -> list[Path]:
    found = (path for path in parent.glob("step-*") if _NAME.fullmatch(path.name))
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def _sync_folders(checkpoint: Path) -> None:
    """Make the names in a checkpoint, and its own name, durable before an older one is deleted."""
    inside = [path for path in checkpoint.rglob("*") if path.is_dir()]
    for folder in [*inside, checkpoint, checkpoint.parent]:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            # Some network file systems give this error for every folder.
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
        finally:
            os.close(descriptor)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
