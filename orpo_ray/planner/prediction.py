"""What the planner says of a run that is about to start, and how wrong it was at the end."""

from dataclasses import replace
from typing import Any

from orpo_ray.planner.calibration import Calibration
from orpo_ray.planner.fit import total
from orpo_ray.planner.foreseen import Prediction
from orpo_ray.planner.here import CPU
from orpo_ray.planner.interval import Interval
from orpo_ray.planner.plan import StagePlan

_HELD = ("weights", "adapter", "gradients", "optimizer")
_PROCESS = Interval(0.5e9, 0.8e9, 1.5e9)
"""Bytes of a process that computes on a CPU, besides its tensors: Python and its libraries."""


def predict(stage: StagePlan, device: str) -> Prediction | None:
    """What a planned run takes on this device; None if it does not fit."""
    if stage.duration is None or stage.pairs_per_second is None:
        return None
    parts = dict(stage.fit.parts)
    for beside in ("slack", "context", "workspace"):
        del parts[beside]
    tensors = total(parts)
    of_process = _PROCESS if device == CPU else Interval.sure(0.0)
    return Prediction(
        device=device,
        seconds=stage.duration.parts["steps"] + stage.duration.parts["evaluation"],
        pairs_per_second=stage.pairs_per_second,
        peak_bytes=Interval(0.95 * tensors, tensors, 1.1 * tensors) + of_process,
        held_bytes=sum(parts[name] for name in _HELD),
    )


def calibrated(found: Prediction, known: Calibration | None) -> Prediction:
    """The prediction after what earlier runs on the device have shown."""
    if known is None:
        return found
    held = found.held_bytes
    memory = held + known.memory * (found.peak_bytes.middle - held)
    return replace(
        found,
        seconds=known.of_time(found.seconds),
        pairs_per_second=known.of_speed(found.pairs_per_second),
        peak_bytes=Interval(0.95 * memory, memory, 1.05 * memory),
    )


def compare(predicted: dict[str, Any], measured: dict[str, Any]) -> str:
    """In one line, how wrong a prediction was."""
    said = []
    for name, what, unit in (
        ("pairs_per_second", "pairs a second", 1.0),
        ("peak_bytes", "GB a worker", 1e9),
    ):
        found, planned = measured.get(name), predicted[name][1]
        if found:
            said.append(
                f"{what} {found / unit:.3g} where {planned / unit:.3g} were planned "
                f"({found / planned - 1:+.0%})"
            )
    return "the plan: " + "; ".join(said)
