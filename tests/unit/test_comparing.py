"""What `compare` does before runs begin: short runs, searches, shares of the budget, refusals.

Training, searching and the tournament itself are stand-ins here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
from support import Listener, make_artifact, run_config

from orpo_ray.api import comparing
from orpo_ray.config import RunConfig, SearchConfig, stage_configs
from orpo_ray.config.compare import BudgetConfig
from orpo_ray.config.contenders import PILOT_STEPS, contender, seeded, with_steps
from orpo_ray.distributed.preflight import Placement
from orpo_ray.distributed.run import Ground
from orpo_ray.errors import ConfigError, OrpoRayError, RunError, StoppedError
from orpo_ray.models.hardware import CPU
from orpo_ray.runs.comparison import Comparison, Standing
from orpo_ray.runs.comparison_run import comparison_for, find_comparison
from orpo_ray.runs.console import Console
from orpo_ray.runs.results import TrainResult
from orpo_ray.search import compare as course
from orpo_ray.training.equal_budget import FORWARD, Share
from orpo_ray.training.run_plan import steps_of_run


@dataclass
class Machine:
    """Trains nothing. Its clock says how many pairs a second a loss of each kind takes."""

    pairs_per_second: Mapping[str, float]
    fails: Mapping[str, Exception] = field(default_factory=dict)
    """By what the name of a run's folder has in it."""
    asked: list[RunConfig] = field(default_factory=list)
    ready: Sequence[course.Contender] = ()
    failed: Mapping[str, OrpoRayError] = field(default_factory=dict)

    def train(self, config: RunConfig, console: Console, verbose: bool) -> TrainResult:
        """The result of a short run, by the clock."""
        self._asked(config)
        stages = stage_configs(config)
        results = [self._result(stage) for stage in stages or [config]]
        return self._result(config, tuple(results)) if stages else results[0]

    def _result(self, config: RunConfig, stages: tuple[TrainResult, ...] = ()) -> TrainResult:
        speed = self.pairs_per_second[config.objective.kind]
        return cast(TrainResult, Result(None if stages else speed, stages))

    def tune(self, config: RunConfig, console: Console, verbose: bool) -> Any:
        """A search that finds another rate."""
        self._asked(config)
        name = "stages.1.training.learning_rate" if config.stages else "training.learning_rate"
        return Found({name: 0.5})

    def _asked(self, config: RunConfig) -> None:
        self.asked.append(config)
        self._fail(config.name)

    def _fail(self, name: str) -> None:
        for folder, error in self.fails.items():
            if f"/{folder}" in name:
                raise error

    def run_comparison(
        self,
        run: Any,
        contenders: Sequence[course.Contender],
        failed: Mapping[str, OrpoRayError],
        ground: Ground,
        console: Console,
        *,
        judge: None,
    ) -> Comparison:
        """A finished comparison of the methods that could begin."""
        self.ready, self.failed = contenders, failed
        methods = tuple(Standing(method=each.method, state="finished") for each in contenders)
        found = course.begun(run.config, ground)
        run.keep(found)
        self._fail(run.name)
        return Comparison(**{**vars(found), "methods": methods, "status": "finished"})


@dataclass
class Result:
    """What a short run tells."""

    pairs_per_second: float | None
    stages: tuple[TrainResult, ...]


@dataclass
class Found:
    """What a search tells."""

    values: dict[str, Any]


SPEEDS = {"sft": 40.0, "orpo": 10.0, "dpo": 20.0}


@pytest.fixture
def ground(tmp_path: Path) -> Ground:
    artifact = make_artifact(tmp_path / "storage")
    return Ground(artifact, Placement(workers=1, cpus=1, gpus=0, nodes=1, uses_ray=True), CPU)


def config(tmp_path: Path, **compare: Any) -> RunConfig:
    own = {"methods": ["orpo", "sft>dpo"], "seeds": 2, **compare}
    found = run_config(tmp_path / "storage", compare=own, training={"pairs_per_step": 1})
    comparison_for(found).folder.mkdir(parents=True, exist_ok=True)
    return found


def at(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.setattr(comparing, "train", machine.train)
    monkeypatch.setattr(comparing, "tune", machine.tune)
    monkeypatch.setattr(course, "run_comparison", machine.run_comparison)
    return machine


def test_short_runs_tell_how_many_steps_fill_the_seconds(
    tmp_path: Path, ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = at(Machine(SPEEDS), monkeypatch)
    own = config(tmp_path, budget={"seconds": 120.0})
    comparing._tournament(own, ground, Listener(), verbose=False)
    assert [each.name.split("/")[-2:] for each in machine.asked] == [
        ["orpo", "pilot"],
        ["sft-dpo", "pilot"],
    ]
    assert all(len(steps_of_run(each, 36)) == PILOT_STEPS for each in machine.asked[:1])
    orpo, staged = machine.ready
    for share in orpo.shares:
        assert share.steps == (1200,) and share.used == pytest.approx(120, rel=0.02)
    for share in staged.shares:
        sft, dpo = share.steps
        clock = sft / 40 + (dpo + FORWARD * 36) / 20
        assert clock == pytest.approx(share.used) and clock == pytest.approx(120, rel=0.02)


def test_what_was_used_of_seconds_is_what_the_clock_showed() -> None:
    shares = [Share(steps=(9,), used=100.0, reference=20.0)] * 2
    assert course._used(shares, [80.0, 130.0]) == [100.0, 150.0]


def test_a_method_whose_short_run_fails_does_not_end_the_others(
    tmp_path: Path, ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = at(Machine(SPEEDS, {"orpo/pilot": RunError("not finite")}), monkeypatch)
    console = Listener()
    own = config(tmp_path, budget={"seconds": 120.0})
    comparing._tournament(own, ground, console, verbose=False)
    assert [each.method for each in machine.ready] == ["sft>dpo"]
    assert {method: str(error) for method, error in machine.failed.items()} == {
        "orpo": "not finite"
    }
    assert "orpo: failed: not finite" in console.said


def test_a_method_whose_search_fails_does_not_end_the_others(
    tmp_path: Path, ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = at(Machine(SPEEDS, {"sft-dpo": RunError("no trial finished")}), monkeypatch)
    comparing._tournament(config(tmp_path, search=3), ground, Listener(), verbose=False)
    assert [each.search for each in machine.asked] == [SearchConfig(trials=3)] * 2
    (ready,) = machine.ready
    assert (ready.method, ready.run.training.learning_rate) == ("orpo", 0.5)
    assert list(machine.failed) == ["sft>dpo"]


def test_a_comparison_is_on_record_while_its_settings_are_searched(
    tmp_path: Path, ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    at(Machine(SPEEDS, {"sft-dpo": StoppedError("stopped")}), monkeypatch)
    own = config(tmp_path, search=3)
    with pytest.raises(StoppedError):
        comparing._tournament(own, ground, Listener(), verbose=False)
    assert find_comparison(own.place).status == "interrupted"


def test_a_stopped_short_run_ends_all(
    tmp_path: Path, ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = at(Machine(SPEEDS, {"orpo/pilot": StoppedError("stopped")}), monkeypatch)
    own = config(tmp_path, budget={"seconds": 120.0})
    with pytest.raises(StoppedError):
        comparing._tournament(own, ground, Listener(), verbose=False)
    assert len(machine.asked) == 1


def test_seconds_that_fill_no_whole_number_of_steps_are_refused_with_the_method(
    tmp_path: Path, ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    at(Machine(SPEEDS), monkeypatch)
    own = config(tmp_path, budget={"seconds": 0.13})
    with pytest.raises(ConfigError, match=r"no whole number of steps .*\(method orpo\)"):
        comparing._tournament(own, ground, Listener(), verbose=False)


def test_tokens_are_counted_in_the_order_of_each_seed(tmp_path: Path, ground: Ground) -> None:
    budget = BudgetConfig(tokens=14_000)
    own = config(tmp_path, methods=["orpo"], seeds=8)
    lengths = ground.artifact.train.lengths.copy()
    lengths[::3] *= 4  # so that it counts which pairs come first
    found = comparing._shares(own, "orpo", budget, lengths)
    assert len({share.steps for share in found}) > 1
    run = contender(own, "orpo")
    for seed, share in enumerate(found):
        steps = steps_of_run(with_steps(seeded(run, seed), [*share.steps]), 36)
        used = sum(int(lengths[pairs].sum()) for pairs in steps)
        assert used == share.used and used == pytest.approx(14_000, rel=0.02)


# --- curves ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("curve", ["250", [0], [-4], [2.5], [True], ["8"]])
def test_a_curve_is_numbers_of_pairs(tmp_path: Path, curve: Any) -> None:
    with pytest.raises(ConfigError, match="curve: must be numbers of pairs"):
        comparing.compare(config(tmp_path), Listener(), curve=curve)


def points(tmp_path: Path, ground: Ground, counts: Sequence[int]) -> Comparison:
    own = config(tmp_path)
    with comparison_for(own).at_work(Listener()):
        found = comparing._curve(own, ground, counts, Listener(), verbose=False)
        comparison_for(own).keep(found)
        return found


def test_a_curve_has_each_point_once_in_order_and_its_words_once(
    tmp_path: Path, ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    at(Machine(SPEEDS), monkeypatch)
    first = points(tmp_path, ground, [36, 18, 36])
    assert first.status == "finished"
    assert [point.pairs for point in first.curve] == [18, 36]
    again = points(tmp_path, ground, [18, 36])
    assert again == first, "words of an earlier curve are not said again"


def test_a_curve_does_not_finish_a_comparison_that_was_interrupted(
    tmp_path: Path, ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    at(Machine(SPEEDS), monkeypatch)
    run = comparison_for(config(tmp_path))
    begun = course.begun(run.config, ground)
    entry = course.Entry(number=0, method="orpo", seed=0, run="x")
    run.keep(Comparison(**{**vars(begun), "entries": [entry]}))
    assert points(tmp_path, ground, [18]).status == "stopped"


def test_the_points_of_a_curve_that_ends_early_are_kept(
    tmp_path: Path, ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    at(Machine(SPEEDS, {"pairs-36": StoppedError("stopped")}), monkeypatch)
    with pytest.raises(StoppedError):
        points(tmp_path, ground, [18, 36])
    record = comparison_for(config(tmp_path)).comparison()
    assert record is not None and record.status == "stopped"
    assert [point.pairs for point in record.curve] == [18]


# --- what is on record ----------------------------------------------------------------------------


def test_a_finished_run_whose_files_are_gone_is_trained_again(
    tmp_path: Path, ground: Ground
) -> None:
    own, console = config(tmp_path, methods=["orpo"], seeds=1), Listener()
    runs = {("orpo", 0): seeded(contender(own, "orpo"), 0)}
    run = comparison_for(own)
    entry = course.Entry(number=0, method="orpo", seed=0, run="x", state="finished")
    run.keep(Comparison(**{**vars(course.begun(own, ground)), "entries": [entry]}))
    (again,) = course._take_up(run, runs, ground, console).entries
    assert again.state == "running"
    assert console.said == ["orpo, seed 0: its files are gone, so it is trained again"]
