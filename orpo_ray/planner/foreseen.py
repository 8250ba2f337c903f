"""What is foretold of a run, and what it then measured: run.json keeps both."""

import math
from dataclasses import dataclass
from typing import Any

from orpo_ray.planner.interval import Interval


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Seconds of training, pairs a second, and the most bytes of a worker.

    On a GPU these are the bytes of its tensors; on a CPU those of the process. `held_bytes` is the
    part of the middle that weights and their state take. `device` is the name under which
    calibrations are kept.
    """

    device: str
    seconds: Interval
    pairs_per_second: Interval
    peak_bytes: Interval
    held_bytes: float

    def to_json(self) -> dict[str, Any]:
        """Plain data: low end, middle and high end of each figure."""
        return {
            "device": self.device,
            "seconds": self.seconds.to_json(),
            "pairs_per_second": self.pairs_per_second.to_json(),
            "peak_bytes": self.peak_bytes.to_json(),
            "held_bytes": self.held_bytes,
        }


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a run measured: its speed, and the most bytes of a worker."""

    pairs_per_second: float
    peak_bytes: float


def read_plan(written: Any) -> tuple[Prediction, Measured]:
    """What run.json keeps. Raises ValueError, TypeError or KeyError for anything else."""
    predicted, measured = written["predicted"], written["measured"]
    found = Prediction(
        device=predicted["device"],
        seconds=_interval(predicted["seconds"]),
        pairs_per_second=_interval(predicted["pairs_per_second"]),
        peak_bytes=_interval(predicted["peak_bytes"]),
        held_bytes=_positive(predicted["held_bytes"]),
    )
    if not isinstance(found.device, str) or found.held_bytes >= found.peak_bytes.middle:
        raise ValueError("no prediction of a run")
    return found, Measured(
        pairs_per_second=_positive(measured["pairs_per_second"]),
        peak_bytes=_positive(measured["peak_bytes"]),
    )


def _interval(written: Any) -> Interval:
    low, middle, high = written
    return Interval(_positive(low), _positive(middle), _positive(high))


def _positive(written: Any) -> float:
    if isinstance(written, bool) or not isinstance(written, int | float):
        raise TypeError(f"{written!r} is no number")
    if not 0 < written < math.inf:
        raise ValueError(f"{written!r} is not above 0")
    return float(written)
