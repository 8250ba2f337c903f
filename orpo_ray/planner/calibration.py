"""What runs on a machine have taught the planner: how far its figures were off, by device."""

import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from orpo_ray.errors import ConfigError, on_one_line
from orpo_ray.planner.interval import Interval

_FILE = "orpo-ray/calibration.json"
_SPREAD = 1.25
"""An interval of calibrated time goes this factor up and down: runs of one machine scatter so."""


@dataclass(frozen=True)
class Calibration:
    """Factors from predicted to measured, for one device: of time, of memory, and from which runs.

    Each of `runs` names a run and the speed that it measured, so that none is counted twice.
    """

    seconds: float
    memory: float
    runs: tuple[str, ...]

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
    before: Calibration | None, name: str, predicted: dict[str, Any], measured: dict[str, Any]
) -> Calibration:
    """The calibration after one more run: the geometric mean over all runs.

    A run that is among them already changes nothing. Raises ConfigError for a run that did not
    measure both.
    """
    if not measured.get("pairs_per_second") or not measured.get("peak_bytes"):
        raise ConfigError("--calibrate: the run has measured no step, so there is nothing to learn")
    run = f"{name}: {measured['pairs_per_second']:.9g} pairs a second"
    known = before or Calibration(1.0, 1.0, ())
    if run in known.runs:
        return known
    seconds = predicted["pairs_per_second"][1] / measured["pairs_per_second"]
    memory = measured["peak_bytes"] / predicted["peak_bytes"][1]
    runs = (*known.runs, run)
    return Calibration(
        _mean(known.seconds, seconds, len(runs)), _mean(known.memory, memory, len(runs)), runs
    )


def _mean(before: float, new: float, runs: int) -> float:
    return math.exp(((runs - 1) * math.log(before) + math.log(new)) / runs)


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


def _checked(seconds: float, memory: float, runs: list[str]) -> Calibration:
    """Raises ValueError or TypeError for figures that no run has taught."""
    if not all(0 < each < math.inf for each in (seconds, memory)):
        raise ValueError("a factor is not above 0")
    if not isinstance(runs, list) or not runs or not all(isinstance(each, str) for each in runs):
        raise ValueError("no list of runs")
    return Calibration(seconds, memory, tuple(runs))


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
