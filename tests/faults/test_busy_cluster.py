"""Preparation and reference log-probs where nobody makes room: neither an endless wait nor a deaf one."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import ENVIRONMENT, settings

pytestmark = [pytest.mark.slow, pytest.mark.ray]

SCRIPT = Path(__file__).with_name("busy_cluster.py")
ENDLESS_S = 600


def outcome(storage: Path, room_s: int, stop: str) -> dict[str, Any]:
    """What became of a DPO run on two workers, on a Ray of two CPUs that others hold."""
    scale = {"workers": 2, "gpus_per_worker": 0, "queue_timeout": room_s}
    tree = settings(storage, f"busy-{stop}", objective={"kind": "dpo"}, scale=scale)
    config = storage / f"busy-{stop}.yaml"
    config.write_text(yaml.safe_dump(tree), encoding="utf-8")
    command = [sys.executable, str(SCRIPT), str(config), str(room_s), stop]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


def test_the_wait_for_room_has_an_end(prepared_storage: Path) -> None:
    told = outcome(prepared_storage, 3, "wait")
    assert told["kind"] == "ResourceError"
    assert "no room for 2 actors that compute reference log-probs within 3 s; is the cluster busy?" in told["message"]


def test_preparation_waits_for_room_with_an_end(tmp_path: Path) -> None:
    told = outcome(tmp_path, 3, "wait")
    assert told["kind"] == "ResourceError"
    assert told["message"] == "no CPU of the Ray cluster was free within 3 s to prepare data on; is it busy?"


def test_a_stop_is_heard_while_actors_wait_for_room(prepared_storage: Path) -> None:
    told = outcome(prepared_storage, ENDLESS_S, "stop")
    assert told["kind"] == "StoppedError"
    assert told["message"] == "stopped before the first step; the same command starts again"
    assert told["seconds"] < 60
