"""Preference pairs in, prepared artifact out; the parallel part runs on Ray Data.

The order: read the raw rows and hash them with the settings; a matching artifact is used as it is,
without Ray. Otherwise recognise, check, render and tokenise, in parallel where the rows are many;
then drop duplicates, quarantine bad rows, split, write.
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
"""Less text than this is tokenised here in less time than Ray and its workers take to start."""
_TASKS_PER_CORE = 4
_MOST_BLOCKS = 16
_BUSY_AFTER_S, _START_S = 30.0, 60.0
"""A free CPU has a process on it by then, by the latter even on a machine that is overloaded."""
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

    `storage` is the local folder of what is `kept_in`. `tokenizer` has its chat template set;
    `tokenizer_fingerprint` stands for its files. `announce` gets one line for each thing the user
    should know. Ray is started for much data if it is not running, and left running for the caller.
    Raises DataError for what cannot be read, for too many bad rows, and where no pair is left;
    ResourceError where RAY_ADDRESS names a cluster that cannot be joined, or whose CPUs others hold
    for `queue_timeout` seconds.
    """
    PairTokeniser(
        tokenizer
    )  # for what it refuses: a tokenizer that cannot do it is named before any file is read
    if date := fixed_date(tokenizer):
        announce(
            f"the chat template asks for today's date: it always gets {date}, so that tokens stay "
            "the same"
        )
    sources = read_all(data)
    if data.columns is not None:
        check_columns(sources, data.columns, announce)
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
            announce_unused(raw.source.source, raw, data.columns, announce)
        rows = _process(sources, tokenizer, data, partial(_wait_for_room, queue_timeout, announce))
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
        # Another run may have stored the same pairs meanwhile, and its workers read them: those
        # stay.
        is_kept = not is_kept and kept_in.holds(path / MANIFEST)
    if not is_kept:
        kept_in.store_folder(path, MANIFEST)
    for line in describe(found.summary):
        announce(line)
    return found


def _settings(
    data: DataConfig, tokenizer: Any, tokenizer_fingerprint: str, seed: int
) -> dict[str, Any]:
    """All that shapes the artifact but the rows; the seed only where something is drawn."""
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
    wait_for_room: Callable[[], None],
) -> pa.Table:
    """RESULT rows of all sources, in order: here where they are few, else on every core of Ray."""
    blocks = [block for raw in sources for block in raw.blocks]
    limits = Limits(data.max_prompt_length, data.max_length, data.overlong)
    processor = RowProcessor(tokenizer, [raw.label for raw in sources], limits, data.columns)
    if sum(block.nbytes for block in blocks) < _ALONE_BYTES:
        if address := os.environ.get("RAY_ADDRESS"):
            refuse_unreachable(address)  # as for many rows: the run itself would be refused
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


def _wait_for_room(queue_timeout: float, announce: Announce) -> None:
    """Raise ResourceError where no CPU of a cluster becomes free in time; Ray Data itself would
    wait without end.
    """
    import ray

    has_started = ray.remote(
        lambda: True
    ).remote()  # travels by value: no worker imports this module for it
    patience = max(queue_timeout, _START_S)
    if not ray.wait([has_started], timeout=_BUSY_AFTER_S)[0]:
        announce("the cluster is busy; waiting for a free CPU to prepare data on")
    try:
        ray.get(has_started, timeout=patience - _BUSY_AFTER_S)
    except ray.exceptions.GetTimeoutError as error:
        raise ResourceError(
            f"no CPU of the Ray cluster was free within {patience:g} s to prepare data on; is it "
            "busy?"
        ) from error


def _as_tasks(blocks: Sequence[pa.Table]) -> list[pa.Table]:
    """Consecutive blocks joined to a few tasks a core: Ray Data leaves a core idle for about 0.1 s
    after each task.
    """
    import ray

    cores = max(1, int(ray.cluster_resources().get("CPU", 1)))
    size = min(_MOST_BLOCKS, max(1, len(blocks) // (_TASKS_PER_CORE * cores)))
    return [pa.concat_tables(blocks[start : start + size]) for start in range(0, len(blocks), size)]


def _process_block(processor: Any, task: pa.Table) -> pa.Table:
    """Runs in a Ray worker: one process a core, so the tokenizer must not start threads of its
    own.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # A block at a time: what a tokenizer returns takes many times the memory of its text.
    blocks = (pa.Table.from_batches([batch]) for batch in task.to_batches())
    return pa.concat_tables([_get_processor(processor)(block) for block in blocks])


@lru_cache(maxsize=1)
def _get_processor(reference: Any) -> RowProcessor:
    """The processor behind an object reference; unpacking a large vocabulary for each block would
    cost more than it.
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
        if row["code"] not in ("", OVERLONG)
    )
    return write_artifact(
        storage, summary, _taken(rows, selection.train), _taken(rows, selection.eval), quarantine
    )


def _taken(rows: pa.Table, indices: Sequence[int]) -> Iterator[pa.Table]:
    """The chosen rows, a batch at a time, so that no second copy of everything is held."""
    for start in range(0, len(indices), BATCH_ROWS):
        yield rows.take(pa.array(indices[start : start + BATCH_ROWS], type=pa.int64()))
