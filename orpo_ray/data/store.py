"""The artifact: tokenised pairs on disk, found by a hash of all that shaped them.

<storage>/artifacts/<hash16>/
    train.arrow, eval.arrow   Arrow IPC files: pair_id, prompt, chosen, rejected (token ids)
    quarantine.jsonl          one bad row a line: file, line, reason, detail, split
    artifact.json             the summary, and size and SHA-256 of the files above; written last
"""

import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from orpo_ray.data.checks import OVERLONG_EITHER, OVERLONG_PAIR, OVERLONG_PROMPT
from orpo_ray.data.pairs import IntArray, TokenPair
from orpo_ray.errors import DataError
from orpo_ray.runs.console import Announce

DATA_VERSION = 3
"""A change of code that gives other tokens for the same rows must raise this number."""

MANIFEST = "artifact.json"
SIDES = ("prompt", "chosen", "rejected")
SCHEMA = pa.schema([("pair_id", pa.string()), *((side, pa.list_(pa.int32())) for side in SIDES)])
BATCH_ROWS = 8192
QUANTILES = (0.5, 0.9, 0.99)
_STALE_SECONDS = 24 * 3600


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Counts of what went into an artifact and what came out; the content of artifact.json."""

    hash: str
    settings: dict[str, Any]
    sources: list[dict[str, Any]]
    read: int
    train: int
    eval: int
    bad: dict[str, int]
    overlong: int
    truncated: int
    duplicates: int
    overlap: int
    multi_turn: int
    held_out: bool
    overlong_prompts: int | None = None
    """Those of `overlong` that exceed only max_prompt_length; None if an older version wrote it."""
    ignored: dict[str, int] = field(default_factory=dict)
    """How many pairs have each field that the chat template does not write."""
    version: int = DATA_VERSION
    token_lengths: dict[str, dict[str, int]] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)

    def overlong_by_code(self) -> dict[str, int]:
        """How many pairs were dropped for their length, by the code of the reason."""
        if self.overlong_prompts is None:
            counts = {OVERLONG_EITHER: self.overlong}
        else:
            too_long = self.overlong - self.overlong_prompts
            counts = {OVERLONG_PAIR: too_long, OVERLONG_PROMPT: self.overlong_prompts}
        return {code: count for code, count in counts.items() if count}

    def to_json(self) -> dict[str, Any]:
        """The plain values that artifact.json holds."""
        return asdict(self)


class PairTable:
    """The pairs of one Arrow file by index, memory-mapped and cheap to pickle."""

    def __init__(self, path: Path) -> None:
        self.path = path
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        self._batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        rows = [batch.num_rows for batch in self._batches]
        self._starts = np.concatenate([[0], np.cumsum(rows, dtype=np.int64)])
        self._views = [
            tuple(_view(batch.column(side)) for side in SIDES) for batch in self._batches
        ]

    def __reduce__(self) -> tuple[type["PairTable"], tuple[Path]]:
        return (PairTable, (self.path,))

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> TokenPair:
        """The pair at `index`; its arrays are copies, so the caller may write into them."""
        index = int(index)
        if not 0 <= index < len(self):
            raise IndexError(f"pair {index} of {len(self)}")
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        row = index - int(self._starts[number])
        prompt, chosen, rejected = (
            values[offsets[row] : offsets[row + 1]].copy()
            for offsets, values in self._views[number]
        )
        return TokenPair(
            self._batches[number].column("pair_id")[row].as_py(), prompt, chosen, rejected
        )

    def __iter__(self) -> Iterator[TokenPair]:
        return (self[index] for index in range(len(self)))

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Token counts [n, 3] of prompt, chosen and rejected, from the offsets alone."""
        columns = [[np.diff(view[side][0]) for view in self._views] for side in range(len(SIDES))]
        if not self._views:
            return np.zeros((0, len(SIDES)), dtype=np.int64)
        return np.stack([np.concatenate(parts) for parts in columns], axis=1).astype(np.int64)

    @property
    def largest_token_id(self) -> int:
        """The largest token id in the table, to compare with the rows of a model's embedding."""
        return max(
            (int(values.max()) for views in self._views for _, values in views if len(values)),
            default=0,
        )

    @property
    def pair_ids(self) -> list[str]:
        """Where each pair came from: the label of its source, a colon, and the line or row."""
        return [
            pair_id for batch in self._batches for pair_id in batch.column("pair_id").to_pylist()
        ]


@dataclass(frozen=True)
class Artifact:
    """The tokenised pairs of a run, ready to train on."""

    path: Path
    summary: Summary
    train: PairTable
    eval: PairTable


def content_hash(*parts: object) -> str:
    """SHA-256 of parts that JSON can hold; equal parts give equal artifacts."""
    text = json.dumps([DATA_VERSION, *parts], sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def artifact_path(storage: Path, digest: str) -> Path:
    """The folder of the artifact with this hash, whether it exists or not."""
    return storage / "artifacts" / digest[:16]


def find_artifact(storage: Path, digest: str, announce: Announce) -> Artifact | None:
    """The finished artifact with this hash, or None; a damaged one is announced and not used."""
    path = artifact_path(storage, digest)
    if not path.exists():
        return None
    damage = find_damage(path, digest)
    if damage:
        announce(f"the prepared data in {path} is damaged ({damage}); it is built again")
        return None
    return open_artifact(path)


def find_damage(path: Path, digest: str) -> str | None:
    """What is wrong with the artifact's files, or None if they are whole."""
    try:
        record = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if record["hash"] != digest:
            return "artifact.json belongs to other data"
        for name, expected in record["files"].items():
            if (path / name).stat().st_size != expected["size"]:
                return f"{name} has another size than recorded"
            if _sha256(path / name) != expected["sha256"]:
                return f"{name} has another SHA-256 than recorded"
    except OSError as error:
        return f"{Path(error.filename or path).name} cannot be read"
    except (ValueError, KeyError, TypeError, AttributeError):
        return "artifact.json cannot be understood"
    return None


def open_artifact(path: Path) -> Artifact:
    """Open a finished artifact by its folder. Raises DataError if it is not one."""
    try:
        summary = Summary(**json.loads((path / MANIFEST).read_text(encoding="utf-8")))
        return Artifact(
            path, summary, PairTable(path / "train.arrow"), PairTable(path / "eval.arrow")
        )
    except (OSError, ValueError, TypeError, pa.ArrowInvalid) as error:
        raise DataError(
            f"{path} is not prepared data ({error}); run `orpo-ray prepare` again"
        ) from error


def write_artifact(
    storage: Path,
    summary: Summary,
    train: Iterable[pa.Table],
    evaluation: Iterable[pa.Table],
    quarantine: Iterable[dict[str, Any]],
) -> Artifact:
    """Write the files in a folder beside their place, then rename it in one step."""
    final = artifact_path(storage, summary.hash)
    _make_room(final.parent)
    building = final.parent / f".building-{final.name}-{uuid.uuid4().hex[:8]}"
    try:
        building.mkdir()
        _write_arrow(building / "train.arrow", train)
        _write_arrow(building / "eval.arrow", evaluation)
        _write_lines(building / "quarantine.jsonl", quarantine)
        summary = _complete(summary, building)
        _write_durably(building / MANIFEST, json.dumps(summary.to_json(), indent=2) + "\n")
        _move_into_place(building, final, summary.hash)
    except OSError as error:
        raise DataError(
            f"cannot write the prepared data to {final}: {error.strerror or error}"
        ) from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return open_artifact(final)


def _view(column: pa.ListArray) -> tuple[npt.NDArray[np.int32], IntArray]:
    return column.offsets.to_numpy(), column.values.to_numpy()


def _make_room(parent: Path) -> None:
    """Create the folder, and delete old leftovers of preparations that were killed."""
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"storage {parent.parent} cannot be written: {error.strerror}") from error
    for left in parent.glob(".building-*"):
        if time.time() - left.stat().st_mtime > _STALE_SECONDS:
            shutil.rmtree(left, ignore_errors=True)


def _write_arrow(path: Path, tables: Iterable[pa.Table]) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
        for table in tables:
            for batch in (
                table.select(SCHEMA.names).cast(SCHEMA).combine_chunks().to_batches(BATCH_ROWS)
            ):
                writer.write_batch(batch)


def _write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    # ensure_ascii keeps the file readable if a detail quotes text that is not valid Unicode.
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=True) + "\n" for row in rows)


def _complete(summary: Summary, folder: Path) -> Summary:
    files = {
        path.name: {"size": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.iterdir())
    }
    return replace(
        summary, files=files, token_lengths=_quantiles(PairTable(folder / "train.arrow").lengths)
    )


def _quantiles(lengths: npt.NDArray[np.int64]) -> dict[str, dict[str, int]]:
    if not len(lengths):
        return {}
    table = {
        side: {
            f"p{round(q * 100)}": int(np.quantile(lengths[:, i], q, method="higher"))
            for q in QUANTILES
        }
        for i, side in enumerate(SIDES)
    }
    return {
        side: {**values, "max": int(lengths[:, i].max())}
        for i, (side, values) in enumerate(table.items())
    }


def _write_durably(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _move_into_place(building: Path, final: Path, digest: str) -> None:
    """Rename the folder to its place.

    If another process has finished the same artifact meanwhile, its files stay.
    """
    if final.exists() and find_damage(final, digest):
        aside = final.parent / f".building-damaged-{uuid.uuid4().hex[:8]}"
        final.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)
    try:
        building.rename(final)
    except OSError:
        if not final.exists() or find_damage(final, digest):
            raise


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
