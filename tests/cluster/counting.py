"""What a test puts into processes that train together: a count of the bytes that they send."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

from orpo_ray.training.trainer import PreferenceTrainer
from orpo_ray.training.world import World

SENT = re.compile(r"\bbytes_sent:(\d+)")
SENT_AGAIN = re.compile(r"\bbytes_retrans:(\d+)")


def sent_bytes() -> int:
    """The bytes that all processes have sent to each other, each counted once.

    An interface also counts headers, and what TCP sends again because the receiver reads late.
    """
    command = ["ss", "--tcp", "--info", "--no-header"]
    sockets = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return sum(map(int, SENT.findall(sockets))) - sum(map(int, SENT_AGAIN.findall(sockets)))


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
