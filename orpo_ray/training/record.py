"""What a run writes about itself, and what it compares when the same command comes again."""

import fcntl
import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from orpo_ray.config import RunConfig, dump
from orpo_ray.errors import ConfigError
from orpo_ray.storage import Storage, storage_at
from orpo_ray.training.checkpoint import MANIFEST

CONFIG_FILE, RUN_FILE, RESULT_FILE, METRICS_FILE = "config.json", "run.json", "result.json", "metrics.jsonl"
SEARCH_FILE = "search.json"
"""Of a search, whose folder holds its trials' runs."""
LOG_FILE = "run.log"
CHECKPOINTS, TENSORBOARD = "checkpoints", "tensorboard"
_RECORDS = (CONFIG_FILE, RUN_FILE, RESULT_FILE, SEARCH_FILE, LOG_FILE)
WORKERS_LOCK_FILE = ".workers.lock"
"""Of the process that writes where workers train, maybe on another server than the one that gave the command."""
_LOCK_FILE, _LOCK_POLL_S = ".lock", 0.2
_locked: set[Path] = set()
"""Folders of the runs that this process holds the lock of."""
_PACKAGES = ("orpo-ray", "torch", "transformers", "peft", "bitsandbytes", "accelerate", "trl", "deepspeed", "ray")

# Settings that may change on resume: they move work and files about, but not the numbers that come out.
FREE_KEYS = ("storage", "scale.", "search", "training.tokens_per_microbatch", "training.trackers")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that shape a run's numbers, as far as they are installed."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON in one step, so that a killed run never leaves half a file."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_config(config: RunConfig) -> None:
    """Keep a run's settings, for its workers and for the next start."""
    config.run_dir.mkdir(parents=True, exist_ok=True)
    write_json(config.run_dir / CONFIG_FILE, dump(config))
    storage_at(config.storage).store(config.run_dir / CONFIG_FILE)


def read_json(path: Path) -> dict[str, Any] | None:
    """The content of a JSON file that `write_json` wrote, or None if there is none yet."""
    try:
        content: dict[str, Any] | None = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        if not isinstance(content, dict | None):
            raise ValueError("not an object")
    except ValueError as error:
        raise ConfigError(
            f"{path}: not as the run wrote it ({error}); remove the run's folder, or restore the file"
        ) from error
    return content


@contextmanager
def run_lock(run_dir: Path, patience_s: float = 0.0) -> Iterator[None]:
    """Keep a second process away from a run. Raises ConfigError if one is still at work after that time."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / _LOCK_FILE).open("w") as file:
        if not lock_within(file.fileno(), patience_s):
            raise ConfigError(f"{run_dir}: another process is training this run; wait for it, or choose another name")
        _locked.add(run_dir.absolute())
        try:
            yield
        finally:
            _locked.remove(run_dir.absolute())


def fetch_run(run_dir: Path, storage: Storage) -> None:
    """Have here what the storage tells of a run, for a process that has not begun to work on it.

    Where another process of this server is at work on the run, what lies here is newer, and is left alone.
    """
    if not storage.is_remote or is_locked(run_dir, WORKERS_LOCK_FILE):
        return
    if is_locked(run_dir) and not is_locked_by_us(run_dir):
        return
    for name in _RECORDS:
        storage.fetch(run_dir / name)
    # What a checkpoint holds is fetched by who goes on from it, maybe on another server.
    storage.fetch_folders(run_dir / CHECKPOINTS, MANIFEST, only_manifests=True)


def lock_within(descriptor: int, patience_s: float) -> bool:
    """Lock an open file, or say that another process holds it for longer than that; the lock goes with the file."""
    give_up = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= give_up:
                return False
            time.sleep(_LOCK_POLL_S)
        else:
            return True


def is_locked(run_dir: Path, lock: str = _LOCK_FILE) -> bool:
    """Whether a process is at work on a run."""
    if not (run_dir / lock).exists():
        return False
    with (run_dir / lock).open("r") as file:
        try:
            fcntl.flock(file.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


def is_locked_by_us(run_dir: Path) -> bool:
    """Whether this process holds the run's lock, so that its folder may be written to."""
    return run_dir.absolute() in _locked


def has_started(run_dir: Path) -> bool:
    """Whether there is something to go on from; a run that never saved a checkpoint may begin anew."""
    begun = (run_dir / RESULT_FILE).exists() or (run_dir / SEARCH_FILE).exists()
    return begun or any((run_dir / CHECKPOINTS).glob("step-*"))


def refuse_changed_config(run_dir: Path, config: RunConfig, free: tuple[str, ...] = FREE_KEYS) -> None:
    """Raise ConfigError if a run of this name was made with other settings than those in `free`, naming the first."""
    stored = read_json(run_dir / CONFIG_FILE)
    if stored is None or not has_started(run_dir):
        return
    before, now = flatten(stored), flatten(dump(config))
    changed = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    changed = [key for key in changed if not key.startswith(free)]
    if changed:
        key = changed[0]
        more = f" (and {len(changed) - 1} more: {', '.join(changed[1:4])})" if len(changed) > 1 else ""
        raise ConfigError(
            f"{key}: {now.get(key)!r} here, but run {config.name} was made with {before.get(key)!r}{more}; "
            "give the new run another name, or restore the setting"
        )


def read_run(run_dir: Path) -> dict[str, Any]:
    """What run.json says of a run that has something to go on from; empty for one that begins."""
    if not has_started(run_dir):
        return {}
    stored = read_json(run_dir / RUN_FILE)
    if stored is None:
        raise ConfigError(f"{run_dir / RUN_FILE}: missing, so nobody can tell what the run began with; restore it")
    return stored


def add_to_run(run_dir: Path, facts: dict[str, Any]) -> None:
    """Put more of what was found out into run.json."""
    write_json(run_dir / RUN_FILE, {**(read_json(run_dir / RUN_FILE) or {}), **facts})


def refuse_changed_identity(stored: dict[str, str], name: str, identity: dict[str, str]) -> None:
    """Raise ConfigError if data, tokenizer or weights behind unchanged settings are not those the run began with."""
    for key, value in identity.items():
        if stored.get(key, value) != value:
            raise ConfigError(
                f"{key}: not what run {name} began with ({stored[key][:16]} then, {value[:16]} now); "
                "give the new run another name, or restore what was there"
            )


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested plain data as dotted keys; lists of sections become numbered keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, list) and any(isinstance(item, dict) for item in value):
            value = {str(index): item for index, item in enumerate(value)}
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def last_metrics(run_dir: Path) -> dict[str, float]:
    """The latest number of every metric a run reported; null stands for one that was not finite."""
    merged: dict[str, float] = {}
    for record in _metrics(run_dir):
        merged |= {name: value for name, value in record.items() if value is not None}
    merged.pop("step", None)
    return merged


def evaluations(run_dir: Path) -> list[dict[str, float]]:
    """Every evaluation of a run: its step and the numbers under `eval/`."""
    found = [{k: v for k, v in record.items() if k == "step" or k.startswith("eval/")} for record in _metrics(run_dir)]
    return [evaluation for evaluation in found if len(evaluation) > 1]


def metric_by_step(run_dir: Path, name: str) -> dict[int, float]:
    """One metric's value at every step that reported it."""
    return {int(record["step"]): record[name] for record in _metrics(run_dir) if name in record}


def _metrics(run_dir: Path) -> list[dict[str, float]]:
    path = run_dir / METRICS_FILE
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    return [record for record in map(read_metrics_line, text.splitlines()) if record is not None]


def read_metrics_line(line: str) -> dict[str, float] | None:
    """One record of metrics.jsonl, or None for what a killed run or a power cut left of one."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) and "step" in found else None
