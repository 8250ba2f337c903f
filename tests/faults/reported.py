"""The numbers of two runs side by side."""

from pathlib import Path
from typing import Any

from support import read_metrics

_CLOCK = ("train/pairs_per_second", "train/seconds", "train/memory_bytes")


def comparable(run_dir: Path) -> list[dict[str, Any]]:
    """All reported numbers but those of the clock and of memory."""
    return [
        {name: value for name, value in line.items() if name not in _CLOCK}
        for line in read_metrics(run_dir)
    ]
