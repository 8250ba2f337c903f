"""Preference pairs in, prepared artifact out; the parallel part runs on Ray Data.

First the sources are read and hashed together with the settings. If there is an artifact with that
hash, it is used as it is, without Ray. Otherwise the rows are recognised, checked, rendered and
tokenised, a shard at a time, in parallel if there are many. Shards go to the storage as they are
made, and this process keeps a few facts of each row. From these, duplicates are dropped, bad rows
are put into quarantine, and held-out pairs are chosen.
"""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from orpo_ray.config.data import DataConfig
from orpo_ray.data.checks import DROPPED
from orpo_ray.data.near import NearIndex, Signatures, read_signatures
from orpo_ray.data.parallel import make_shards
from orpo_ray.data.ranked import Ranking
from orpo_ray.data.raw import ChangedError, RawSource, announce_unused, check_columns, read_all
from orpo_ray.data.refusals import refuse_bad_data, refuse_empty
from orpo_ray.data.rows import RowProcessor, facts_of, refuse_whole_file
from orpo_ray.data.select import Rows, Selection, select_pairs
from orpo_ray.data.shards import Shard, copy_from
from orpo_ray.data.store import (
    MANIFEST,
    SIDES,
    TRAINED,
    Artifact,
    Summary,
    artifact_path,
    begin_artifact,
    content_hash,
    find_artifact,
    finish_artifact,
)
from orpo_ray.data.summary import describe, summarise
from orpo_ray.data.tokenise import Limits, PairTokeniser, fixed_date
from orpo_ray.errors import DataError
from orpo_ray.ray_runtime import ROOM_S
from orpo_ray.runs.console import Announce
from orpo_ray.storage import LOCAL, Storage

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
    settings = _settings(data, sources, tokenizer, tokenizer_fingerprint, seed)
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
        if not was_kept and not path.exists():
            kept_in.fetch_folder(path)  # the shards of a preparation that was killed elsewhere
        new = [folder for folder in path.parents if not folder.exists()]
        with _discarded_after(ChangedError, path, new, kept_in):
            begin_artifact(storage, digest)
            made = make_shards(
                sources,
                _processor(tokenizer, sources, data),
                path,
                kept_in=kept_in,
                announce=announce,
                queue_timeout=queue_timeout,
            )
        stored = [shard.name for shard in made]
        facts = [copy_from(path / shard.name, facts_of) for shard in made]
        with _discarded_after(DataError, path, new, kept_in):
            refuse_bad_data(pa.concat_tables(facts), sources, data)
            selection = _select(facts, made, path, sources, data, seed=seed)
            summary = summarise(
                pa.concat_tables(facts),
                selection,
                [(raw.source, raw.label, raw.split) for raw in sources],
                held_out=not data.eval,
                digest=digest,
                settings=settings,
            )
            refuse_empty(summary, data)
        found = _finish(facts, made, path, sources, selection=selection, summary=summary)
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
def _discarded_after(
    error: type[DataError], path: Path, new: Sequence[Path], kept_in: Storage
) -> Iterator[None]:
    """Leave nothing of data that is refused: another attempt has other rows or settings.

    `new` are the folders that did not exist before. An artifact that another preparation has
    finished meanwhile stays.
    """
    try:
        yield
    except error:
        if not (path / MANIFEST).exists():
            shutil.rmtree(path, ignore_errors=True)
            kept_in.remove_folder(path, MANIFEST)
            for folder in new:
                with suppress(OSError):  # another preparation uses it
                    folder.rmdir()
        raise


def _processor(tokenizer: Any, sources: Sequence[RawSource], data: DataConfig) -> RowProcessor:
    limits = Limits(data.max_prompt_length, data.max_length, data.overlong)
    labels, ranking = [raw.label for raw in sources], Ranking(data.pairs, data.min_margin)
    all_turns = data.train_on == "all-assistant"
    return RowProcessor(tokenizer, labels, limits, data.columns, ranking, all_turns=all_turns)


def _select(
    facts: Sequence[pa.Table],
    shards: Sequence[Shard],
    path: Path,
    sources: Sequence[RawSource],
    data: DataConfig,
    *,
    seed: int,
) -> Selection:
    return select_pairs(
        pa.concat_tables(facts),
        [raw.source for raw in sources if raw.split == "train"],
        None if data.eval else data.eval_fraction,
        seed,
        are_near=_Signatures(path, shards, list(map(len, facts))).are_near,
        drop_near=data.dedup == "near",
    )


def _finish(
    facts: Sequence[pa.Table],
    shards: Sequence[Shard],
    path: Path,
    sources: Sequence[RawSource],
    *,
    selection: Selection,
    summary: Summary,
) -> Artifact:
    rows = pa.concat_tables(facts)
    return finish_artifact(
        path,
        summary,
        shards,
        rows=list(map(len, facts)),
        train=selection.train,
        evaluation=selection.eval,
        counts=np.stack([rows[name].to_numpy() for name in (*SIDES, *TRAINED)], axis=1),
        quarantine=_quarantine(rows, sources),
    )


class _Signatures:
    """The signatures of all rows, read a shard at a time."""

    def __init__(self, path: Path, shards: Sequence[Shard], rows: Sequence[int]) -> None:
        self._files = [path / shard.name for shard in shards]
        self._starts = np.cumsum([0, *rows])

    def are_near(self, train: Rows, evaluation: Rows) -> npt.NDArray[np.bool_]:
        """Which training rows are near an evaluation row."""
        known = NearIndex(np.concatenate([read_signatures([]), *self._of(evaluation)]))
        found = [known.are_near(some) for some in self._of(train)]
        return np.concatenate([np.zeros(0, dtype=bool), *found])

    def _of(self, numbers: Rows) -> Iterator[Signatures]:
        """The signatures of rows with these numbers, which are in order, a shard at a time."""
        for file, start, stop in zip(self._files, self._starts, self._starts[1:], strict=False):
            own = numbers[(numbers >= start) & (numbers < stop)] - start
            if len(own):
                found = copy_from(file, lambda rows: rows.select(["signature"]))
                yield read_signatures(found["signature"].take(pa.array(own)).to_pylist())


def _quarantine(rows: pa.Table, sources: Sequence[RawSource]) -> Iterator[dict[str, Any]]:
    """The bad rows, without those that a setting drops."""
    codes = rows["code"]
    good = pc.is_in(codes, pa.array(["", *DROPPED]))
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
    data: DataConfig,
    sources: Sequence[RawSource],
    tokenizer: Any,
    tokenizer_fingerprint: str,
    seed: int,
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
        "weights": [raw.source.weight for raw in sources if raw.split == "train"],
        "tokenizer": tokenizer_fingerprint,
        "chat_template": tokenizer.chat_template,
        "date": fixed_date(tokenizer),
        "versions": {name: version(name) for name in _RENDERERS},
        "seed": seed if draws else None,
    }
