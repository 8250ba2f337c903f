"""Preparation and reference log-probs without room: the wait ends, and a stop ends it too."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import ENVIRONMENT, HANG_S, settings

pytestmark = [pytest.mark.slow, pytest.mark.ray]

SCRIPT = Path(__file__).with_name("busy_cluster.py")
SHORT_S, ENDLESS_S = 3, 2 * HANG_S
PREPARED, UNPREPARED, STOPPED = range(3)


def scenario(storage: Path, name: str, room_s: float, stop: bool = False) -> dict[str, Any]:
    """A DPO run on two workers."""
    scale = {"workers": 2, "gpus_per_worker": 0, "queue_timeout": room_s}
    config = storage / f"{name}.yaml"
    config.write_text(
        yaml.safe_dump(settings(storage, name, objective={"kind": "dpo"}, scale=scale)),
        encoding="utf-8",
    )
    return {"config": str(config), "room_s": room_s, "stop": stop}


@pytest.fixture(scope="module")
def outcomes(
    prepared_storage: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, str]]:
    """The outcomes of runs on one Ray of two CPUs that others hold."""
    empty = tmp_path_factory.mktemp("empty")
    scenarios = empty / "scenarios.json"
    listed = [
        scenario(prepared_storage, "busy", SHORT_S),
        scenario(empty, "busy-unprepared", SHORT_S),
        # If the stop is ignored, the wait exceeds the time of the process.
        scenario(prepared_storage, "busy-stopped", ENDLESS_S, stop=True),
    ]
    scenarios.write_text(json.dumps(listed), encoding="utf-8")
    command = [sys.executable, str(SCRIPT), str(scenarios)]
    done = subprocess.run(
        command, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=HANG_S
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told: list[dict[str, str]] = json.loads(done.stdout.splitlines()[-1])
    return told


def test_the_wait_for_room_has_an_end(outcomes: list[dict[str, str]]) -> None:
    told = outcomes[PREPARED]
    assert told["kind"] == "ResourceError"
    assert (
        "no room for 2 actors that compute reference log-probs within 3 s; is the cluster busy?"
        in told["message"]
    )


def test_preparation_waits_for_room_with_an_end(outcomes: list[dict[str, str]]) -> None:
    told = outcomes[UNPREPARED]
    assert told["kind"] == "ResourceError"
    assert (
        told["message"]
        == "no CPU of the Ray cluster was free within 3 s to prepare data on; is it busy?"
    )


def test_a_stop_is_heard_while_actors_wait_for_room(outcomes: list[dict[str, str]]) -> None:
    told = outcomes[STOPPED]
    assert told["kind"] == "StoppedError"
    assert told["message"] == "stopped before the first step; the same command starts again"
