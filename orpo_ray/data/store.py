"""The artifact: tokenised pairs on disk, found by a hash of all that shaped them.

<storage>/artifacts/<hash16>/
    pairs-<place>-<hash>.arrow   Arrow IPC files (shards.py): what became of each row, its token ids
                                 (prompt, chosen, rejected), and which of them are trained
    train.arrow, eval.arrow      the rows to train and to evaluate on: their numbers, counted
                                 through all shards, their lengths, their trained tokens, and the
                                 names of the shards
    quarantine.jsonl             one bad row a line: file, line, reason, detail, split
    artifact.json                the summary, and size and SHA-256 of the files above; written last
"""

import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from orpo_ray.data.checks import OVERLONG_EITHER, OVERLONG_PAIR, OVERLONG_PROMPT
from orpo_ray.data.pairs import IntArray, TokenPair, Trained
from orpo_ray.data.shards import WRITING, Shard
from orpo_ray.errors import DataError
from orpo_ray.runs.console import Announce

DATA_VERSION = 6
"""A change of code that gives other tokens or files for the same rows must raise this number."""

MANIFEST = "artifact.json"
SIDES = ("prompt", "chosen", "rejected")
TRAINED = tuple(f"{side}_trained" for side in SIDES)
"""The columns of trained tokens.

In a shard they have ranges (start, stop, start, stop, ...), in an index the number of tokens.
"""
SCHEMA = pa.schema(
    [("pair_id", pa.string()), *((name, pa.list_(pa.int32())) for name in (*SIDES, *TRAINED))]
)
INDEX = pa.schema([("row", pa.int64()), *((name, pa.int32()) for name in (*SIDES, *TRAINED))])
QUANTILES = (0.5, 0.9, 0.99)
_SHARDS = b"shards"
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
    good_answers: int = 0
    bad_answers: int = 0
    """Pairs with one side: rows with a single answer and its label."""
    near: int = 0
    """Training pairs that are nearly equal to an evaluation pair."""
    small_margin: int = 0
    """Rows of scored answers of which no two differ by `data.min_margin`."""
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
    """The pairs of one index by their place in it, memory-mapped and cheap to pickle.

    A shard is opened when its first pair is asked for.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        index = pa.ipc.open_file(pa.memory_map(str(path)))
        self._index = index.read_all()
        self._rows = self._index["row"].to_numpy()
        shards: list[tuple[str, int]] = json.loads((index.schema.metadata or {})[_SHARDS])
        self.shards = dict(shards)
        """How many rows each shard has, in their order."""
        self._files = [path.parent / name for name, _ in shards]
        for file in self._files:
            file.stat()  # an artifact without one of its files is refused here, not in a step
        self._starts = np.cumsum([0, *(rows for _, rows in shards)], dtype=np.int64)
        self._opened: dict[int, _OpenShard] = {}

    def __reduce__(self) -> tuple[type["PairTable"], tuple[Path]]:
        return (PairTable, (self.path,))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> TokenPair:
        """The pair at `index`; its arrays are copies, so the caller may write into them."""
        shard, row = self._place(int(index))
        prompt, chosen, rejected, *ranges = shard.arrays(row)
        return TokenPair(
            pair_id=shard.pair_id(row),
            prompt=prompt,
            chosen=chosen,
            rejected=rejected,
            trained=Trained(*(each.reshape(-1, 2) for each in ranges)),
        )

    def __iter__(self) -> Iterator[TokenPair]:
        return (self[index] for index in range(len(self)))

    def _place(self, index: int) -> tuple["_OpenShard", int]:
        """The shard of a pair, and its row there."""
        if not 0 <= index < len(self):
            raise IndexError(f"pair {index} of {len(self)}")
        row = int(self._rows[index])
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self._open(number), row - int(self._starts[number])

    def _open(self, number: int) -> "_OpenShard":
        if number not in self._opened:
            self._opened[number] = _OpenShard(self._files[number])
        return self._opened[number]

    @property
    def rows(self) -> npt.NDArray[np.int64]:
        """The number of each pair's row, counted through all shards."""
        found: npt.NDArray[np.int64] = self._rows
        return found

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Token counts [n, 3] of prompt, chosen and rejected, without a look at the tokens."""
        return self._counts(SIDES)

    @property
    def trained(self) -> npt.NDArray[np.int64]:
        """Numbers of trained tokens [n, 3] of prompt, chosen and rejected."""
        return self._counts(TRAINED)

    def _counts(self, names: Sequence[str]) -> npt.NDArray[np.int64]:
        columns = [self._index[name].to_numpy() for name in names]
        return np.stack(columns, axis=1).astype(np.int64)

    @property
    def largest_token_id(self) -> int:
        """The largest token id in the shards, to compare with the rows of a model's embedding."""
        numbers = range(len(self._files))
        return max((self._open(number).largest_token_id for number in numbers), default=0)

    @property
    def pair_ids(self) -> list[str]:
        """Where each pair came from: the label of its source, a colon, and the line or row."""
        places = (self._place(index) for index in range(len(self)))
        return [shard.pair_id(row) for shard, row in places]


class _OpenShard:
    """The rows of one memory-mapped shard."""

    def __init__(self, path: Path) -> None:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        self._batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        self._starts = np.cumsum([0, *(batch.num_rows for batch in self._batches)], dtype=np.int64)
        self._views = [
            tuple(_view(batch.column(name)) for name in (*SIDES, *TRAINED))
            for batch in self._batches
        ]

    def pair_id(self, row: int) -> str:
        """Where the row came from."""
        number, place = self._place(row)
        found: str = self._batches[number].column("pair_id")[place].as_py()
        return found

    def arrays(self, row: int) -> list[IntArray]:
        """Copies of the columns of SIDES and TRAINED."""
        number, place = self._place(row)
        return [
            values[offsets[place] : offsets[place + 1]].copy()
            for offsets, values in self._views[number]
        ]

    @property
    def largest_token_id(self) -> int:
        """The largest token id, or 0 if there is none."""
        sides = (view for views in self._views for view in views[: len(SIDES)])
        return max((int(ids.max()) for _, ids in sides if len(ids)), default=0)

    def _place(self, row: int) -> tuple[int, int]:
        """Batch of a row, and its place there."""
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        return number, row - int(self._starts[number])


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
    if not (path / MANIFEST).exists():
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


def begin_artifact(storage: Path, digest: str) -> Path:
    """The folder to write an artifact into; what is damaged there is not finished any more.

    An artifact that another preparation has finished meanwhile stays: its run may be using it.
    Deletes what is left of preparations that nobody has gone on with for a day. Raises DataError if
    the storage cannot be written.
    """
    path = artifact_path(storage, digest)
    try:
        path.mkdir(parents=True, exist_ok=True)
        if (path / MANIFEST).exists() and find_damage(path, digest):
            (path / MANIFEST).unlink(missing_ok=True)
    except OSError as error:
        raise DataError(f"storage {storage} cannot be written: {error.strerror}") from error
    for left in path.parent.iterdir():
        if left != path and not (left / MANIFEST).exists() and _idle_s(left) > _STALE_SECONDS:
            shutil.rmtree(left, ignore_errors=True)
    for half in path.glob(f"{WRITING}*"):
        if _idle_s(half) > _STALE_SECONDS:
            half.unlink(missing_ok=True)
    return path


def finish_artifact(
    path: Path,
    summary: Summary,
    shards: Sequence[Shard],
    *,
    rows: Sequence[int],
    train: npt.ArrayLike,
    evaluation: npt.ArrayLike,
    counts: npt.NDArray[np.int32],
    quarantine: Iterable[dict[str, Any]],
) -> Artifact:
    """Write what belongs to the shards of a folder; with the manifest it is an artifact.

    `rows` has the number of rows of each shard. `train` and `evaluation` number rows through all
    shards. `counts` [n, 6] has the tokens of each side of all rows, then the trained ones.
    Preparations that finish at the same time write the same bytes. Raises DataError if the folder
    cannot be written.
    """
    names = [(shard.name, count) for shard, count in zip(shards, rows, strict=True)]
    try:
        with _in_one_step(path / "train.arrow") as file:
            _write_index(file, names, train, counts)
        with _in_one_step(path / "eval.arrow") as file:
            _write_index(file, names, evaluation, counts)
        with _in_one_step(path / "quarantine.jsonl") as file:
            _write_lines(file, quarantine)
        summary = _complete(summary, path, shards)
        with _in_one_step(path / MANIFEST) as file:
            file.write((json.dumps(summary.to_json(), indent=2) + "\n").encode())
    except OSError as error:
        raise DataError(
            f"cannot write the prepared data to {path}: {error.strerror or error}"
        ) from error
    return open_artifact(path)


def _view(column: pa.ListArray) -> tuple[npt.NDArray[np.int32], IntArray]:
    return column.offsets.to_numpy(), column.values.to_numpy()


def _idle_s(folder: Path) -> float:
    """Seconds since something was written into a folder."""
    newest = time.time() if not folder.exists() else 0.0
    for entry in (folder, *folder.glob("*")):
        with suppress(FileNotFoundError):  # another preparation has just renamed or deleted it
            newest = max(newest, entry.stat().st_mtime)
    return time.time() - newest


@contextmanager
def _in_one_step(path: Path) -> Iterator[IO[bytes]]:
    """A file that is written beside its place, made durable, and renamed in one step."""
    building = path.with_name(f"{WRITING}{uuid.uuid4().hex[:8]}")
    try:
        with building.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        building.replace(path)
    finally:
        building.unlink(missing_ok=True)


def _write_index(
    file: IO[bytes],
    shards: Sequence[tuple[str, int]],
    rows: npt.ArrayLike,
    counts: npt.NDArray[np.int32],
) -> None:
    schema = INDEX.with_metadata({_SHARDS: json.dumps(shards)})
    numbers = np.asarray(rows, dtype=np.int64)
    columns = [numbers, *counts[numbers].T]
    with pa.ipc.new_file(file, schema) as writer:
        writer.write_table(pa.table([pa.array(column) for column in columns], schema=schema))


def _write_lines(file: IO[bytes], rows: Iterable[dict[str, Any]]) -> None:
    # ensure_ascii keeps the file readable if a detail quotes text that is not valid Unicode.
    file.writelines(json.dumps(row, ensure_ascii=True).encode() + b"\n" for row in rows)


def _complete(summary: Summary, folder: Path, shards: Sequence[Shard]) -> Summary:
    files = {shard.name: {"size": shard.size, "sha256": shard.sha256} for shard in shards}
    for name in ("eval.arrow", "quarantine.jsonl", "train.arrow"):
        path = folder / name
        files[name] = {"size": path.stat().st_size, "sha256": _sha256(path)}
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


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
