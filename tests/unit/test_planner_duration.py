"""Steps, evaluations and checkpoints are those of the run; what is beside them is added."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from orpo_ray.config import RunConfig, build
from orpo_ray.config.search import SearchConfig
from orpo_ray.config.training import every_to_steps
from orpo_ray.planner.duration import Duration, search_seconds, search_share
from orpo_ray.planner.hardware import find_gpus, find_network
from orpo_ray.planner.interval import Interval
from orpo_ray.planner.lengths import Lengths
from orpo_ray.planner.plan import Paper, Place
from orpo_ray.planner.shapes import known_shape
from orpo_ray.training.run_plan import steps_of_run

(RTX4090,) = find_gpus("rtx4090")
SHAPE = known_shape("Qwen/Qwen2.5-0.5B")


def paper(pairs: int | None = 1000, count: int = 1, nodes: int = 1, **sections: Any) -> Paper:
    assert SHAPE is not None
    tree = {
        "name": "p",
        "model": {"base": "Qwen/Qwen2.5-0.5B"},
        "data": {"train": ["owner/pairs"]},
        **sections,
    }
    return Paper(
        config=build(RunConfig, tree, {(): "tests"}),
        shape=SHAPE,
        lengths=Lengths(
            lengths=np.array([[200, 250, 150]] * 100, dtype=np.int64),
            pairs=pairs,
            held_out=50,
            source="tests",
        ),
        place=Place(count=count, nodes=nodes, network=find_network("1gbit")),
    )


def took(planned: Paper) -> Duration:
    found = planned.stage(planned.config, RTX4090).duration
    assert found is not None
    return found


def speed_of(planned: Paper) -> Interval:
    found = planned.stage(planned.config, RTX4090).pairs_per_second
    assert found is not None
    return found


def of_parts(found: Duration) -> list[float]:
    ends = [part.to_json() for part in found.parts.values()]
    return [sum(each) for each in zip(*ends, strict=True)]


@pytest.mark.parametrize(
    "training",
    [
        {"pairs_per_step": 64, "epochs": 1},
        {"pairs_per_step": 64, "epochs": 3},
        {"pairs_per_step": 7, "epochs": 0.5},
        {"pairs_per_step": 2000, "epochs": 2},
        {"pairs_per_step": 2000, "epochs": 0.1},
        {"pairs_per_step": 64, "max_steps": 100},
    ],
)
@pytest.mark.parametrize("pairs", [1, 63, 1000])
def test_there_are_as_many_steps_as_the_run_has(training, pairs):
    planned = paper(pairs, training={**training, "warmup": 0})
    assert took(planned).steps == len(steps_of_run(planned.config, pairs))


@pytest.mark.parametrize("every", [1, 7, 16, 100, 0.1, 0.3, 1.0])
def test_events_are_counted_as_the_run_has_them(every):
    """One evaluation before the first step; the last step is evaluated and saved, too."""
    counted, rare = (
        paper(training={"epochs": 1, "eval_every": each, "checkpoint_every": each})
        for each in (every, 1.0)
    )
    steps = took(counted).steps
    between = every_to_steps(every, steps)
    events = sum(step == steps or step % between == 0 for step in range(1, steps + 1))

    def times(name: str) -> float:
        return took(counted).parts[name].middle / took(rare).parts[name].middle

    assert times("evaluation") == pytest.approx((1 + events) / 2)
    assert times("checkpoints") == pytest.approx(events)


def test_parts_add_up():
    found = took(paper())
    assert found.seconds.to_json() == pytest.approx(of_parts(found))
    assert set(found.parts) == {"start", "steps", "evaluation", "checkpoints"}
    each = [part.to_json() for part in found.parts.values()]
    assert all(0 < low <= middle <= high for low, middle, high in each)


def test_pairs_a_second_are_those_of_the_steps():
    planned = paper(6400, training={"epochs": 1, "pairs_per_step": 64})
    found = took(planned)
    speed = speed_of(planned)
    assert speed.middle == pytest.approx(6400 / found.parts["steps"].middle)
    assert speed.low == pytest.approx(6400 / found.parts["steps"].high)


def test_a_smaller_last_step_takes_less():
    training = {"epochs": 1, "pairs_per_step": 64}
    whole, more = took(paper(640, training=training)), took(paper(641, training=training))
    assert (whole.steps, more.steps) == (10, 11)
    taken = more.parts["steps"].middle / whole.parts["steps"].middle
    assert taken == pytest.approx(641 / 640)


@pytest.mark.parametrize(("kind", "engine"), [("dpo", "fast"), ("ipo", "fast"), ("kto", "trl")])
def test_a_reference_is_one_forward_pass_more(kind, engine):
    training = {"eval_every": 1.0, "engine": engine, "samples": 0}
    found = took(paper(objective={"kind": kind}, training=training))
    own = found.parts["reference"]
    forward = found.parts["evaluation"].times((1000 + 50) / 50 / 2)
    assert own.middle - found.parts["start"].middle == pytest.approx(forward.middle)


def test_an_evaluation_counts_its_samples_token_by_token():
    def evaluation(samples: int, **sections: Any) -> float:
        training = {"eval_every": 1.0, "samples": samples}
        return took(paper(training=training, **sections)).parts["evaluation"].middle / 2

    one = evaluation(1) - evaluation(0)
    # Python starts the kernels of 24 layers for each of 64 tokens: published, 0.03 s a pass.
    assert 64 * 0.02 < one < 64 * 0.06
    assert evaluation(8) - evaluation(0) < 2 * one, "they are written side by side"
    shared = {"count": 2, "scale": {"deepspeed": {"stage": 3}}}
    assert evaluation(3, **shared) == evaluation(0, **shared)


@pytest.mark.parametrize("kind", ["orpo", "sft", "simpo"])
def test_without_a_reference_there_is_none(kind):
    assert "reference" not in took(paper(objective={"kind": kind})).parts


def test_stages_add_up():
    planned = paper(stages=[{"objective": {"kind": "sft"}}, {"objective": {"kind": "dpo"}}])
    found = planned.on(RTX4090)
    assert [stage.objective for stage in found.stages] == ["sft", "dpo"]
    seconds = [stage.duration.seconds.middle for stage in found.stages if stage.duration]
    assert len(seconds) == 2 and found.hours is not None
    assert found.hours.middle == pytest.approx(sum(seconds) / 3600)


def test_more_workers_are_faster_and_a_network_takes_its_share():
    one, two, apart = paper(), paper(count=2), paper(nodes=2)
    speeds = [speed_of(each).middle for each in (one, two, apart)]
    assert speeds[0] < speeds[2] < speeds[1] < 2 * speeds[0]


def test_without_a_number_of_pairs_steps_alone_say_how_long():
    assert paper(None).stage(paper(None).config, RTX4090).duration is None
    assert paper(None).on(RTX4090).hours is None
    counted = paper(None, training={"max_steps": 30})
    assert took(counted).steps == 30
    pairs = 30 * counted.config.training.pairs_per_step
    speed = speed_of(counted).middle
    assert speed_of(paper(None)).middle == pytest.approx(speed)
    assert took(counted).parts["steps"].middle == pytest.approx(pairs / speed)


def test_asha_computes_its_share_of_all_trials():
    search = build(SearchConfig, {"grace": 0.2, "eta": 3, "scheduler": "asha"}, {(): "tests"})
    share = 0.2 + 0.4 / 3 + 0.4 / 9
    assert search_share(search, 16).to_json() == pytest.approx([share, 1.2 * share, 1.4 * share])
    short = replace_search(search, grace=0.05, eta=4)
    assert search_share(short, 16).low == pytest.approx(0.05 + 0.15 / 4 + 0.6 / 16 + 0.2 / 64)
    all_of_it = replace_search(search, grace=0.9, eta=2)
    assert search_share(all_of_it, 16).to_json() == [pytest.approx(0.95), 1.0, 1.0]


def replace_search(search: SearchConfig, **changes: Any) -> SearchConfig:
    return search.model_copy(update=changes)


def test_without_a_scheduler_every_trial_runs_to_its_end():
    search = build(SearchConfig, {"scheduler": "none"}, {(): "tests"})
    assert search_share(search, 16) == Interval.sure(1.0)


def test_two_trials_have_no_third_part_that_goes_on():
    search = build(SearchConfig, {"eta": 3}, {(): "tests"})
    assert search_share(search, 2) == Interval.sure(1.0) != search_share(search, 3)


def test_trials_share_the_reference_and_each_of_them_starts():
    search = build(SearchConfig, {"grace": 0.5, "eta": 2}, {(): "tests"})
    one = Interval.sure
    run = Duration(
        seconds=one(1130.0),
        parts={"start": one(30.0), "steps": one(1000.0), "reference": one(100.0)},
        steps=10,
    )
    found = search_seconds([run], search, 4)
    assert found.low == pytest.approx(4 * 30 + 4 * 0.75 * 1000 + 100)


def test_a_search_takes_its_trials_and_is_paid_for():
    searched = paper(search={"trials": 8, "scheduler": "none"})
    found = searched.on(RTX4090)
    assert found.hours is not None and found.search is not None
    assert found.search.middle == pytest.approx(8 * found.hours.middle)
    assert math.isclose(found.search.high, 8 * found.hours.high)
    assert replace(searched, config=paper().config).on(RTX4090).search is None
