"""A small project as it is submitted: a config that names its files by relative paths, and those
files.
"""

import hashlib
from pathlib import Path
from typing import Any

import yaml
from support import DEMO


def write_project(
    folder: Path,
    storage: str,
    name: str,
    pairs: int,
    training: dict[str, Any],
    scale: dict[str, Any],
) -> Path:
    """Lay the files out and return the config's path; the run takes the first `pairs` of the
    demo.
    """
    (folder / "demo").mkdir(parents=True)
    for file in ("base", "train.jsonl", "h1.jsonl"):
        (folder / "demo" / file).symlink_to(DEMO / file)
    tree = {
        "name": name,
        "storage": storage,
        "model": {"base": "demo/base"},
        "adapter": {"r": 4, "alpha": 8},
        "data": {
            "train": [{"source": "demo/train.jsonl", "limit": pairs}],
            "eval": [{"source": "demo/h1.jsonl", "limit": 16}],
            "max_length": 96,
            "max_prompt_length": 48,
        },
        "training": {"pairs_per_step": 8, "learning_rate": 1e-3, **training},
        "scale": {"gpus_per_worker": 0, **scale},
    }
    config = folder / f"{name}.yaml"
    config.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return config


def weights(adapter: str | Path) -> str:
    """What an adapter's bytes come to."""
    return hashlib.sha256((Path(adapter) / "adapter_model.safetensors").read_bytes()).hexdigest()
