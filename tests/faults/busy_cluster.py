"""Asks for DPO runs on a Ray whose CPUs others hold: `python busy_cluster.py SCENARIOS.json`.

SCENARIOS.json is a list of {"config": path of a YAML, "room_s": how long to wait for room, "stop":
whether to send this process a Ctrl-C when actors for reference log-probs are requested}. It prints
as JSON what `train` raised for each.
"""

import json
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any

import ray

from orpo_ray import api
from orpo_ray.config import load_config
from orpo_ray.data import parallel
from orpo_ray.distributed import references
from orpo_ray.errors import OrpoRayError
from orpo_ray.runs.console import Console


class Hog:
    """Holds a CPU."""

    def ready(self) -> bool:
        """Returns when the CPU is held."""
        return True


def outcome(scenario: dict[str, Any]) -> dict[str, str]:
    """The outcome of one run."""
    references.ROOM_S = scenario["room_s"]

    class Stopping(Console):
        def announce(self, line: str) -> None:
            if scenario["stop"] and line.startswith("reference log-probs: computing"):
                os.kill(os.getpid(), signal.SIGINT)

    try:
        api.train(load_config(scenario["config"]), Stopping())
    except OrpoRayError as error:
        return {"kind": type(error).__name__, "message": str(error)}
    raise AssertionError("there was room")


def main(scenarios: list[dict[str, Any]]) -> None:
    """Try the scenarios one after another."""
    # Without room nothing starts, however long the wait.
    parallel._BUSY_AFTER_S = parallel._START_S = 1.0
    parallel._ALONE_BYTES = 0  # a few pairs need no CPU of a cluster
    ray.init(address="local", num_cpus=2, log_to_driver=False, logging_level=logging.ERROR)
    hogs = [ray.remote(num_cpus=1)(Hog).remote() for _ in range(2)]
    assert all(ray.get([hog.ready.remote() for hog in hogs]))
    print(json.dumps([outcome(scenario) for scenario in scenarios]), flush=True)
    ray.shutdown()
    os._exit(0)  # a thread of Ray Data may still wait for actors that will never start


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
