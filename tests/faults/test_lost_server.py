"""A server dies for good: the run resumes by itself with the workers that fit on what is left."""

from pathlib import Path

import pytest
import yaml
from support import read_metrics, settings
from two_servers import train_and_lose_one

pytestmark = [pytest.mark.slow, pytest.mark.ray]

STEPS, CHECKPOINT_EVERY = 15, 5


def test_a_run_outlives_a_server(prepared_storage: Path) -> None:
    tree = settings(
        prepared_storage,
        "lost-server",
        adapter={"dropout": 0.0},
        training={"max_steps": STEPS, "checkpoint_every": CHECKPOINT_EVERY, "eval_every": STEPS},
    )
    config = prepared_storage / "lost-server.yaml"
    config.write_text(yaml.safe_dump({**tree, "scale": {"workers": "auto"}}), encoding="utf-8")
    told = train_and_lose_one(config, CHECKPOINT_EVERY)
    assert "workers 2: 1 CPU each, no GPU found" in told["said"]
    assert any(
        "lost" in line and "resuming from the last checkpoint" in line for line in told["said"]
    )
    assert "workers 1: 1 CPU each, no GPU found" in told["said"]
    (resumed,) = (line for line in told["said"] if line.startswith("resuming at step"))
    assert int(resumed.split()[3]) >= CHECKPOINT_EVERY
    assert len(told["result"]["workers"]) == 1
    steps = [
        line["step"]
        for line in read_metrics(prepared_storage / "lost-server")
        if "train/loss" in line
    ]
    assert steps == list(range(1, STEPS + 1))
