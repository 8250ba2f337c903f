"""Makes the shards of all sources: in this process if there are few rows, else under Ray Data.

Workers read parts of files. The rows of other sources are read here and sent in waves.
"""

import os
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from orpo_ray.data.maker import ShardMaker, parts_of, rows_of, take, task_of, tasks_of
from orpo_ray.data.parts import Part
from orpo_ray.data.raw import ChangedError, RawSource
from orpo_ray.data.rows import RowProcessor
from orpo_ray.data.shards import Place, Shard, save, whole_shards
from orpo_ray.errors import ResourceError
from orpo_ray.ray_runtime import quiet_context, refuse_unreachable, start_ray
from orpo_ray.runs.console import Announce
from orpo_ray.storage import Storage

_ALONE_BYTES = 2 * 2**20
"""Less text than this is tokenised in this process: starting Ray would take longer."""
_WAVE_BYTES = 128 * 2**20
"""Rows that this process reads go to Ray in waves of this size, and not all at once."""
_BUSY_AFTER_S = 30.0
"""A worker process starts on a free CPU in less time than this."""
_START_S = 60.0
"""On an overloaded machine a worker process may take this long to start.

A shorter `queue_timeout` is raised to this.
"""


def make_shards(
    sources: Sequence[RawSource],
    processor: RowProcessor,
    path: Path,
    *,
    kept_in: Storage,
    announce: Announce,
    queue_timeout: float,
) -> list[Shard]:
    """The shards of all sources in order, in the folder `path`.

    Those that an earlier preparation has made are used. Raises DataError if a file changes
    meanwhile or a shard cannot be written, and ResourceError if the cluster has no free CPU for
    `queue_timeout` seconds.
    """
    parts = parts_of(sources)
    shards = whole_shards(path)
    if shards:
        announce(f"shards of an earlier preparation, used again: {len(shards)}")
        kept_in.store(*(path / shard.name for shard in shards.values()))
    size = sum(raw.size for raw in sources)
    with _sign_in(path.parent) as sign:
        maker = ShardMaker(processor, parts=parts, folder=path, sign=sign, kept_in=kept_in)
        tasks = tasks_of(sources, parts, done=set(shards))
        if size < _ALONE_BYTES:
            if address := os.environ.get("RAY_ADDRESS"):
                refuse_unreachable(address)  # few rows do not need it, but the run itself does
            found: Iterable[Shard] = (_taken(maker(task), path, kept_in) for task in tasks)
        else:
            announce(f"preparing {size / 1e6:,.0f} MB of pairs under Ray")
            start_ray(min(size, _WAVE_BYTES))
            _wait_for_room(queue_timeout, announce)
            found = _made_with_ray(maker, tasks, parts, path, kept_in)
        shards |= {shard.place: shard for shard in found}
    for raw in sources:
        if raw.cut is not None and not raw.cut.is_here():
            raise ChangedError(raw.source.source)
    return [shards[place] for place in sorted(shards)]


@contextmanager
def _sign_in(folder: Path) -> Iterator[Path]:
    """A folder that shows a worker that it sees the same files as this process."""
    sign = folder / f".preparing-{uuid.uuid4().hex[:8]}"
    sign.mkdir()
    try:
        yield sign
    finally:
        with suppress(FileNotFoundError):
            sign.rmdir()


def _made_with_ray(
    maker: ShardMaker,
    tasks: Iterable[pa.Table],
    parts: Mapping[Place, Part],
    path: Path,
    kept_in: Storage,
) -> Iterator[Shard]:
    import ray

    shared = ray.put(maker)
    unread: list[Place] = []
    for made in _map_with_ray(shared, tasks):
        shard = _taken(made, path, kept_in)
        if shard.name:
            yield shard
        else:
            unread.append(shard.place)
    empty: list[Place] = []

    def read_here() -> Iterator[pa.Table]:
        for place in unread:
            task = rows_of(place, parts[place])
            if len(task):
                yield task
            else:
                empty.append(place)  # a task without rows could not say its place

    yield from (_taken(made, path, kept_in) for made in _map_with_ray(shared, read_here()))
    yield from (_taken(maker(task_of(place)), path, kept_in) for place in empty)


def _map_with_ray(shared: Any, tasks: Iterable[pa.Table]) -> Iterator[pa.Table]:
    import ray.data

    with quiet_context():
        for wave in _waves(tasks):
            # Tasks, not actors: idle actors would keep CPUs. Ray uses a task's process again for
            # later tasks.
            made = ray.data.from_arrow(wave).map_batches(
                partial(_make, shared), batch_size=None, batch_format="pyarrow"
            )
            tables: Iterable[Any] = made.iter_batches(batch_size=None, batch_format="pyarrow")
            for table in tables:
                yield from (table.slice(row, 1) for row in range(len(table)))


def _waves(tasks: Iterable[pa.Table]) -> Iterator[list[pa.Table]]:
    wave: list[pa.Table] = []
    for task in tasks:
        wave.append(task)
        if sum(one.nbytes for one in wave) >= _WAVE_BYTES:
            yield wave
            wave = []
    if wave:
        yield wave


def _taken(made: pa.Table, path: Path, kept_in: Storage) -> Shard:
    """A shard that a worker has made, whose file is in the folder here from now on."""
    shard, data = take(made)
    if data is not None:
        save(path, shard, data)
    elif shard.name and not (path / shard.name).exists():
        kept_in.fetch(path / shard.name)
    return shard


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


def _make(maker: Any, task: pa.Table) -> pa.Table:
    """Runs in a Ray worker. Each core has one, so the tokenizer must not start threads."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    return _get_maker(maker)(task)


@lru_cache(maxsize=1)
def _get_maker(reference: Any) -> ShardMaker:
    """The maker behind an object reference, unpacked once in each worker.

    Unpacking a large vocabulary takes longer than processing a block.
    """
    import ray

    maker: ShardMaker = ray.get(reference)
    return maker
