"""The function that each Ray Train worker calls first.

The driver, a trial and Ray's controller load this module too, to name that function. So the module
itself imports nothing heavy.
"""

import gc
from typing import Any

from orpo_ray.lean_imports import without_collections


def train_worker(settings: dict[str, Any]) -> None:
    """Train as one worker of a group. `settings` holds the `task` and the driver's `mailbox`."""
    with without_collections():
        from orpo_ray.distributed.worker import work
    gc.freeze()  # imported modules stay, so the garbage collector need not look at them again
    work(settings["task"], settings["mailbox"])
