"""The cache of reference log-probs.

They are computed once, from the model that training starts from. Other runs with the same inputs
read them.
"""

import hashlib
import json
import uuid
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from orpo_ray.config import RunConfig
from orpo_ray.runs.console import Announce
from orpo_ray.runs.run import Run
from orpo_ray.runs.versions import versions
from orpo_ray.storage import LOCAL, Storage
from orpo_ray.training.decisions import Setup

_LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")
"""The libraries that compute the log-probs."""


class ReferenceCache:
    """Summed log-probs [n, 2] of both answers of n pairs.

    The file is named by a hash of all that the log-probs depend on.
    """

    def __init__(self, folder: Path, inputs: dict[str, Any], storage: Storage = LOCAL) -> None:
        digest = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
        self._path = folder / f"{digest[:16]}.safetensors"
        self._storage = storage

    def read(self, rows: int, announce: Announce) -> NDArray[np.float64] | None:
        """The log-probs of `rows` pairs, or None. A damaged file is announced and not used."""
        if not self._storage.holds(self._path) or not self._storage.fetch(self._path):
            return None
        try:
            log_probs: NDArray[np.float64] = load_file(self._path)["log_probs"]
            if log_probs.shape != (rows, 2):
                raise ValueError(f"shape {log_probs.shape} for {rows} pairs")
        except (SafetensorError, KeyError, OSError, ValueError) as error:
            announce(
                f"the cached reference log-probs {self._path.name} are damaged ({error}); "
                "computing them again"
            )
            return None
        announce(f"reference log-probs: reused from {self._path.name}")
        return log_probs

    def write(self, log_probs: NDArray[np.float64]) -> None:
        """Write the file under another name and rename it, so that no reader sees half of it."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        building = self._path.with_name(f".building-{uuid.uuid4().hex[:8]}")
        save_file({"log_probs": log_probs}, building)
        building.replace(self._path)
        self._storage.store(self._path)


def reference_cache(run: Run, setup: Setup) -> ReferenceCache:
    """The cache for the reference log-probs of a run."""
    config, decisions = run.config, setup.decisions
    inputs = {
        **setup.identity,
        "quantization": config.model.quantization,
        "dtype": decisions.dtype,
        "attention": decisions.attention,
        "layout": decisions.layout,
        "device": decisions.device,
        "full_training": config.adapter.kind == "none",
        **_start(config),
        "versions": {name: version for name, version in versions().items() if name in _LIBRARIES},
    }
    return ReferenceCache(run.root / "references", inputs, run.storage)


def _start(config: RunConfig) -> dict[str, Any]:
    """What the start depends on besides the base: an adapter that changes it, if only a little."""
    if not config.adapter.starts_elsewhere:
        return {}
    return {"adapter": config.adapter.model_dump(mode="json"), "seed": config.training.seed}
