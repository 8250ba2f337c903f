"""A comparison on paper is its runs one by one, with every seed and search."""

from dataclasses import replace
from typing import Any

import pytest
from test_planner_duration import RTX4090, paper

from orpo_ray.config.contenders import contender, with_steps
from orpo_ray.errors import ConfigError
from orpo_ray.planner.contest import Contest, find_contest
from orpo_ray.planner.plan import Paper

TRAINING = {"pairs_per_step": 8}


def contest(planned: Paper) -> Contest:
    found = find_contest(planned, RTX4090)
    assert found is not None
    return found


def compared(pairs: int | None = 2400, **compare: Any) -> Paper:
    return paper(pairs, training=TRAINING, compare={"methods": ["orpo", "dpo"], **compare})


def hours_of(planned: Paper, method: str, steps: int) -> float:
    run = with_steps(contender(planned.config, method), [steps])
    found = replace(planned, config=run).on(RTX4090).hours
    assert found is not None
    return found.middle


def test_every_seed_of_every_method_counts_and_the_reference_is_in_the_budget() -> None:
    planned = compared(seeds=2)
    found = contest(planned)
    assert (found.gpu, found.methods, found.seeds) == ("rtx4090", ("orpo", "dpo"), 2)
    own = hours_of(planned, "orpo", 300) + hours_of(planned, "dpo", 200)
    assert found.hours.middle == pytest.approx(2 * own)


def test_searches_of_settings_are_added() -> None:
    without, searched = contest(compared()), contest(compared(search=4))
    assert searched.hours.middle > 1.5 * without.hours.middle


def test_a_budget_in_seconds_is_the_answer() -> None:
    found = contest(compared(budget={"seconds": 1800}, seeds=3))
    assert found.hours.middle == pytest.approx(2 * 3 * 0.5)


def test_trials_come_on_top_of_a_budget_in_seconds() -> None:
    found = contest(compared(budget={"seconds": 1800}, seeds=3, search=2))
    assert found.hours.middle == pytest.approx(2 * (3 + 2) * 0.5), "two trials are never given up"
    found = contest(compared(budget={"seconds": 1800}, seeds=3, search=20))
    assert 2 * 3 * 0.5 < found.hours.middle < 2 * (3 + 20) * 0.5


def test_without_a_section_it_is_the_usual_comparison() -> None:
    found = contest(paper(2400, training=TRAINING))
    assert (found.methods, found.seeds) == (("orpo", "sft>dpo"), 3)


def test_what_nobody_knows_or_what_makes_no_runs_has_no_hours() -> None:
    assert find_contest(compared(None), RTX4090) is None
    large = {"training": {"pairs_per_step": 640}}
    assert find_contest(paper(100, **large), RTX4090) is None
    with pytest.raises(ConfigError, match=r"compare\.budget"):
        find_contest(paper(100, **large, compare={}), RTX4090)
