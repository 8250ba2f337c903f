"""Finished runs teach the planner how far it is off on their device."""

import json
import math
from pathlib import Path

import pytest

from orpo_ray.errors import ConfigError
from orpo_ray.planner.calibration import (
    Calibration,
    calibration_file,
    learn,
    read_calibrations,
    write_calibrations,
)
from orpo_ray.planner.foreseen import Measured, Prediction, read_plan
from orpo_ray.planner.interval import Interval
from orpo_ray.planner.prediction import calibrated, compare

PLANNED = Prediction(
    device="t4",
    seconds=Interval(50.0, 100.0, 200.0),
    pairs_per_second=Interval(5.0, 10.0, 20.0),
    peak_bytes=Interval(9e9, 10e9, 12e9),
    held_bytes=5e9,
)


def measured(pairs_per_second: float, peak: float) -> Measured:
    return Measured(pairs_per_second=pairs_per_second, peak_bytes=peak)


def test_a_run_teaches_how_much_longer_and_how_much_more_than_its_weights():
    found = learn(None, "run", PLANNED, measured(5.0, 8e9))
    assert found == Calibration({"run": (2.0, 0.6)})
    assert (found.seconds, found.memory) == pytest.approx((2.0, 0.6))


def test_several_runs_are_a_geometric_mean():
    known = None
    for name, speed, peak in (("a", 5.0, 8e9), ("b", 2.5, 10e9), ("c", 20.0, 12e9)):
        known = learn(known, name, PLANNED, measured(speed, peak))
    assert known is not None and len(known.runs) == 3 and known.told == "3 runs"
    assert known.seconds == pytest.approx(math.prod([2.0, 4.0, 0.5]) ** (1 / 3))
    assert known.memory == pytest.approx(math.prod([0.6, 1.0, 1.4]) ** (1 / 3))


def test_a_run_is_counted_once_and_what_it_measured_last_counts():
    once = learn(None, "run", PLANNED, measured(5.0, 8e9))
    assert learn(once, "run", PLANNED, measured(5.0, 8e9)) == once
    later = learn(once, "run", PLANNED, measured(2.5, 8e9))
    assert len(later.runs) == 1 and later.seconds == pytest.approx(4.0)
    assert len(learn(once, "other", PLANNED, measured(5.0, 8e9)).runs) == 2


def test_a_run_that_took_less_than_its_weights_teaches_nothing():
    with pytest.raises(ConfigError, match="less than its weights"):
        learn(None, "run", PLANNED, measured(5.0, 5e9))


WHOLE = {"predicted": PLANNED.to_json(), "measured": {"pairs_per_second": 5.0, "peak_bytes": 8e9}}


def test_a_plan_is_read_as_run_json_keeps_it():
    assert read_plan(json.loads(json.dumps(WHOLE))) == (PLANNED, measured(5.0, 8e9))


@pytest.mark.parametrize(
    "change",
    [
        {"predicted": None},
        {"measured": []},
        *({"measured": {**WHOLE["measured"], "peak_bytes": each}} for each in (None, 0, -5, "9")),
        *(
            {"measured": {**WHOLE["measured"], "pairs_per_second": each}}
            for each in (None, 0.0, math.nan, math.inf, True)
        ),
        *(
            {"predicted": {**WHOLE["predicted"], "pairs_per_second": each}}
            for each in ([0, 0, 0], ["a", "b", "c"], [1, 2], 7)
        ),
        {"predicted": {**WHOLE["predicted"], "held_bytes": 20e9}},
        {"predicted": {**WHOLE["predicted"], "device": 3}},
    ],
)
def test_a_damaged_plan_is_none(change):
    with pytest.raises((ValueError, TypeError, KeyError)):
        read_plan({**WHOLE, **change})


def test_a_calibrated_plan_is_closer_and_narrower():
    known = learn(None, "run", PLANNED, measured(4.0, 13e9))
    shown = calibrated(PLANNED, known)
    assert shown.pairs_per_second.middle == pytest.approx(4.0)
    assert shown.peak_bytes.middle == pytest.approx(13e9)
    assert shown.seconds.middle == pytest.approx(250.0)
    assert shown.seconds.to_json() == pytest.approx([200.0, 250.0, 312.5])
    assert shown.pairs_per_second.to_json() == pytest.approx([3.2, 4.0, 5.0])
    assert calibrated(PLANNED, None) == PLANNED


def test_how_wrong_a_plan_was_is_one_line():
    said = compare(PLANNED.to_json(), {"pairs_per_second": 5.0, "peak_bytes": 12e9})
    assert said == (
        "the plan: pairs a second 5 where 10 were planned (-50%); GB a worker 12 where 10 were "
        "planned (+20%)"
    )


def test_calibrations_are_kept_by_device(tmp_path):
    path = tmp_path / "not" / "there" / "yet.json"
    assert read_calibrations(path) == {}
    both = {
        "cpu": Calibration({"a": (1.5, 0.9), "b": (1.0, 1.0)}),
        "t4": Calibration({"c": (2.0, 1.1)}),
    }
    write_calibrations(path, both)
    assert read_calibrations(path) == both
    assert [each.name for each in path.parent.iterdir()] == ["yet.json"]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "7",
        '{"cpu": 1}',
        '{"cpu": {"runs": {}}}',
        '{"cpu": {"runs": []}}',
        '{"cpu": {"runs": {"a": 1}}}',
        '{"cpu": {"runs": {"a": [1]}}}',
        '{"cpu": {"runs": {"a": ["x", 1]}}}',
        '{"cpu": {"runs": {"a": [0, 1]}}}',
        '{"cpu": {"runs": {"a": [1, -1]}}}',
        '{"cpu": {"runs": {"a": [NaN, 1]}}}',
        '{"cpu": {"runs": {"a": [1e308, 1]}}}',
        '{"cpu": {"runs": {"a": [1, 1]}, "more": 1}}',
    ],
)
def test_a_broken_file_says_what_to_do(tmp_path, content):
    (tmp_path / "c.json").write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"c\.json cannot be read; remove it, and calibrate"):
        read_calibrations(tmp_path / "c.json")


def test_a_place_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"--calibrate: .* cannot be written: .*XDG_CONFIG_HOME"):
        write_calibrations(tmp_path / "file" / "c.json", {})


def test_they_are_among_the_settings_of_the_user(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert calibration_file() == tmp_path / "orpo-ray" / "calibration.json"
    monkeypatch.setenv("XDG_CONFIG_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert calibration_file() == Path(tmp_path, ".config/orpo-ray/calibration.json")


def test_a_prediction_is_plain_data():
    assert json.loads(json.dumps(PLANNED.to_json())) == PLANNED.to_json()
