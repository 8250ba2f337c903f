"""Commands given on a machine beside the three servers, and what comes of them."""

import hashlib
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from support import DEMO, ENVIRONMENT, HANG_S


def cluster(command: str, hosts: Path, *options: str, code: int = 0) -> Any:
    """What a command about the cluster answers."""
    done = Given("cluster", command, hosts, *options, "--json").end()
    assert done.code == code, done.err
    return done.result


@dataclass(frozen=True)
class Ended:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def result(self) -> Any:
        """The one JSON object that is all of stdout."""
        return json.loads(self.out)


class Given:
    """An `orpo-ray` command under way."""

    def __init__(self, *words: object, cwd: Path | None = None, **variables: str) -> None:
        command = [sys.executable, "-m", "orpo_ray.cli.main", *map(str, words)]
        self._process = subprocess.Popen(
            command,
            cwd=cwd,
            env={**ENVIRONMENT, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    @property
    def pid(self) -> int:
        """Its process."""
        return self._process.pid

    def end(self) -> Ended:
        """Wait for it."""
        out, err = self._process.communicate(timeout=HANG_S)
        return Ended(self._process.returncode, out, err)


def project(folder: Path, storage: str) -> Path:
    """A config for two workers that no server has room for together, and the small files that it names."""
    (folder / "demo").mkdir(parents=True)
    for name in ("base", "train.jsonl", "h1.jsonl"):
        (folder / "demo" / name).symlink_to(DEMO / name)
    tree = {
        "name": "demo",
        "storage": storage,
        "model": {"base": "demo/base"},
        "adapter": {"r": 4, "alpha": 8},
        "data": {
            "train": [{"source": "demo/train.jsonl", "limit": 160}],
            "eval": [{"source": "demo/h1.jsonl", "limit": 16}],
            "max_length": 96,
            "max_prompt_length": 48,
        },
        "training": {
            "pairs_per_step": 8,
            "max_steps": 6,
            "eval_every": 3,
            "checkpoint_every": 3,
            "learning_rate": 1e-3,
        },
        "scale": {"workers": 2, "gpus_per_worker": 0, "cpus_per_worker": 2},
    }
    config = folder / "demo.yaml"
    config.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return config


def weights(adapter: str | Path) -> str:
    """What an adapter's bytes come to."""
    return hashlib.sha256((Path(adapter) / "adapter_model.safetensors").read_bytes()).hexdigest()


def steps_of(run_dir: Path) -> int:
    """The last step that a run has reported, or -1."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    whole = [line for line in lines if line.endswith("\n")]
    return int(json.loads(whole[-1])["step"]) if whole else -1
