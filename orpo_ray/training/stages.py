"""What a run in stages leaves behind: what an ordinary run does, taken from its last stage."""

import shutil
from collections.abc import Sequence
from typing import Any

from orpo_ray.config import RunConfig
from orpo_ray.config.storage import inside
from orpo_ray.storage import storage_at
from orpo_ray.training import record


def conclude(config: RunConfig, stages: Sequence[RunConfig], results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Lay the last stage's adapter in the run's own folder, and write result.json, last of all."""
    last, adapter = stages[-1].run_dir, config.run_dir / "adapter"
    storage = storage_at(config.storage)
    storage.fetch_folder(last / "adapter")
    storage.fetch(last / record.RUN_FILE)
    shutil.rmtree(adapter, ignore_errors=True)
    shutil.copytree(last / "adapter", adapter)
    shutil.copyfile(last / record.RUN_FILE, config.run_dir / record.RUN_FILE)
    result = {
        **results[-1],
        "name": config.name,
        "steps": sum(result["steps"] for result in results),
        "adapter": inside(config.place, "adapter"),
        "stages": list(results),
    }
    record.write_json(config.run_dir / record.RESULT_FILE, result)
    storage.store_folder(adapter)
    storage.store(config.run_dir / record.RUN_FILE, config.run_dir / record.RESULT_FILE)
    return result
