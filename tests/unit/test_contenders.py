"""The runs that methods of a comparison make of a config, and the steps that a budget gives."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orpo_ray.config import RunConfig, build, dump, stage_configs
from orpo_ray.config.compare import BudgetConfig, CompareConfig
from orpo_ray.config.contenders import PILOT_STEPS, contender, pilot, seeded, with_steps
from orpo_ray.errors import ConfigError
from orpo_ray.training.equal_budget import FORWARD, Share, budget_of, share
from orpo_ray.training.run_plan import steps_of_run


def config(**sections: Any) -> RunConfig:
    tree = {
        "name": "p",
        "model": {"base": "owner/base"},
        "data": {"train": ["owner/pairs"]},
        **sections,
    }
    return build(RunConfig, tree, {(): "tests"})


def kinds(run: RunConfig) -> list[tuple[str, float | None]]:
    return [
        (each.objective.kind, each.training.learning_rate) for each in stage_configs(run) or [run]
    ]


# --- the run of a method ----------------------------------------------------------------------


def test_a_method_has_its_usual_settings_and_the_configs_own_count_for_its_own() -> None:
    own = config(objective={"kind": "orpo", "lambda": 0.7}, training={"learning_rate": 1e-3})
    run = contender(own, "orpo")
    assert (run.objective, run.training.learning_rate) == (own.objective, 1e-3)
    assert run.name == "p/compare/orpo" and run.scale.ray
    assert kinds(contender(own, "dpo")) == [("dpo", 5e-5)]
    staged = contender(own, "sft>dpo")
    assert staged.name == "p/compare/sft-dpo"
    assert kinds(staged) == [("sft", 2e-4), ("dpo", 5e-5)]


def test_stages_of_the_config_are_those_of_the_method() -> None:
    stages = [
        {"objective": {"kind": "sft"}, "training": {"learning_rate": 1e-3}},
        {"objective": {"kind": "dpo", "beta": 0.3}, "training": {"learning_rate": 2e-5}},
    ]
    run = contender(config(stages=stages), "sft>dpo")
    assert kinds(run) == [("sft", 1e-3), ("dpo", 2e-5)]
    assert dump(stage_configs(run)[1])["objective"]["beta"] == 0.3
    assert kinds(contender(config(stages=stages), "orpo")) == [("orpo", 2e-4)]


def test_settings_change_a_method_and_make_new_ones() -> None:
    settings = {
        "dpo": {"objective": {"beta": 0.4}},
        "slow": {"objective": {"kind": "orpo"}, "training": {"learning_rate": 1e-6}},
    }
    own = config(compare={"methods": ["dpo", "slow", "sft>slow"], "settings": settings})
    assert dump(contender(own, "dpo"))["objective"]["beta"] == 0.4
    assert kinds(contender(own, "slow")) == [("orpo", 1e-6)]
    assert kinds(contender(own, "sft>slow")) == [("sft", 2e-4), ("orpo", 1e-6)]


def test_kto_is_trained_by_trl() -> None:
    assert contender(config(), "kto").training.engine == "trl"


def test_a_comparison_and_a_search_are_not_those_of_its_runs() -> None:
    run = contender(config(compare={}, search={"trials": 3}), "orpo")
    assert run.compare is None and run.search is None


def test_seeds_have_folders_of_their_own() -> None:
    run = contender(config(training={"seed": 7}), "orpo")
    found = [seeded(run, number) for number in range(2)]
    assert [(each.name, each.training.seed) for each in found] == [
        ("p/compare/orpo/seed-0", 7),
        ("p/compare/orpo/seed-1", 8),
    ]


@pytest.mark.parametrize("method", ["orpo", "sft>orpo"])
def test_a_pilot_is_a_short_run_of_each_stage_without_a_warm_up_of_its_own(method: str) -> None:
    settings = {"orpo": {"training": {"warmup": 500, "eval_every": 5}}}
    run = contender(config(training={"epochs": 3}, compare={"settings": settings}), method)
    short = pilot(run)
    assert short.name == f"{run.name}/pilot"
    assert short.scale.cpus_per_worker == 1.0, "a run that is compared has no more cores"
    for stage in stage_configs(short) or [short]:
        found = stage.training
        assert (found.max_steps, found.epochs) == (PILOT_STEPS, None)
        assert (found.warmup, found.eval_every, found.samples) == (0.0, 1.0, 0)
        assert len(steps_of_run(stage, 3)) == PILOT_STEPS, "few pairs are read again"


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"methods": []}, "compare.methods"),
        ({"methods": ["orpq"]}, "no method 'orpq'; did you mean orpo?"),
        ({"methods": ["orpo", "orpo"]}, "orpo stands twice"),
        ({"methods": ["sft>"]}, "no method ''"),
        ({"budget": {}}, "name one of pairs, tokens and seconds"),
        ({"budget": {"pairs": 3, "tokens": 4}}, "name one of pairs, tokens and seconds"),
        ({"budget": {"pairs": 0}}, "compare.budget.pairs"),
        ({"seeds": 0}, "compare.seeds"),
        ({"settings": {"a b": {}}}, "a b must be letters"),
        ({"settings": {"tune": {}}}, "tune is a name of a comparison's own files"),
        ({"settings": {"references": {}}}, "references is a name of a comparison's own files"),
        ({"settings": {"pairs-250": {}}}, "pairs-250 is a name of a comparison's own files"),
        ({"settings": {"comparison.json": {}}}, "comparison.json is a name of a comparison's own"),
        (
            {"methods": ["sft>dpo", "sft-dpo"], "settings": {"sft-dpo": {}}},
            "sft>dpo and sft-dpo have the same folder",
        ),
        ({"settings": {"dpo": {"objective": 3}}}, "settings.dpo.objective: must be a section"),
        ({"settings": {"dpo": {"objective": None}}}, "settings.dpo.objective: must be a section"),
        ({"settings": {"dpo": {"name": "x"}}}, "settings.dpo.name: no section that a method may"),
        ({"settings": {"dpo": {"data": {"max_length": 9}}}}, "settings.dpo.data: no section"),
        ({"settings": {"dpo": {"trainings": {}}}}, "did you mean training?"),
        (
            {"settings": {"dpo": {"training": {"epochs": 2}}}},
            "settings.dpo.training.epochs: compare.budget gives the steps",
        ),
        (
            {"settings": {"dpo": {"model": {"base": "owner/other"}}}},
            "settings.dpo.model.base: all methods train the same base",
        ),
        ({"method": ["orpo"]}, "compare.method"),
    ],
)
def test_a_mistake_is_named(section: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        config(compare=section)
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_settings_that_make_no_run_name_the_method() -> None:
    own = config(compare={"methods": ["x"], "settings": {"x": {"objective": {"kindd": "dpo"}}}})
    with pytest.raises(ConfigError, match=r"compare\.methods: x"):
        contender(own, "x")


# --- the steps of a budget --------------------------------------------------------------------

METHODS = ["sft", "orpo", "dpo", "ipo", "simpo", "cpo", "kto", "sft>dpo", "sft>orpo>ipo"]


def lengths(pairs: int) -> np.ndarray:
    return np.random.default_rng(pairs).integers(5, 200, (pairs, 3)).astype(np.int64)


def cost(run: RunConfig, unit: str, table: np.ndarray) -> float:
    """What the steps of a run cost, counted pair by pair."""
    total = 0.0
    for stage in stage_configs(run) or [run]:
        sides = 3 if stage.objective.needs_rejected else 2
        each = table[:, :sides].sum(axis=1) if unit == "tokens" else np.ones(len(table))
        unwarmed = stage.model_copy(
            update={"training": stage.training.model_copy(update={"warmup": 0.0})}
        )
        total += sum(float(each[pairs].sum()) for pairs in steps_of_run(unwarmed, len(table)))
        if stage.objective.needs_reference:
            total += FORWARD * float(each.sum())
    return total


@given(
    method=st.sampled_from(METHODS),
    unit=st.sampled_from(["pairs", "tokens"]),
    pairs=st.integers(20, 300),
    epochs=st.floats(1.0, 6.0),
    size=st.sampled_from([1, 4, 16, 64]),
)
def test_every_method_uses_the_budget_to_2_percent_or_is_refused(
    method: str, unit: str, pairs: int, epochs: float, size: int
) -> None:
    table = lengths(pairs)
    whole = int(epochs * (pairs if unit == "pairs" else table.sum()))
    run = contender(config(training={"pairs_per_step": size}), method)
    try:
        found = share(run, BudgetConfig(**{unit: whole}), table)
    except ConfigError as error:
        assert "compare.budget" in str(error)
        return
    assert all(steps >= 1 for steps in found.steps)
    assert found.used == pytest.approx(whole, rel=0.02)
    assert cost(with_steps(run, list(found.steps)), unit, table) == pytest.approx(found.used)


def test_the_reference_is_paid_first_and_stages_share_the_rest() -> None:
    """900 pairs: 300 for the reference of 900 thirds, and 300 for each stage."""
    run = contender(config(training={"pairs_per_step": 10}), "sft>dpo")
    found = share(run, BudgetConfig(pairs=900), lengths(900))
    assert found == Share(steps=(30, 30), used=900, reference=300)


def test_a_budget_that_the_reference_exceeds_is_refused() -> None:
    run = contender(config(), "dpo")
    with pytest.raises(ConfigError, match="the reference alone reads 300 pairs, and there are 200"):
        share(run, BudgetConfig(pairs=200), lengths(900))


def test_few_large_steps_are_refused() -> None:
    run = contender(config(training={"pairs_per_step": 64}), "orpo")
    with pytest.raises(ConfigError, match=r"lower training\.pairs_per_step"):
        share(run, BudgetConfig(pairs=100), lengths(900))


def test_a_budget_in_seconds_goes_by_the_speed_of_each_stage() -> None:
    run = contender(config(training={"pairs_per_step": 10}), "sft>orpo")
    assert share(run, BudgetConfig(seconds=60.0), lengths(900), [100.0, 20.0]).steps == (300, 60)


def test_without_a_budget_it_is_one_epoch() -> None:
    assert budget_of(config(), 123).pairs == 123
    own = config(compare={"budget": {"tokens": 9}})
    assert (budget_of(own, 123).unit, budget_of(own, 123).amount) == ("tokens", 9.0)


def test_the_usual_methods_are_one_stage_against_two() -> None:
    assert CompareConfig().methods == ("orpo", "sft>dpo")
