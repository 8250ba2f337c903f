"""Preference pairs in, prepared artifact out; the parallel part runs on Ray Data.

First the raw rows are read and hashed together with the settings. If there is an artifact with
that hash, it is used as it is, without Ray. Otherwise the rows are recognised, checked, rendered
and tokenised, in parallel if there are many. Then duplicates are dropped, bad rows are put into
quarantine, held-out pairs are chosen, and the artifact is written.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa

from orpo_ray.config.data import DataConfig
from orpo_ray.data.checks import OVERLONG
from orpo_ray.data.raw import RawSource, announce_unused, check_columns, read_all
from orpo_ray.data.refusals import refuse_bad_data, refuse_empty
from orpo_ray.data.rows import RowProcessor, refuse_whole_file
from orpo_ray.data.select import Selection, select_pairs
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
from orpo_ray.errors import ResourceError
from orpo_ray.ray_runtime import ROOM_S, quiet_context, refuse_unreachable, start_ray
from orpo_ray.runs.console import Announce
from orpo_ray.storage import LOCAL, Storage

_ALONE_BYTES = 2 * 2**20
"""Less text than this is tokenised in this process: starting Ray would take longer."""
_TASKS_PER_CORE = 4
_MOST_BLOCKS = 16
_BUSY_AFTER_S = 30.0
"""A worker process starts on a free CPU in less time than this."""
_START_S = 60.0
"""On an overloaded machine a worker process may take this long to start.

A shorter `queue_timeout` is raised to this.
"""
_RENDERERS = ("transformers", "tokenizers", "jinja2")


def prepare(
    data: DataConfig,
    tokenizer: Any,
    tokenizer_fingerprint: str,
    storage: Path,
    seed: int,
    announce: Announce,
    kept_in: Storage = LOCAL,
    queue_timeout: float = ROOM_S,
) -> Artifact:
    """Turn the sources of a run into tokenised pairs, or find them already made.

    `storage` is the local folder. `kept_in` is the storage that keeps it, maybe in a bucket.
    `tokenizer` has its chat template set; `tokenizer_fingerprint` is a hash of its files.
    `announce` gets one line for each thing that the user should know. Ray is started if there is
    much data, and it keeps running for the caller.

    Raises DataError if a source cannot be read, if too many rows are bad, or if no pair is left.
    Raises ResourceError if RAY_ADDRESS names a cluster that cannot be joined, or if the cluster
    has no free CPU for `queue_timeout` seconds.
    """
    PairTokeniser(tokenizer)  # refuses an unfit tokenizer before any file is read
    if date := fixed_date(tokenizer):
        announce(
            f"the chat template asks for today's date: it always gets {date}, so that tokens stay "
            "the same"
        )
    sources = read_all(data)
    if data.columns is not None:
        check_columns(sources, data.columns, announce)
    announce_unused(sources, data.columns, announce)
    settings = _settings(data, tokenizer, tokenizer_fingerprint, seed)
    digest = content_hash(settings, [[raw.label, raw.split, raw.digest] for raw in sources])
    path = artifact_path(storage, digest)
    was_kept = kept_in.fetch_folder(path, MANIFEST)
    found = find_artifact(storage, digest, announce)
    if found is not None:
        announce(f"prepared data found in {kept_in.place_of(found.path)}")
        stays = was_kept
    else:
        for raw in sources:
            refuse_whole_file(raw.source.source, raw, data.columns)
        rows = _process(sources, tokenizer, data, announce, queue_timeout)
        refuse_bad_data(rows, sources, data)
        selection = select_pairs(rows, data.train, None if data.eval else data.eval_fraction, seed)
        origins = [(raw.source, raw.label, raw.split) for raw in sources]
        summary = summarise(
            rows,
            selection,
            origins,
            held_out=not data.eval,
            digest=digest,
            settings=settings,
        )
        refuse_empty(summary, data)
        found = _write(storage, summary, rows, sources, selection)
        # Another run may have stored the same pairs meanwhile. Its workers read them, so they stay.
        # If the storage had these pairs but find_artifact refused them, its copy is damaged. The
        # new copy replaces it.
        stays = not was_kept and kept_in.holds(path / MANIFEST)
    if not stays:
        kept_in.store_folder(path, MANIFEST)
    for line in describe(found.summary):
        announce(line)
    return found


def _settings(
    data: DataConfig, tokenizer: Any, tokenizer_fingerprint: str, seed: int
) -> dict[str, Any]:
    """Everything that shapes the artifact, except the rows.

    The seed is included only if something is drawn at random.
    """
    draws = not data.eval or any(source.weight % 1 for source in data.train)
    policies = data.model_dump(mode="json", exclude={"train", "eval", "eval_fraction", "columns"})
    columns = data.columns and data.columns.model_dump(mode="json", exclude_none=True)
    return {
        **policies,
        "columns": columns,
        "eval_fraction": None if data.eval else data.eval_fraction,
        "weights": [source.weight for source in data.train],
        "tokenizer": tokenizer_fingerprint,
        "chat_template": tokenizer.chat_template,
        "date": fixed_date(tokenizer),
        "versions": {name: version(name) for name in _RENDERERS},
        "seed": seed if draws else None,
    }


# --- the parallel part ----------------------------------------------------------------------------


def _process(
    sources: Sequence[RawSource],
    tokenizer: Any,
    data: DataConfig,
    announce: Announce,
    queue_timeout: float,
) -> pa.Table:
    """RESULT rows of all sources, in order.

    If there are few rows, this process computes them. If there are many, Ray does, on all cores.
    """
    blocks = [block for raw in sources for block in raw.blocks]
    limits = Limits(data.max_prompt_length, data.max_length, data.overlong)
    processor = RowProcessor(tokenizer, [raw.label for raw in sources], limits, data.columns)
    if sum(block.nbytes for block in blocks) < _ALONE_BYTES:
        if address := os.environ.get("RAY_ADDRESS"):
            refuse_unreachable(address)  # few rows do not need it, but the run itself does
        return pa.concat_tables(map(processor, blocks))
    announce(f"preparing {sum(block.num_rows for block in blocks)} rows under Ray")
    return _process_with_ray(blocks, processor, partial(_wait_for_room, queue_timeout, announce))


def _process_with_ray(
    blocks: Sequence[pa.Table], processor: RowProcessor, wait_for_room: Callable[[], None]
) -> pa.Table:
    start_ray(sum(block.nbytes for block in blocks))
    import ray
    import ray.data

    wait_for_room()
    shared = ray.put(processor)
    with quiet_context():
        # Tasks, not actors: idle actors would keep CPUs. Ray uses a task's process again for later
        # tasks.
        processed = ray.data.from_arrow(_as_tasks(blocks)).map_batches(
            partial(_process_block, shared), batch_size=None, batch_format="pyarrow"
        )
        tables = processed.iter_batches(batch_size=None, batch_format="pyarrow")
        return pa.concat_tables(tables)


def _wait_for_room(queue_timeout: float, announce: Announce) -> None:
    """Raise ResourceError if no CPU of the cluster becomes free in time.

    Ray Data itself waits without end.
    """
    import ray

    # A lambda travels by value, so that no worker imports this module for it.
    has_started = ray.remote(lambda: True).remote()
    patience = max(queue_timeout, _START_S)
    if not ray.wait([has_started], timeout=_BUSY_AFTER_S)[0]:
        announce("the cluster is busy; waiting for a free CPU to prepare data on")
    try:
        ray.get(has_started, timeout=patience - _BUSY_AFTER_S)
    except ray.exceptions.GetTimeoutError as error:
        raise ResourceError(
            f"no CPU of the Ray cluster was free within {patience:g} s to prepare data on; "
            "is it busy?"
        ) from error


def _as_tasks(blocks: Sequence[pa.Table]) -> list[pa.Table]:
    """Join consecutive blocks, so that each core gets a few tasks.

    Ray Data leaves a core idle for about 0.1 s after each task.
    """
    import ray

    cores = max(1, int(ray.cluster_resources().get("CPU", 1)))
    size = min(_MOST_BLOCKS, max(1, len(blocks) // (_TASKS_PER_CORE * cores)))
    return [pa.concat_tables(blocks[start : start + size]) for start in range(0, len(blocks), size)]


def _process_block(processor: Any, task: pa.Table) -> pa.Table:
    """Runs in a Ray worker. Each core has one, so the tokenizer must not start threads."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # One block at a time: the output of a tokenizer takes many times the memory of its text.
    blocks = (pa.Table.from_batches([batch]) for batch in task.to_batches())
    return pa.concat_tables([_get_processor(processor)(block) for block in blocks])


@lru_cache(maxsize=1)
def _get_processor(reference: Any) -> RowProcessor:
    """The processor behind an object reference, unpacked once in each worker.

    Unpacking a large vocabulary takes longer than processing a block.
    """
    import ray

    processor: RowProcessor = ray.get(reference)
    return processor


def _write(
    storage: Path,
    summary: Summary,
    rows: pa.Table,
    sources: Sequence[RawSource],
    selection: Selection,
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
        if row["code"] and row["code"] not in OVERLONG
    )
    return write_artifact(
        storage, summary, _taken(rows, selection.train), _taken(rows, selection.eval), quarantine
    )


def _taken(rows: pa.Table, indices: Sequence[int]) -> Iterator[pa.Table]:
    """The selected rows, one batch at a time: a second copy of all rows would take much memory."""
    for start in range(0, len(indices), BATCH_ROWS):
        yield rows.take(pa.array(indices[start : start + BATCH_ROWS], type=pa.int64()))
