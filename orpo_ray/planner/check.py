"""Published measurements against what the planner predicts for a stock engine.

Only rows of grade `a` are scored, each once. All others are listed with their error.
"""

import csv
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from orpo_ray.errors import CannotTellError, ConfigError
from orpo_ray.planner.hardware import find_server_link
from orpo_ray.planner.measured import Row, find_gpu, read_training
from orpo_ray.planner.speed import count_work, predict_speed
from orpo_ray.planner.stock import device_bytes, predict_peak, reserved_bytes, weight_bytes

_GIB = 2**30
ALLOCATED_WITHIN, DEVICE_WITHIN = 0.05, 0.15
_ALWAYS = ("row", "model", "method", "batch", "sequence", "gpu", "grade", "source", "stack")
_MEMORY = ("allocated_gib", "device_gib", "layers", "hidden", "heads", "vocab")
_SPEED = ("tokens_per_second_per_gpu",)


@dataclass(frozen=True, kw_only=True)
class Result:
    """One row, predicted and measured.

    `figure` says what: allocated, reserved, device or tokens a second. The figures are None where
    nothing can be told, and `why` says why, or why the row is not scored. `reason` is that of the
    interval.
    """

    row: Row
    figure: str
    scored: bool
    predicted: float | None = None
    measured: float | None = None
    low: float | None = None
    high: float | None = None
    reason: str = ""
    why: str = ""

    @property
    def source(self) -> str:
        """The first word of where the row comes from: a repository, mostly."""
        return self.row.text("source").partition(" ")[0]

    @property
    def method(self) -> str:
        """How the base was held and trained."""
        return self.row.text("method")

    @property
    def error(self) -> float | None:
        """The error of the prediction as a part of what was measured."""
        if self.predicted is None or not self.measured:
            return None
        return self.predicted / self.measured - 1

    @property
    def is_inside(self) -> bool:
        """Whether what was measured lies in the interval."""
        if self.low is None or self.high is None or self.measured is None:
            return False
        return self.low <= self.measured <= self.high


def check_file(path: str | Path) -> dict[str, Any]:
    """Predict every row of a CSV file of measurements; its columns say which kind it has.

    The result has the score of grade `a`, and each row that is not in it or misses its limit.
    Errors are parts of what was measured: 0.05 is 5 %, and positive where the prediction is too
    high. Raises ConfigError for a file of another form.
    """
    rows = read_rows(Path(path))
    columns = rows[0].texts
    if all(column in columns for column in _MEMORY):
        return {"file": str(path), "kind": "memory"} | _check_memory(rows)
    return {"file": str(path), "kind": "throughput"} | _check_speed(rows)


def read_rows(path: Path) -> list[Row]:
    """The rows of a file of measurements. Raises ConfigError for a file of another form."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            rows = [Row(texts, path.name, reader.line_num) for texts in reader]
            columns = reader.fieldnames or []
    except OSError as error:
        raise ConfigError(f"--check: cannot read {path}: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"--check: {path} is not a CSV file in UTF-8: {error}") from error
    if not rows:
        raise ConfigError(f"--check: {path} has no rows")
    _refuse_other_columns(path, columns)
    for row in rows:
        if None in row.texts or None in row.texts.values():
            raise ConfigError(
                f"{path.name}: row {row.name} (line {row.line}) has more or fewer fields than the "
                "header"
            )
    return rows


def _refuse_other_columns(path: Path, columns: Sequence[str]) -> None:
    missing = [column for column in _ALWAYS if column not in columns]
    if not missing and "allocated_gib" in columns:
        missing = [column for column in _MEMORY if column not in columns]
    elif not missing and _SPEED[0] not in columns:
        missing = [f"allocated_gib or {_SPEED[0]}"]
    if missing:
        raise ConfigError(f"--check: {path} has no column {', '.join(missing)}")


def _check_memory(rows: list[Row]) -> dict[str, Any]:
    results = [result for row in rows for result in _predict_memory(row)]
    tensors = [each for each in results if each.scored and each.figure == "allocated"]
    device = [each for each in results if each.scored and each.figure != "allocated"]
    return {
        "rows": len(rows),
        **_score(tensors, ALLOCATED_WITHIN),
        "device": _score(device, DEVICE_WITHIN),
        "weights": _weights_error(rows),
        "by_source": _by(tensors, lambda each: each.source, ALLOCATED_WITHIN),
        "by_method": _by(tensors, lambda each: each.method, ALLOCATED_WITHIN),
        "others": [
            _entry(each)
            for each in results
            if not each.scored or abs(each.error or 0.0) > _limit(each)
        ],
    }


def _limit(result: Result) -> float:
    return ALLOCATED_WITHIN if result.figure == "allocated" else DEVICE_WITHIN


def _check_speed(rows: list[Row]) -> dict[str, Any]:
    results = [_predict_speed(row) for row in rows]
    scored = [each for each in results if each.scored]
    widths = [each.high / each.low for each in scored if each.high and each.low]
    return {
        "rows": len(rows),
        **_score(scored, None),
        "interval": {
            "high_over_low": median(widths) if widths else None,
            "widest": max(widths, default=None),
            "reasons": sorted({each.reason for each in scored}),
        },
        "by_source": _by(scored, lambda each: each.source, None),
        "by_method": _by(scored, lambda each: each.method, None),
        "others": [_entry(each) for each in results if not (each.scored and each.is_inside)],
    }


def _predict_memory(row: Row) -> list[Result]:
    """A result for what torch allocated and one for what the process took of the device.

    A row that states neither counts by what torch reserved.
    """
    why = _why_not_scored(row)
    stated = {name: row.number(f"{name}_gib") for name in ("allocated", "device", "reserved")}
    figures = {name: value for name, value in stated.items() if value}
    if len(figures) > 1:
        figures.pop("reserved", None)
    try:
        if not figures:
            raise CannotTellError("no memory is stated")
        predicted = _predicted_gib(row)
    except CannotTellError as error:
        return [_unknown(row, next(iter(figures), "allocated"), error)]
    return [
        Result(
            row=row,
            figure=name,
            scored=not why,
            predicted=predicted[name],
            measured=measured,
            why=why,
        )
        for name, measured in figures.items()
    ]


def _predicted_gib(row: Row) -> dict[str, float]:
    training = read_training(row)
    peak, gpu = predict_peak(training), find_gpu(row)
    memory = gpu.memory if gpu else float("inf")
    device = device_bytes(training, peak, gpu.name if gpu else "", memory)
    return {
        "allocated": peak.allocated / _GIB,
        "reserved": reserved_bytes(training, peak) / _GIB,
        "device": device / _GIB,
    }


def _predict_speed(row: Row) -> Result:
    why, figure = _why_not_scored(row), "tokens_per_second_per_gpu"
    try:
        measured = row.needed(figure)
        training, gpu = read_training(row), find_gpu(row)
        if gpu is None:
            raise CannotTellError(f"the GPU {row.text('gpu') or '(not stated)'} is unknown")
    except CannotTellError as error:
        return _unknown(row, figure, error)
    speed = predict_speed(count_work(training), gpu, find_server_link(gpu.link).rate)
    return Result(
        row=row,
        figure=figure,
        scored=not why,
        predicted=speed.middle,
        measured=measured,
        low=speed.low,
        high=speed.high,
        reason=speed.reason,
        why=why,
    )


def _why_not_scored(row: Row) -> str:
    """Why a row does not count; empty if it does."""
    grade, note = row.text("grade"), row.text("note")
    if "do not score" in note:
        return "its source doubts it"
    if "repeat" in note:
        return "a repeat of another row"
    return "" if grade == "a" else f"grade {grade or 'not stated'}"


def _unknown(row: Row, figure: str, error: CannotTellError) -> Result:
    whys = [_why_not_scored(row), f"cannot tell: {error}"]
    return Result(row=row, figure=figure, scored=False, why="; ".join(filter(None, whys)))


def _score(results: list[Result], limit: float | None) -> dict[str, Any]:
    """The score of some rows by a limit of the error, or by their intervals if there is none.

    Figures are None where there is no row.
    """
    errors = [(each.row.name, each.error) for each in results if each.error is not None]
    values = [error for _, error in errors]
    worst = max(errors, key=lambda pair: abs(pair[1]), default=None)
    score: dict[str, Any] = {
        "scored": len(values),
        "mean_error": fmean(values) if values else None,
        "mean_abs_error": fmean(map(abs, values)) if values else None,
        "worst": {"row": worst[0], "error": worst[1]} if worst else None,
    }
    if limit is None:
        return score | {"share_within_interval": _share([each.is_inside for each in results])}
    within = _share([abs(value) <= limit for value in values])
    return score | {f"share_within_{round(100 * limit)}": within}


def _share(held: Sequence[bool]) -> float | None:
    return sum(held) / len(held) if held else None


def _by(
    results: list[Result], name: Callable[[Result], str], limit: float | None
) -> dict[str, Any]:
    groups: dict[str, list[Result]] = defaultdict(list)
    for each in results:
        groups[name(each)].append(each)
    return {key: _score(group, limit) for key, group in groups.items()}


def _weights_error(rows: list[Row]) -> dict[str, Any]:
    """How far the weights alone are from what was allocated after loading, where a row says so.

    The predictions do not use that column.
    """
    errors = []
    for row in rows:
        measured = row.number("after_load_gib")
        if not measured or _why_not_scored(row):
            continue
        try:
            training = read_training(row)
        except CannotTellError:
            continue  # The row itself is listed with the reason.
        adapter = training.trained_bytes * training.trained / training.parts
        predicted = (weight_bytes(training) + adapter) / _GIB
        errors.append(predicted / measured - 1)
    return {
        "scored": len(errors),
        "mean_error": fmean(errors) if errors else None,
        "mean_abs_error": fmean(map(abs, errors)) if errors else None,
    }


def _entry(result: Result) -> dict[str, Any]:
    """A row that is not scored, or not held."""
    entry: dict[str, Any] = {
        "row": result.row.name,
        "figure": result.figure,
        "predicted": result.predicted,
        "measured": result.measured,
        "error": result.error,
        "why": result.why or "outside the limit",
    }
    if result.low is not None:
        entry |= {"low": result.low, "high": result.high}
    return entry
