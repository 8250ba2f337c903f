"""What runs on a machine have taught the planner: how far its figures were off, by device."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

from orpo_ray.errors import ConfigError, on_one_line
from orpo_ray.planner.foreseen import Measured, Prediction
from orpo_ray.planner.interval import Interval

_FILE = "orpo-ray/calibration.json"
_LEAST = 1e-3
"""No device is off by more than a thousand: a file with such a factor is damaged."""
_SPREAD = 1.25
"""An interval of calibrated time goes this factor up and down: runs of one machine scatter so."""


@dataclass(frozen=True)
class Calibration:
    """Factors from predicted to measured, for one device: those of each run, by its place.

    Each run has one for time, and one for the memory that comes and goes with a micro-batch.
    """

    runs: Mapping[str, tuple[float, float]]

    @property
    def seconds(self) -> float:
        """The factor of time: the geometric mean over the runs."""
        return geometric_mean([time for time, _ in self.runs.values()])

    @property
    def memory(self) -> float:
        """The factor of the memory that comes and goes."""
        return geometric_mean([memory for _, memory in self.runs.values()])

    @property
    def told(self) -> str:
        """From how many runs it is, in words."""
        return "1 run" if len(self.runs) == 1 else f"{len(self.runs)} runs"

    def of_speed(self, predicted: Interval) -> Interval:
        """The pairs a second of this device where `predicted` was computed without it."""
        return self.of_time(Interval.sure(1 / predicted.middle)).under(1)

    def of_time(self, predicted: Interval) -> Interval:
        """What this device takes where `predicted` was computed without it."""
        middle = self.seconds * predicted.middle
        return Interval(middle / _SPREAD, middle, middle * _SPREAD)


def learn(
    before: Calibration | None, run: str, predicted: Prediction, measured: Measured
) -> Calibration:
    """The calibration with one more run, or with what a known run has measured since.

    Raises ConfigError for a run that took less memory than its weights: it was not alone.
    """
    held, peak = predicted.held_bytes, predicted.peak_bytes.middle
    if measured.peak_bytes <= held:
        raise ConfigError(
            f"--calibrate: {run} took {measured.peak_bytes / 1e9:.2g} GB, less than its weights "
            f"({held / 1e9:.2g} GB), so nothing can be learnt from it"
        )
    factors = (
        predicted.pairs_per_second.middle / measured.pairs_per_second,
        (measured.peak_bytes - held) / (peak - held),
    )
    return Calibration({**(before.runs if before else {}), run: factors})


def geometric_mean(factors: Sequence[float]) -> float:
    """The mean of factors; 1 if there is none."""
    return math.exp(fmean(math.log(factor) for factor in factors)) if factors else 1.0


def calibration_file() -> Path:
    """Where this user's calibrations are kept."""
    configured = os.environ.get("XDG_CONFIG_HOME") or str(Path.home() / ".config")
    return Path(configured) / _FILE


def read_calibrations(path: Path) -> dict[str, Calibration]:
    """The calibrations by device; none if there is no file. Raises ConfigError for a broken one."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {device: _checked(**entry) for device, entry in found.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} cannot be read; remove it, and calibrate again") from error


def _checked(runs: dict[str, tuple[float, float]]) -> Calibration:
    """Raises ValueError, TypeError or AttributeError for figures that no run has taught."""
    if not runs:
        raise ValueError("no run")
    for factors in runs.values():
        time, memory = factors
        if not all(_LEAST < float(each) < 1 / _LEAST for each in (time, memory)):
            raise ValueError("no factor that a run teaches")
    return Calibration({name: (float(one), float(two)) for name, (one, two) in runs.items()})


def write_calibrations(path: Path, calibrations: dict[str, Calibration]) -> None:
    """Keep them, in place of those before. Raises ConfigError if they cannot be written."""
    new = path.with_suffix(".new")
    text = json.dumps({device: asdict(each) for device, each in calibrations.items()}, indent=1)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new.write_text(text + "\n", encoding="utf-8")
        new.replace(path)
    except OSError as error:
        raise ConfigError(
            f"--calibrate: {path} cannot be written: {on_one_line(error)}; set XDG_CONFIG_HOME to "
            "a folder of yours"
        ) from error
