"""Asks for a DPO run on a Ray whose CPUs others hold: `python busy_cluster.py CONFIG.yaml ROOM_S STOP`.

Prints, as JSON, what `train` raised and how long after the actors for reference log-probs were asked for. `STOP` is
"stop" to give the process a Ctrl-C once they are.
"""

import json
import logging
import os
import signal
import sys
import time

import ray

from orpo_ray import api
from orpo_ray.config import load_config
from orpo_ray.data import pipeline
from orpo_ray.distributed import references
from orpo_ray.errors import OrpoRayError


class Hog:
    """Holds a CPU."""

    def ready(self) -> bool:
        """Once it does."""
        return True


def main(config_path: str, room_s: str, stop: str) -> None:
    """Try to train DPO."""
    references.ROOM_S = int(room_s)
    pipeline._BUSY_AFTER_S = pipeline._START_S = 1.0  # nothing starts where there is no room, however long one waits
    ray.init(address="local", num_cpus=2, log_to_driver=False, logging_level=logging.ERROR)
    hogs = [ray.remote(num_cpus=1)(Hog).remote() for _ in range(2)]
    assert all(ray.get([hog.ready.remote() for hog in hogs]))
    asked = float("nan")

    def announce(line: str) -> None:
        nonlocal asked
        if line.startswith("reference log-probs: computing"):
            asked = time.monotonic()
            if stop == "stop":
                os.kill(os.getpid(), signal.SIGINT)

    try:
        api.train(load_config(config_path), announce)
    except OrpoRayError as error:
        seconds = time.monotonic() - asked
        print(json.dumps({"kind": type(error).__name__, "message": str(error), "seconds": seconds}), flush=True)
    ray.shutdown()
    os._exit(0)  # a thread of Ray Data may still wait for actors that will never start


if __name__ == "__main__":
    main(*sys.argv[1:])
