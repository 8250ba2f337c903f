"""Preference pairs in, prepared artifact out; the parallel part runs on Ray Data.

The order: read the raw rows and hash them with the settings; a matching artifact is used as it is,
without Ray. Otherwise recognise, check, render and tokenise, in parallel where the rows are many;
then drop duplicates, quarantine bad rows, split, write.
"""

import atexit
import hashlib
import logging
import os
import signal
import socket
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa

from orpo_ray.config.data import Columns, DataConfig, Source
from orpo_ray.data.checks import OVERLONG, explain
from orpo_ray.data.pairs import Refusal
from orpo_ray.data.rows import RAW, RowProcessor, lacks_columns, refuse_whole_file
from orpo_ray.data.select import Selection, select_pairs
from orpo_ray.data.sources import RawRow, read_rows, source_labels
from orpo_ray.data.store import (
    BATCH_ROWS,
    MANIFEST,
    Artifact,
    Summary,
    artifact_path,
    content_hash,
    find_artifact,
    write_artifact,
)
from orpo_ray.data.summary import describe, summarise
from orpo_ray.data.tokenise import Limits, PairTokeniser, fixed_date
from orpo_ray.errors import DataError, ResourceError
from orpo_ray.storage import LOCAL, Storage

_ALONE_BYTES = 2 * 2**20
"""Less text than this is tokenised here in less time than Ray and its workers take to start."""
_BLOCK_ROWS = 512
_BLOCK_BYTES = 2**20
_TASKS_PER_CORE = 4
_MOST_BLOCKS = 16
_TOP_REASONS = 3
_GOODBYE_POLL_S = 0.02
_CONNECT_S = 5.0
_BUSY_AFTER_S, _START_S = 30.0, 60.0
"""A free CPU has a process on it by then, by the latter even on a machine that is overloaded."""
ROOM_S = 120
"""The longest that anything waits for CPUs or GPUs that others hold; what starts there, imports too, is part of it."""

# A Ray of our own has no dashboard: what processes would gather for one takes 5 % of a machine with two cores, and the
# dashboard's own processes a gigabyte.
_IDLE_RAY = {
    "RAY_enable_metrics_collection": "false",
    "RAY_event_stats": "false",
    "RAY_task_events_report_interval_ms": "0",
}
_RENDERERS = ("transformers", "tokenizers", "jinja2")
_OBJECT_STORE_BYTES = (256 * 2**20, 2 * 2**30)


@dataclass(frozen=True)
class _RawSource:
    """All raw rows of one source, and the hash of their content."""

    source: Source
    label: str
    split: str
    blocks: list[pa.Table]
    digest: str

    @property
    def rows(self) -> int:
        return sum(block.num_rows for block in self.blocks)

    def __iter__(self) -> Iterator[RawRow]:
        for block in self.blocks:
            for row in block.to_pylist():
                yield RawRow(row["line"], row["text"], row["problem"])


def prepare(
    data: DataConfig,
    tokenizer: Any,
    tokenizer_fingerprint: str,
    storage: Path,
    seed: int,
    announce: Callable[[str], None],
    kept_in: Storage = LOCAL,
    queue_timeout: float = ROOM_S,
) -> Artifact:
    """Turn the sources of a run into tokenised pairs, or find them already made.

    `storage` is the local folder of what is `kept_in`. `tokenizer` has its chat template set; `tokenizer_fingerprint`
    stands for its files. `announce` gets one line for each thing the user should know. Ray is started
    for much data if it is not running, and left running for the caller.
    Raises DataError for what cannot be read, for too many bad rows, and where no pair is left; ResourceError where
    RAY_ADDRESS names a cluster that cannot be joined, or whose CPUs others hold for `queue_timeout` seconds.
    """
    PairTokeniser(tokenizer)  # for what it refuses: a tokenizer that cannot do it is named before any file is read
    if date := fixed_date(tokenizer):
        announce(f"the chat template asks for today's date: it always gets {date}, so that tokens stay the same")
    sources = _read_all(data)
    if data.columns is not None:
        _check_columns(sources, data.columns, announce)
    settings = _settings(data, tokenizer, tokenizer_fingerprint, seed)
    digest = content_hash(settings, [[raw.label, raw.split, raw.digest] for raw in sources])
    path = artifact_path(storage, digest)
    is_kept = kept_in.fetch_folder(path, MANIFEST)
    found = find_artifact(storage, digest, announce)
    if found is not None:
        announce(f"prepared data found in {kept_in.place_of(found.path)}")
    else:
        for raw in sources:
            refuse_whole_file(raw.source.source, raw, data.columns)
        rows = _process(sources, tokenizer, data, partial(_wait_for_room, queue_timeout, announce))
        _refuse_bad_data(rows, sources, data)
        selection = select_pairs(rows, data.train, None if data.eval else data.eval_fraction, seed)
        origins = [(raw.source, raw.label, raw.split) for raw in sources]
        summary = summarise(rows, selection, origins, not data.eval, digest, settings)
        _refuse_empty(summary, data)
        found = _write(storage, summary, rows, sources, selection)
        # Another run may have stored the same pairs meanwhile, and its workers read them: those stay.
        is_kept = not is_kept and kept_in.holds(path / MANIFEST)
    if not is_kept:
        kept_in.store_folder(path, MANIFEST)
    for line in describe(found.summary):
        announce(line)
    return found


# --- reading ----------------------------------------------------------------------------------------------------


def _read_all(data: DataConfig) -> list[_RawSource]:
    everything = [*data.train, *data.eval]
    labels = source_labels(everything)
    splits = ["train"] * len(data.train) + ["eval"] * len(data.eval)
    return [
        _read_source(number, source, label, split)
        for number, (source, label, split) in enumerate(zip(everything, labels, splits, strict=True))
    ]


def _read_source(number: int, source: Source, label: str, split: str) -> _RawSource:
    content = hashlib.sha256()
    blocks: list[pa.Table] = []
    open_rows: list[dict[str, Any]] = []
    size = 0
    for row in read_rows(source):
        content.update(f"{row.line}:{row.problem}:{len(row.text)}:".encode() + row.text)
        open_rows.append({"source": number, "line": row.line, "text": row.text, "problem": row.problem})
        size += len(row.text)
        if len(open_rows) == _BLOCK_ROWS or size > _BLOCK_BYTES:
            blocks.append(pa.Table.from_pylist(open_rows, schema=RAW))
            open_rows, size = [], 0
    if open_rows:
        blocks.append(pa.Table.from_pylist(open_rows, schema=RAW))
    if not blocks:
        raise DataError(f"{source.source}: no rows in it")
    return _RawSource(source, label, split, blocks, content.hexdigest())


def _check_columns(sources: Sequence[_RawSource], columns: Columns, announce: Callable[[str], None]) -> None:
    """Raise DataError where no source has the named columns; say which sources are read without them."""
    found = [(raw.source.source, lacks_columns(raw, columns)) for raw in sources]
    lacking = [(name, why) for name, why in found if why is not None]
    if len(lacking) == len(found):
        name, why = lacking[0]
        raise DataError(f"data.columns: {name}: {why}")
    for name, why in lacking:
        announce(f"data.columns do not apply to {name}, whose shape is recognised instead: {why}")


def _settings(data: DataConfig, tokenizer: Any, tokenizer_fingerprint: str, seed: int) -> dict[str, Any]:
    """All that shapes the artifact but the rows; the seed only where something is drawn."""
    draws = not data.eval or any(source.weight % 1 for source in data.train)
    policies = data.model_dump(mode="json", exclude={"train", "eval", "eval_fraction"})
    return {
        **policies,
        "eval_fraction": None if data.eval else data.eval_fraction,
        "weights": [source.weight for source in data.train],
        "tokenizer": tokenizer_fingerprint,
        "chat_template": tokenizer.chat_template,
        "date": fixed_date(tokenizer),
        "versions": {name: version(name) for name in _RENDERERS},
        "seed": seed if draws else None,
    }


# --- the parallel part ------------------------------------------------------------------------------------------


def _process(
    sources: Sequence[_RawSource],
    tokenizer: Any,
    data: DataConfig,
    wait_for_room: Callable[[], None],
) -> pa.Table:
    """RESULT rows of all sources, in order: here where they are few, else on every core of Ray."""
    blocks = [block for raw in sources for block in raw.blocks]
    limits = Limits(data.max_prompt_length, data.max_length, data.overlong)
    processor = RowProcessor(tokenizer, [raw.label for raw in sources], limits, data.columns)
    if sum(block.nbytes for block in blocks) < _ALONE_BYTES:
        if address := os.environ.get("RAY_ADDRESS"):
            _refuse_unreachable(address)  # as for many rows: the run itself would be refused
        return pa.concat_tables(map(processor, blocks))
    return _process_with_ray(blocks, processor, wait_for_room)


def _process_with_ray(
    blocks: Sequence[pa.Table], processor: RowProcessor, wait_for_room: Callable[[], None]
) -> pa.Table:
    start_ray(sum(block.nbytes for block in blocks))
    import ray
    import ray.data

    wait_for_room()
    shared = ray.put(processor)
    with quiet_context():
        # Tasks, not actors: they need no CPU of their own, and the next preparation finds the
        # processes warm.
        processed = ray.data.from_arrow(_as_tasks(blocks)).map_batches(
            partial(_process_block, shared), batch_size=None, batch_format="pyarrow"
        )
        tables = processed.iter_batches(batch_size=None, batch_format="pyarrow")
        return pa.concat_tables(tables)


def _wait_for_room(queue_timeout: float, announce: Callable[[str], None]) -> None:
    """Raise ResourceError where no CPU of a cluster becomes free in time; Ray Data itself would wait without end."""
    import ray

    has_started = ray.remote(lambda: True).remote()  # travels by value: no worker imports this module for it
    patience = max(queue_timeout, _START_S)
    if not ray.wait([has_started], timeout=_BUSY_AFTER_S)[0]:
        announce("the cluster is busy; waiting for a free CPU to prepare data on")
    try:
        ray.get(has_started, timeout=patience - _BUSY_AFTER_S)
    except ray.exceptions.GetTimeoutError as error:
        raise ResourceError(
            f"no CPU of the Ray cluster was free within {patience:g} s to prepare data on; is it busy?"
        ) from error


def _as_tasks(blocks: Sequence[pa.Table]) -> list[pa.Table]:
    """Consecutive blocks joined to a few tasks a core: Ray Data leaves a core idle for about 0.1 s after each task."""
    import ray

    cores = max(1, int(ray.cluster_resources().get("CPU", 1)))
    size = min(_MOST_BLOCKS, max(1, len(blocks) // (_TASKS_PER_CORE * cores)))
    return [pa.concat_tables(blocks[start : start + size]) for start in range(0, len(blocks), size)]


def _process_block(processor: Any, task: pa.Table) -> pa.Table:
    """Runs in a Ray worker: one process a core, so the tokenizer must not start threads of its own."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # A block at a time: what a tokenizer returns takes many times the memory of its text.
    blocks = (pa.Table.from_batches([batch]) for batch in task.to_batches())
    return pa.concat_tables([_get_processor(processor)(block) for block in blocks])


@lru_cache(maxsize=1)
def _get_processor(reference: Any) -> RowProcessor:
    """The processor behind an object reference; unpacking a large vocabulary for each block would cost more than it."""
    import ray

    processor: RowProcessor = ray.get(reference)
    return processor


@contextmanager
def quiet_context() -> Iterator[None]:
    """Ray Data with rows kept in order, and silent but for errors; the caller's settings come back afterwards."""
    import ray

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Ray's copy reads its own deprecated settings
        context = ray.data.DataContext.get_current().copy()
    context.execution_options.preserve_order = True
    # Shares of the cluster for several operators; the only one we have would start with one task for a second.
    context.op_resource_reservation_enabled = False
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    console = [h for h in logging.getLogger("ray.data").handlers if isinstance(h, logging.StreamHandler)]
    levels = [handler.level for handler in console]
    for handler in console:
        handler.setLevel(logging.ERROR)
    try:
        with ray.data.DataContext.current(context):
            yield
    finally:
        for handler, level in zip(console, levels, strict=True):
            handler.setLevel(level)


def start_ray(raw_bytes: int | None = None, verbose: bool = False) -> None:
    """Start Ray on this machine, or join the cluster that RAY_ADDRESS names; nothing where it already runs.

    `raw_bytes`: how much data will pass through it, if known. `verbose`: show what its processes log.
    """
    # Workers that ask for no GPU keep CUDA_VISIBLE_DEVICES: the default of Ray 2.60; older ones empty it and warn.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    if ray.is_initialized():
        return
    level = logging.INFO if verbose else logging.ERROR
    quiet: dict[str, Any] = {"log_to_driver": verbose, "logging_level": level}
    address = os.environ.get("RAY_ADDRESS")
    if address:
        _refuse_unreachable(address)
        try:
            with _signals_kept():
                ray.init(**quiet)
        except ConnectionError as error:
            raise ResourceError(f"the Ray cluster of RAY_ADDRESS ({address}) cannot be joined: {error}") from error
        return
    # Rows go in as text and come out as token ids; more than this spills to disk, which is slower but works.
    least, most = _OBJECT_STORE_BYTES
    store = most if raw_bytes is None else min(max(4 * raw_bytes, least), most)
    # What stops a service or a batch job sends SIGTERM to every process at once. Ray's own, which inherit this mask,
    # must outlive it until the workers have saved their checkpoint.
    os.environ |= {name: os.environ.get(name, value) for name, value in _IDLE_RAY.items()}
    others = psutil.Process().children()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        with _signals_kept(), _few_helpers(log_monitor=verbose):
            # "local": it would otherwise join whatever Ray it finds on this machine.
            ray.init(address="local", object_store_memory=store, include_dashboard=False, **quiet)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    leaving = threading.Event()
    started = [child for child in psutil.Process().children() if child not in others]
    threading.Thread(target=_end_with_driver, args=(started, leaving), daemon=True).start()
    atexit.register(leaving.set)


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Answer SIGTERM as before `ray.init`, which puts a handler of its own there, in Python and in C.

    The one in C prints a stack and sets an alarm that aborts the process three seconds later, whatever it is at.
    """
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


@contextmanager
def _few_helpers(log_monitor: bool) -> Iterator[None]:
    """Have `ray.init` start no process that has no work in a Ray of our own.

    There is no dashboard to serve, and no server to add. `log_monitor`: reads the logs of Ray's
    processes ten times a second for a driver that listens. The seams are private to Ray: a test
    counts the processes.
    """
    from ray._private import parameter
    from ray._private.node import Node

    params, start_api_server = parameter.RayParams, Node.start_api_server

    class LeanParams(params):  # type: ignore[valid-type, misc]
        def __init__(self, **options: Any) -> None:
            super().__init__(**options | {"no_monitor": True, "include_log_monitor": log_monitor})

    parameter.RayParams = LeanParams  # type: ignore[misc, assignment]
    Node.start_api_server = lambda *_, **__: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        parameter.RayParams = params  # type: ignore[misc]
        Node.start_api_server = start_api_server  # type: ignore[method-assign]


def owns_ray() -> bool:
    """Whether the Ray that runs here was started by this process, so that nothing of it outlives this process."""
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):
            if child.name() == "raylet":
                return True
    return False


def _refuse_unreachable(address: str) -> None:
    """Raise ResourceError where nobody listens at HOST:PORT; Ray itself would try for minutes, deaf to signals."""
    host, _, port = address.rpartition(":")
    if "://" in address or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_S).close()
    except OSError as error:
        raise ResourceError(
            f"RAY_ADDRESS: no Ray cluster answers at {address} ({error}); start it, or unset RAY_ADDRESS to use this "
            "machine alone"
        ) from error


def _end_with_driver(started: list[psutil.Process], leaving: threading.Event) -> None:
    """Kill Ray's processes, and what they started, once this one has said goodbye to them.

    Deaf to SIGTERM, each would keep Ray's own clean-up waiting for a second, and some would live on for a minute.
    """
    import ray

    leaving.wait()
    family = list(started)
    for process in started:
        with suppress(psutil.NoSuchProcess):
            family += process.children(recursive=True)
    while ray.is_initialized():
        time.sleep(_GOODBYE_POLL_S)
    for process in family:
        with suppress(psutil.NoSuchProcess):
            process.kill()


# --- judging and writing ----------------------------------------------------------------------------------------


def _refuse_bad_data(rows: pa.Table, sources: Sequence[_RawSource], data: DataConfig) -> None:
    """Raise DataError where the user's policies say that such data must not be trained on."""
    failures = [row for row in rows.select(["source", "line", "code", "detail"]).to_pylist() if row["code"]]
    overlong = next((row for row in failures if row["code"] == OVERLONG), None)
    if overlong and data.overlong == "error":
        raise DataError(f"{_where(overlong, sources)} (data.overlong is error)")
    bad = [row for row in failures if row["code"] != OVERLONG]
    if bad and data.bad_rows == "fail":
        raise DataError(f"{_where(bad[0], sources)} (data.bad_rows is fail)")
    if len(bad) > data.max_bad_fraction * rows.num_rows:
        top = Counter(row["code"] for row in bad).most_common(_TOP_REASONS)
        first = {code: next(row for row in bad if row["code"] == code) for code, _ in top}
        reasons = "; ".join(f"{count} x {code}, first {_where(first[code], sources)}" for code, count in top)
        raise DataError(
            f"{len(bad)} of {rows.num_rows} rows are bad, more than data.max_bad_fraction ({data.max_bad_fraction:g}) "
            f"allows: {reasons}"
        )


def _where(row: dict[str, Any], sources: Sequence[_RawSource]) -> str:
    return f"{sources[row['source']].source.source}:{row['line']}: {explain(Refusal(row['code'], row['detail']))}"


def _refuse_empty(summary: Summary, data: DataConfig) -> None:
    for split, count in (("train", summary.train), ("eval", summary.eval)):
        if not count and (split == "train" or data.eval):
            if split == "train":
                _refuse_weightless(summary)
            why = f"; {summary.overlong} are overlong" if summary.overlong else ""
            raise DataError(f"data.{split}: no usable pair is left of {summary.read} rows{why}")


def _refuse_weightless(summary: Summary) -> None:
    """Raise DataError where there are training pairs and only a weight near zero leaves none of them."""
    for source in summary.sources:
        if source["used_for"] == "train" and source["kept"] and source["weight"] < 1:
            raise DataError(
                f"data.train: weight {source['weight']:g} of {source['source']} rounds to no training pair "
                f"({source['kept']} usable); raise the weight"
            )


def _write(
    storage: Path, summary: Summary, rows: pa.Table, sources: Sequence[_RawSource], selection: Selection
) -> Artifact:
    quarantine = (
        {
            "file": sources[row["source"]].source.source,
            "line": row["line"],
            "reason": row["code"],
            "detail": row["detail"],
            "split": sources[row["source"]].split,
        }
        for row in rows.select(["source", "line", "code", "detail"]).to_pylist()
        if row["code"] not in ("", OVERLONG)
    )
    return write_artifact(storage, summary, _taken(rows, selection.train), _taken(rows, selection.eval), quarantine)


def _taken(rows: pa.Table, indices: Sequence[int]) -> Iterator[pa.Table]:
    """The chosen rows, a batch at a time, so that no second copy of everything is held."""
    for start in range(0, len(indices), BATCH_ROWS):
        yield rows.take(pa.array(indices[start : start + BATCH_ROWS], type=pa.int64()))
