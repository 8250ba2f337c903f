"""Preference pairs in, prepared artifact out; the parallel part runs on Ray Data.

First the sources are read and hashed together with the settings. If there is an artifact with that
hash, it is used as it is, without Ray. Otherwise the rows are recognised, checked, rendered and
tokenised, a shard at a time, in parallel if there are many. Shards go to the storage as they are
made, and this process keeps a few facts of each row. From these, duplicates are dropped, bad rows
are put into quarantine, and held-out pairs are chosen.
"""

import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from orpo_ray.config.data import DataConfig
from orpo_ray.data.checks import OVERLONG
from orpo_ray.data.maker import ShardMaker, parts_of, rows_of, take, tasks_of
from orpo_ray.data.parts import Part
from orpo_ray.data.raw import RawSource, announce_unused, changed, check_columns, read_all
from orpo_ray.data.refusals import refuse_bad_data, refuse_empty
from orpo_ray.data.rows import RowProcessor, facts_of, refuse_whole_file
from orpo_ray.data.select import select_pairs
from orpo_ray.data.shards import Place, Shard, copy_from, save, whole_shards
from orpo_ray.data.store import (
    MANIFEST,
    SIDES,
    Artifact,
    artifact_path,
    begin_artifact,
    content_hash,
    find_artifact,
    finish_artifact,
)
from orpo_ray.data.summary import describe, summarise
from orpo_ray.data.tokenise import Limits, PairTokeniser, fixed_date
from orpo_ray.errors import DataError, ResourceError
from orpo_ray.ray_runtime import ROOM_S, quiet_context, refuse_unreachable, start_ray
from orpo_ray.runs.console import Announce
from orpo_ray.storage import LOCAL, Storage

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
    found, stored = find_artifact(storage, digest, announce), list[str]()
    if found is not None:
        announce(f"prepared data found in {kept_in.place_of(found.path)}")
        stays = was_kept
    else:
        for raw in sources:
            refuse_whole_file(raw.source.source, raw.first, data.columns)
        if not was_kept:
            kept_in.fetch_folder(path)  # the shards of a preparation that was killed
        with _discarded_if_refused(path, kept_in):
            begin_artifact(storage, digest)
            made = _make_shards(sources, tokenizer, data, path, kept_in, announce, queue_timeout)
            stored = [shard.name for shard in made]
            found = _finish(made, path, sources, data, seed, digest, settings)
        # Another run may have stored the same pairs meanwhile. Its workers read them, so they stay.
        # If the storage had these pairs but find_artifact refused them, its copy is damaged. The
        # new copy replaces it.
        stays = not was_kept and kept_in.holds(path / MANIFEST)
    if not stays:
        kept_in.store_folder(path, MANIFEST, stored)
    for line in describe(found.summary):
        announce(line)
    return found


@contextmanager
def _discarded_if_refused(path: Path, kept_in: Storage) -> Iterator[None]:
    """Leave nothing of data that is refused: another attempt has other rows or settings."""
    new = [folder for folder in path.parents if not folder.exists()]
    try:
        yield
    except DataError:
        shutil.rmtree(path, ignore_errors=True)
        kept_in.remove_folder(path, MANIFEST)
        for folder in new:
            with suppress(OSError):  # another preparation uses it
                folder.rmdir()
        raise


def _finish(
    shards: Sequence[Shard],
    path: Path,
    sources: Sequence[RawSource],
    data: DataConfig,
    seed: int,
    digest: str,
    settings: dict[str, Any],
) -> Artifact:
    """Choose the pairs from the facts of all rows, and write the artifact."""
    facts = [copy_from(path / shard.name, facts_of) for shard in shards]
    rows = pa.concat_tables(facts)
    refuse_bad_data(rows, sources, data)
    selection = select_pairs(rows, data.train, None if data.eval else data.eval_fraction, seed)
    summary = summarise(
        rows,
        selection,
        [(raw.source, raw.label, raw.split) for raw in sources],
        held_out=not data.eval,
        digest=digest,
        settings=settings,
    )
    refuse_empty(summary, data)
    return finish_artifact(
        path,
        summary,
        shards,
        rows=[len(some) for some in facts],
        train=selection.train,
        evaluation=selection.eval,
        lengths=np.stack([rows[side].to_numpy() for side in SIDES], axis=1),
        quarantine=_quarantine(rows, sources),
    )


def _quarantine(rows: pa.Table, sources: Sequence[RawSource]) -> Iterator[dict[str, Any]]:
    """The bad rows, without those that are only too long."""
    codes = rows["code"]
    good = pc.is_in(codes, pa.array(["", *OVERLONG]))
    return (
        {
            "file": sources[row["source"]].source.source,
            "line": row["line"],
            "reason": row["code"],
            "detail": row["detail"],
            "split": sources[row["source"]].split,
        }
        for row in rows.filter(pc.invert(good)).to_pylist()
    )


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


def _make_shards(
    sources: Sequence[RawSource],
    tokenizer: Any,
    data: DataConfig,
    path: Path,
    kept_in: Storage,
    announce: Announce,
    queue_timeout: float,
) -> list[Shard]:
    """The shards of all sources in order, those of an earlier preparation among them.

    If there are few rows, this process makes them. If there are many, Ray does, on all cores.
    """
    limits = Limits(data.max_prompt_length, data.max_length, data.overlong)
    processor = RowProcessor(tokenizer, [raw.label for raw in sources], limits, data.columns)
    parts = parts_of(sources)
    shards = whole_shards(path)
    if shards:
        announce(f"an earlier preparation has made {len(shards)} shards; they are used")
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
            raise changed(raw.source.source)
    return [shards[place] for place in sorted(shards)]


@contextmanager
def _sign_in(folder: Path) -> Iterator[Path]:
    """A folder that shows a worker that it sees the same files as this process."""
    sign = folder / f".preparing-{uuid.uuid4().hex[:8]}"
    sign.mkdir()
    try:
        yield sign
    finally:
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
    again = (rows_of(place, parts[place]) for place in unread)
    yield from (_taken(made, path, kept_in) for made in _map_with_ray(shared, again))


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
