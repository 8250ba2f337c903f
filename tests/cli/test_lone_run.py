"""A worker with a CPU machine for itself tries how many threads gain, and keeps their number."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from terminal import ENVIRONMENT, write_config

CHOSEN = "(OMP_NUM_THREADS sets them)"


def train(config: Path, *words: str) -> str:
    """What the command says in an environment that leaves the number of threads open."""
    free = {name: value for name, value in ENVIRONMENT.items() if name != "OMP_NUM_THREADS"}
    command = [sys.executable, "-m", "orpo_ray.cli.main", "train", str(config), *words, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=free, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("ray", ["false", "true"], ids=["this process", "a worker of Ray"])
def test_threads_are_tried_once_and_kept(tmp_path: Path, ray: str) -> None:
    config = write_config(tmp_path)
    record = tmp_path / "storage" / "tiny" / "run.json"
    tried = len(os.sched_getaffinity(0)) > 1

    said = train(config, f"scale.ray={ray}", "training.max_steps=2")
    settled = json.loads(record.read_text())
    threads = settled["decisions"]["threads"]
    assert 1 <= threads <= len(os.sched_getaffinity(0))
    assert (CHOSEN in said) == tried
    assert any(CHOSEN in line for line in settled["reasons"]) == tried

    said = train(config, f"scale.ray={ray}", "training.max_steps=4", "--extend")
    assert CHOSEN not in said
    assert json.loads(record.read_text())["decisions"]["threads"] == threads
