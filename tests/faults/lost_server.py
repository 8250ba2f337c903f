"""Trains on a Ray of two servers of one core each and kills one in mid-run: `lost_server.py CONFIG.yaml STEP [CACHE]`.

Prints, as JSON, the result and what was announced. Both servers are raylets on this machine. With CACHE, the second one
has an address of its own, as ranks are counted by server, and that folder for its caches: no disk in common.
"""

import json
import logging
import sys
from typing import Any

import ray
from ray.cluster_utils import Cluster

from orpo_ray import api
from orpo_ray.config import load_config


def main(config_path: str, last_step: int, cache: str | None = None) -> None:
    """Train to the end; the second server dies once `last_step` is reported."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 2**27})
    own = {"env_vars": {"XDG_CACHE_HOME": cache}, "node_ip_address": "127.0.0.2"} if cache else {}
    second = cluster.add_node(num_cpus=1, object_store_memory=2**27, **own)
    ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
    said: list[str] = []
    alive = [second]

    def watch(step: int, total_steps: int, metrics: dict[str, Any]) -> None:
        if step >= last_step and alive:
            cluster.remove_node(alive.pop(), allow_graceful=False)

    try:
        result = api.train(load_config(config_path), said.append, watch)
    finally:
        ray.shutdown()
        cluster.shutdown()
    print(json.dumps({"result": result, "said": said}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
