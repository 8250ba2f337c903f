"""Where a Ray Train worker begins.

Driver, trial and Ray's controller load this module, too, for the name of the function that workers
are to call: it imports nothing to compute with.
"""

import gc
from typing import Any

from orpo_ray.lean_imports import without_collections


def train_worker(settings: dict[str, Any]) -> None:
    """Train as one of the group. `settings`: the `task`, and the `mailbox` whose driver is told."""
    with without_collections():
        from orpo_ray.distributed.worker import work
    gc.freeze()  # what is imported stays, and need not be looked through again
    work(settings["task"], settings["mailbox"])
