"""Trains on a Ray of two servers with one core each and kills one of them during the run.

Usage: lost_server.py CONFIG.yaml STEP [CACHE]

It prints as JSON the result and what was announced. Both servers are raylets on this machine. The
second one is killed when the checkpoint of STEP exists, and the run is held at that step. With
CACHE the second server has its own address, because ranks are counted by server. It then keeps its
caches in that folder, so that the two share no disk.
"""

import json
import logging
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.cluster_utils import Cluster

from orpo_ray import api
from orpo_ray.config import load_config
from orpo_ray.runs.console import Console
from orpo_ray.storage import Storage, storage_at

_POLL_S = 0.05
_HELD_S = 30.0


def meeting_place() -> psutil.Process:
    """The process of Ray's actor through which workers report evaluations and checkpoints."""
    (found,) = filter(_is_meeting_place, psutil.Process().children(recursive=True))
    return found


def _is_meeting_place(process: psutil.Process) -> bool:
    try:
        return "ray::SynchronizationActor" in " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return False


def hold_at(manifest: Path, storage: Storage) -> psutil.Process:
    """Hold the run where it has written a checkpoint, at the meeting that follows it.

    A hold may begin while ranks still meet after an evaluation. The checkpoint then never comes, so
    they are let through, and held again.
    """
    place = meeting_place()
    while True:
        place.suspend()
        held_at = time.monotonic()
        while time.monotonic() - held_at < _HELD_S:
            if storage.holds(manifest):
                return place
            time.sleep(_POLL_S)
        place.resume()
        time.sleep(_POLL_S)


def main(config_path: str, step: int, cache: str | None = None) -> None:
    """Train until the run is finished on the server that is left."""
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 2**27}
    )
    own = {"env_vars": {"XDG_CACHE_HOME": cache}, "node_ip_address": "127.0.0.2"} if cache else {}
    second = cluster.add_node(num_cpus=1, object_store_memory=2**27, **own)
    ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
    config = load_config(config_path)
    manifest = config.run_dir / "checkpoints" / f"step-{step:06d}" / "MANIFEST.json"
    said: list[str] = []
    alive = [second]

    class Losing(Console):
        def announce(self, line: str) -> None:
            said.append(line)

        def watch(self, step: int, total_steps: int, metrics: dict[str, Any]) -> None:
            if not alive:
                return
            # The first news is that of the evaluation before the first step.
            place = hold_at(manifest, storage_at(config.storage))
            cluster.remove_node(alive.pop(), allow_graceful=False)
            with suppress(psutil.NoSuchProcess):
                place.resume()

    try:
        result = api.train(config, Losing()).to_json()
    finally:
        ray.shutdown()
        cluster.shutdown()
    print(json.dumps({"result": result, "said": said}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
