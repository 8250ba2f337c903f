"""Reference log-probs: computed once from the model as training starts, then read from a cache."""

import hashlib
import json
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from orpo_ray.data.store import PairTable
from orpo_ray.training.metrics import score_pairs
from orpo_ray.training.pair_model import PairModel


def reference_log_probs(
    model: PairModel,
    table: PairTable,
    pad_id: int,
    token_budget: int,
    cache: Path,
    inputs: dict[str, Any],
    announce: Callable[[str], None],
    stop_requested: Callable[[], bool] = lambda: False,
) -> np.ndarray:
    """Summed log-probs [n, 2] of both answers under `model` as it is now: the base, or the adapter it starts from.

    `inputs` is all that the numbers depend on; its hash names the cache file.
    """
    digest = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
    path = cache / f"{digest[:16]}.safetensors"
    cached = _read(path, len(table), announce)
    if cached is not None:
        announce(f"reference log-probs: reused from {path.name}")
        return cached
    announce(f"reference log-probs: computing them once for {len(set(table.pair_ids))} pairs")
    scores = score_pairs(model, table, pad_id, token_budget, stop_requested)
    log_probs = np.stack([scores.chosen, scores.rejected], axis=1)
    cache.mkdir(parents=True, exist_ok=True)
    building = cache / f".building-{uuid.uuid4().hex[:8]}"
    save_file({"log_probs": log_probs}, building)
    building.replace(path)
    return log_probs


def _read(path: Path, rows: int, announce: Callable[[str], None]) -> np.ndarray | None:
    if not path.exists():
        return None
    try:
        log_probs = load_file(path)["log_probs"]
        if log_probs.shape != (rows, 2):
            raise ValueError(f"shape {log_probs.shape} for {rows} pairs")
    except (SafetensorError, KeyError, OSError, ValueError) as error:
        announce(f"the cached reference log-probs {path.name} are damaged ({error}); computing them again")
        return None
    return log_probs
