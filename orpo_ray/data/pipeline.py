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
from orpo_ray.data.formats import Reading
from orpo_ray.data.near import NearIndex, Signatures, read_signatures
from orpo_ray.data.parallel import make_shards
from orpo_ray.data.ranked import Ranking
from orpo_ray.data.raw import (
    ChangedError,
    RawSource,
    announce_not_read,
    announce_unused,
    check_columns,
    read_all,
)
from orpo_ray.data.refusals import refuse_bad_data, refuse_empty
from orpo_ray.data.rendering import fixed_date
from orpo_ray.data.rows import RowProcessor, facts_of, refuse_whole_file
from orpo_ray.data.select import Rows, Selection, select_pairs
from orpo_ray.data.shards import copy_from
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
from orpo_ray.data.summary import describe, describe_unused, summarise
from orpo_ray.data.tokenise import Limits, PairTokeniser
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
    *,
    single_answers: bool = False,
) -> Artifact:
    """Turn the sources of a run into tokenised pairs, or find them already made.

    With `single_answers`, rows with one answer and a label count as pairs with one side.
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
    reading = _reading(data, single_answers)
    sources, told = _sources(data, announce)
    settings = _settings(
        data, sources, tokenizer, tokenizer_fingerprint, seed, single_answers=single_answers
    )
    digest = content_hash(settings, [[raw.label, raw.split, raw.digest] for raw in sources])
    path = artifact_path(storage, digest)
    was_kept = kept_in.fetch_folder(path, MANIFEST)
    found, stored = find_artifact(storage, digest, announce), list[str]()
    if found is not None:
        announce(f"prepared data found in {kept_in.place_of(found.path)}")
        stays = was_kept
    else:
        for raw in sources:
            refuse_whole_file(raw.source.source, raw.first, reading)
        if not was_kept and not path.exists():
            kept_in.fetch_folder(path)  # the shards of a preparation that was killed elsewhere
        new = _NewArtifact(data, sources, settings, digest=digest, storage=storage, kept_in=kept_in)
        found, stored = new.make(
            RowProcessor(tokenizer, [raw.label for raw in sources], _limits(data), reading),
            seed,
            announce,
            queue_timeout,
        )
        # Another run may have stored the same pairs meanwhile. Its workers read them, so they stay.
        # If the storage had these pairs but find_artifact refused them, its copy is damaged. The
        # new copy replaces it.
        stays = not was_kept and kept_in.holds(path / MANIFEST)
    if not stays:
        kept_in.store_folder(path, MANIFEST, stored)
    for line in [*describe_unused(found.summary, told), *describe(found.summary)]:
        announce(line)
    return found


def _sources(data: DataConfig, announce: Announce) -> tuple[list[RawSource], dict[str, list[str]]]:
    """The sources, and of each the columns of which it was announced that no pair uses them."""
    sources = read_all(data)
    announce_not_read(data, announce)
    if data.columns is not None:
        check_columns(sources, data.columns, announce)
    return sources, announce_unused(sources, data.columns, announce)


def _reading(data: DataConfig, single_answers: bool) -> Reading:
    ranking = Ranking(data.pairs, data.min_margin)
    all_turns = data.train_on == "all-assistant"
    return Reading(data.columns, ranking, single_answers, all_turns)


def _limits(data: DataConfig) -> Limits:
    return Limits(data.max_prompt_length, data.max_length, data.overlong)


class _NewArtifact:
    """An artifact that is not there yet."""

    def __init__(
        self,
        data: DataConfig,
        sources: Sequence[RawSource],
        settings: dict[str, Any],
        *,
        digest: str,
        storage: Path,
        kept_in: Storage,
    ) -> None:
        self._data = data
        self._sources = sources
        self._settings = settings
        self._digest = digest
        self._storage = storage
        self._path = artifact_path(storage, digest)
        self._kept_in = kept_in
        self._created = [folder for folder in self._path.parents if not folder.exists()]

    def make(
        self, processor: RowProcessor, seed: int, announce: Announce, queue_timeout: float
    ) -> tuple[Artifact, list[str]]:
        """Process the rows, and choose those that are pairs. Returns the names of the shards, too.

        Raises DataError for data that is refused.
        """
        with self._discarded_after(ChangedError):
            begin_artifact(self._storage, self._digest)
            shards = make_shards(
                self._sources,
                processor,
                self._path,
                kept_in=self._kept_in,
                announce=announce,
                queue_timeout=queue_timeout,
            )
        names = [shard.name for shard in shards]
        facts = [copy_from(self._path / name, facts_of) for name in names]
        counts, rows = list(map(len, facts)), pa.concat_tables(facts)
        with self._discarded_after(DataError):
            refuse_bad_data(rows, self._sources, self._data)
            selection = self._select(rows, _Signatures(self._path, names, counts), seed)
            summary = self._summarise(rows, selection)
            refuse_empty(summary, self._data)
        artifact = finish_artifact(
            self._path,
            summary,
            shards,
            rows=counts,
            train=selection.train,
            evaluation=selection.eval,
            counts=np.stack([rows[name].to_numpy() for name in (*SIDES, *TRAINED)], axis=1),
            quarantine=_quarantine(rows, self._sources),
        )
        return artifact, names

    def _select(self, rows: pa.Table, signatures: "_Signatures", seed: int) -> Selection:
        data = self._data
        return select_pairs(
            rows,
            [raw.source for raw in self._sources if raw.split == "train"],
            None if data.eval else data.eval_fraction,
            seed,
            are_near=signatures.are_near,
            drop_near=data.dedup == "near",
        )

    def _summarise(self, rows: pa.Table, selection: Selection) -> Summary:
        return summarise(
            rows,
            selection,
            [(raw.source, raw.label, raw.split) for raw in self._sources],
            held_out=not self._data.eval,
            digest=self._digest,
            settings=self._settings,
        )

    @contextmanager
    def _discarded_after(self, error: type[DataError]) -> Iterator[None]:
        """Leave nothing of data that is refused: another attempt has other rows or settings.

        An artifact that another preparation has finished meanwhile stays.
        """
        try:
            yield
        except error:
            if not (self._path / MANIFEST).exists():
                shutil.rmtree(self._path, ignore_errors=True)
                self._kept_in.remove_folder(self._path, MANIFEST)
                for folder in self._created:
                    with suppress(OSError):  # another preparation uses it
                        folder.rmdir()
            raise


class _Signatures:
    """The signatures of all rows, read a shard at a time."""

    def __init__(self, path: Path, names: Sequence[str], rows: Sequence[int]) -> None:
        self._files = [path / name for name in names]
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
    *,
    single_answers: bool,
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
        "single_answers": single_answers,
    }
