"""What a test puts into processes that train together: a count of the bytes that they send."""

import json
from pathlib import Path
from typing import Any

from orpo_ray.training.trainer import PreferenceTrainer
from orpo_ray.training.world import World

SENT = Path("/sys/class/net/lo/statistics/tx_bytes")


def note_bytes(world: World, run_dir: Path) -> None:
    """Write what all processes had sent at the start of each step, and how many packs it has."""
    seen: list[tuple[int, int]] = []
    original = PreferenceTrainer.training_step

    def noting(self: PreferenceTrainer, model: Any, inputs: Any, *args: Any) -> Any:
        world.wait()
        seen.append((int(SENT.read_text()), len(inputs.packs)))
        world.wait()
        (run_dir / f"sent-{world.rank}.json").write_text(json.dumps(seen), encoding="utf-8")
        return original(self, model, inputs, *args)

    PreferenceTrainer.training_step = noting  # type: ignore[method-assign]
