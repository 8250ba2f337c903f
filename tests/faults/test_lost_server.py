"""A server that dies and does not come back: the run goes on by itself with the workers that fit on what is left."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support import ENVIRONMENT, read_metrics, settings

pytestmark = [pytest.mark.slow, pytest.mark.ray]

STEPS, CHECKPOINT_EVERY, DIES_AFTER = 30, 5, 12
SCRIPT = Path(__file__).with_name("lost_server.py")

# So that Ray notices within seconds that a server is gone.
QUICK_TO_NOTICE = {
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",
}


def test_a_run_outlives_a_server(prepared_storage: Path) -> None:
    tree = settings(
        prepared_storage,
        "lost-server",
        adapter={"dropout": 0.0},
        training={"max_steps": STEPS, "checkpoint_every": CHECKPOINT_EVERY, "eval_every": STEPS},
    )
    config = prepared_storage / "lost-server.yaml"
    config.write_text(yaml.safe_dump({**tree, "scale": {"workers": "auto"}}), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(config), str(DIES_AFTER)],
        env={**ENVIRONMENT, **QUICK_TO_NOTICE},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert "workers 2: 1 CPU each, no GPU in sight" in told["said"]
    assert any("lost" in line and "going on from the last checkpoint" in line for line in told["said"])
    assert "workers 1: 1 CPU each, no GPU in sight" in told["said"]
    resumed = [line for line in told["said"] if line.startswith("resuming at step")]
    assert resumed and int(resumed[-1].split()[3]) >= DIES_AFTER - DIES_AFTER % CHECKPOINT_EVERY
    assert len(told["result"]["workers"]) == 1
    steps = [line["step"] for line in read_metrics(prepared_storage / "lost-server") if "train/loss" in line]
    assert steps == list(range(1, STEPS + 1))
