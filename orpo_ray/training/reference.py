"""Where reference log-probs are kept: computed once from the model as training starts, then read by
every run.
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

from orpo_ray.runs.console import Announce
from orpo_ray.runs.run import Run
from orpo_ray.runs.versions import versions
from orpo_ray.storage import LOCAL, Storage
from orpo_ray.training.decisions import Setup

_LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")
"""Those that compute the log-probs."""


class ReferenceCache:
    """Summed log-probs [n, 2] of both answers of a table's n pairs, under a hash of all that they
    depend on.
    """

    def __init__(self, folder: Path, inputs: dict[str, Any], storage: Storage = LOCAL) -> None:
        digest = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
        self._path = folder / f"{digest[:16]}.safetensors"
        self._storage = storage

    def read(self, rows: int, announce: Announce) -> NDArray[np.float64] | None:
        """The log-probs of a table of so many pairs, or None; a damaged file is announced and
        counts as none.
        """
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
        """Keep them, in one step."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        building = self._path.with_name(f".building-{uuid.uuid4().hex[:8]}")
        save_file({"log_probs": log_probs}, building)
        building.replace(self._path)
        self._storage.store(self._path)


def reference_cache(run: Run, setup: Setup) -> ReferenceCache:
    """Where the reference log-probs of a run are kept, under all that they depend on."""
    config, decisions = run.config, setup.decisions
    inputs = {
        **setup.identity,
        "quantization": config.model.quantization,
        "dtype": decisions.dtype,
        "attention": decisions.attention,
        "layout": decisions.layout,
        "device": decisions.device,
        "full_training": config.adapter.kind == "none",
        "versions": {name: version for name, version in versions().items() if name in _LIBRARIES},
    }
    return ReferenceCache(run.root / "references", inputs, run.storage)
