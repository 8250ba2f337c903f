"""What a test puts into processes that train together: a count of the bytes that they send."""

import json
from pathlib import Path
from typing import Any

from orpo_ray.training.trainer import PreferenceTrainer
from orpo_ray.training.world import World

LOOPBACK = Path("/sys/class/net/lo/statistics")
HEADERS = 66
"""Bytes of Ethernet, IPv4 and TCP with timestamps in each packet, an acknowledgement too."""


def sent_bytes() -> int:
    """The bytes that all processes have sent to each other, without headers.

    How many packets they take depends on how fast the receiver reads.
    """
    count, packets = (int((LOOPBACK / f"tx_{what}").read_text()) for what in ("bytes", "packets"))
    return count - HEADERS * packets


def note_bytes(world: World, run_dir: Path) -> None:
    """Write what all processes had sent at the start of each step, and how many packs it has."""
    seen: list[tuple[int, int]] = []
    original = PreferenceTrainer.training_step

    def noting(self: PreferenceTrainer, model: Any, inputs: Any, *args: Any) -> Any:
        world.wait()
        seen.append((sent_bytes(), len(inputs.packs)))
        world.wait()
        (run_dir / f"sent-{world.rank}.json").write_text(json.dumps(seen), encoding="utf-8")
        return original(self, model, inputs, *args)

    PreferenceTrainer.training_step = noting  # type: ignore[method-assign]
