"""A run says at its start what the planner expects, or why it cannot tell; it trains anyway."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support import BASE, Listener, make_artifact, run_config

from orpo_ray.data.store import Artifact
from orpo_ray.distributed.preflight import Placement
from orpo_ray.models.hardware import CPU, Hardware
from orpo_ray.planner.calibration import Calibration, calibration_file, write_calibrations
from orpo_ray.planner.foretold import Foretold, foretell, look_back
from orpo_ray.runs.run import Run

ALONE = Placement(workers=1, cpus=1.0, gpus=0.0, nodes=1, uses_ray=False)
T4 = Hardware(
    device="cuda", name="Tesla T4", bfloat16=False, flash_attention=False, memory=14930 * 2**20
)
Look = Callable[..., tuple[Foretold | None, list[str]]]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return make_artifact(tmp_path_factory.mktemp("foretold"))


@pytest.fixture
def look(tmp_path: Path, artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> Look:
    """Has a run planned, and gives what was said."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "settings"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def call(
        hardware: Hardware = CPU, placement: Placement = ALONE, **sections: Any
    ) -> tuple[Foretold | None, list[str]]:
        console = Listener()
        run = Run(run_config(tmp_path, **sections))
        return foretell(run, artifact, placement, hardware, console), console.said

    return call


def test_time_and_memory_are_announced(look):
    found, said = look()
    assert found is not None and found.raw == found.shown
    assert found.raw.device == "cpu"
    (line,) = said
    assert line.startswith("planned: ") and line.endswith(" GB a worker")


def test_more_threads_are_faster(look, monkeypatch):
    one, _ = look()
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    four, _ = look()
    assert four.raw.pairs_per_second.middle > one.raw.pairs_per_second.middle
    under_ray, _ = look(placement=replace(ALONE, uses_ray=True))
    assert under_ray.raw.pairs_per_second == one.raw.pairs_per_second


def test_a_variable_that_sets_no_thread_is_no_number_of_threads(look, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "0")
    found, _ = look()
    monkeypatch.delenv("OMP_NUM_THREADS")
    unset, _ = look()
    assert found.raw.pairs_per_second == unset.raw.pairs_per_second


def test_a_known_gpu_is_planned_with_the_bytes_of_its_tensors(look):
    found, _ = look(T4)
    assert found is not None and found.raw.device == "t4"
    assert found.raw.peak_bytes.high < 0.5e9


def test_what_was_learnt_on_the_device_is_taken_and_said(look):
    plain, _ = look()
    write_calibrations(calibration_file(), {"cpu": Calibration(dict.fromkeys("abc", (2.0, 0.5)))})
    found, said = look()
    assert said[0].endswith("(calibrated by 3 runs)")
    assert found.raw == plain.raw
    assert found.shown.seconds.middle == pytest.approx(2 * plain.raw.seconds.middle)
    held = plain.raw.held_bytes
    moving = plain.raw.peak_bytes.middle - held
    assert found.shown.peak_bytes.middle == pytest.approx(held + 0.5 * moving)
    assert "calibrated" not in look(T4)[1][0]


def other_base(folder: Path) -> str:
    shutil.copytree(BASE, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(
        json.dumps(config | {"model_type": "mamba"}), encoding="utf-8"
    )
    return str(folder)


def test_an_unknown_base_is_not_planned(look, tmp_path):
    found, said = look(model={"base": other_base(tmp_path / "base")})
    assert found is None
    (line,) = said
    assert line.startswith("not planned: ") and "mamba" in line


def test_an_unknown_gpu_is_not_planned(look):
    found, said = look(replace(T4, name="AMD Instinct MI300X"))
    assert (found, said) == (None, ["not planned: the planner does not know AMD Instinct MI300X"])


def test_what_does_not_fit_is_said_and_tried_all_the_same(look, monkeypatch):
    monkeypatch.setattr("orpo_ray.planner.hardware._GIB", 2**20)
    found, said = look(replace(T4, memory=int(14.58 * 2**20)))
    assert found is None
    assert "GB of memory are missing; the largest micro-batch is tried all the same" in said[0]


def test_a_broken_calibration_does_not_end_a_run(look):
    calibration_file().parent.mkdir(parents=True)
    calibration_file().write_text("{", encoding="utf-8")
    found, said = look()
    assert found is None
    assert said[0].startswith("not planned: ") and "remove it, and calibrate again" in said[0]


def test_without_a_plan_there_is_nothing_to_look_back_on(tmp_path):
    console = Listener()
    look_back(Run(run_config(tmp_path)), None, console)
    assert console.said == []
