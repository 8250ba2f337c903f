"""Some of an artifact's training pairs, as an artifact of their own.

The held-out pairs stay, so what is trained on few pairs and on many is judged by the same ones.
"""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from orpo_ray.data.shards import whole_shards
from orpo_ray.data.store import (
    MANIFEST,
    Artifact,
    begin_artifact,
    content_hash,
    find_artifact,
    finish_artifact,
)
from orpo_ray.errors import ConfigError
from orpo_ray.runs.console import Announce
from orpo_ray.storage import Storage


def subset(
    artifact: Artifact, count: int, seed: int, kept_in: Storage, announce: Announce
) -> Artifact:
    """An artifact with `count` of the training pairs, drawn by a seed; fewer are among more.

    It lies beside the whole one and shares its shards. Raises ConfigError if there are not so many.
    """
    refuse_too_many(count, artifact)
    if count == len(artifact.train):
        return artifact
    digest = content_hash("subset", artifact.summary.hash, count, seed)
    storage = artifact.path.parent.parent
    found = find_artifact(storage, digest, announce)
    if found is None:
        found = _write(artifact, count, seed, begin_artifact(storage, digest), digest)
        kept_in.store_folder(found.path, MANIFEST)
    return found


def refuse_too_many(count: int, artifact: Artifact) -> None:
    """Raise ConfigError if an artifact has fewer training pairs."""
    if count > len(artifact.train):
        raise ConfigError(
            f"{count:,} training pairs are asked for, and there are {len(artifact.train):,}"
        )


def drawn(artifact: Artifact, count: int, seed: int) -> NDArray[np.int64]:
    """Which training pairs a subset has, in their order."""
    order = np.random.default_rng(seed).permutation(len(artifact.train))
    return np.sort(order[:count])


def _write(artifact: Artifact, count: int, seed: int, path: Path, digest: str) -> Artifact:
    for name in artifact.train.shards:
        if not (path / name).exists():
            _share(artifact.path / name, path / name)
    tables = (artifact.train, artifact.eval)
    rows = list(artifact.train.shards.values())
    counts = np.zeros((sum(rows), 6), dtype=np.int32)
    for table in tables:
        counts[table.rows] = np.concatenate([table.lengths, table.trained], axis=1)
    shards = whole_shards(path)
    by_name = {shard.name: shard for shard in shards.values()}
    return finish_artifact(
        path,
        replace(
            artifact.summary,
            hash=digest,
            train=count,
            settings={**artifact.summary.settings, "subset": count},
        ),
        [by_name[name] for name in artifact.train.shards],
        rows=rows,
        train=artifact.train.rows[drawn(artifact, count, seed)],
        evaluation=artifact.eval.rows,
        counts=counts,
        quarantine=(),
    )


def _share(source: Path, place: Path) -> None:
    """A hard link where the file system has them, else a copy."""
    try:
        os.link(source, place)
    except OSError:
        shutil.copyfile(source, place)
