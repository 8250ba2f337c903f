"""What a search decides, without Ray.

What to vary, what to try next, which trials to give up, which is best, and what is kept.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import run_config
from support import settings as settings_tree

from orpo_ray.config import RunConfig, SearchConfig, build, dump, stage_configs
from orpo_ray.config.searched import trial_count, with_values
from orpo_ray.config.space import Domain, Options, Span, written
from orpo_ray.config.suited import suited_rates
from orpo_ray.errors import ConfigError
from orpo_ray.runs.console import SILENT
from orpo_ray.runs.scores import Change, Mean
from orpo_ray.runs.search import Found, Search, Trial
from orpo_ray.runs.search_run import SearchRun, find_search
from orpo_ray.search.course import Course, take_up
from orpo_ray.search.forecast import final_scores
from orpo_ray.search.outcome import Compared, best_trial, pareto_front, reading
from orpo_ray.search.rungs import Rungs
from orpo_ray.search.score import score
from orpo_ray.search.space import Space, resolve, trial_config, with_ranges
from orpo_ray.search.study import Study, spread_values

LAMBDA, RATE = "objective.lambda", "training.learning_rate"
DOMAINS: dict[str, Domain] = {LAMBDA: Span(0.1, 2.0, log=True), RATE: Span(1e-5, 1e-3, log=True)}
PAIRS = 512


def evaluation(accuracy: float, margin: float = 0.1, nll: float = 1.0) -> dict[str, float]:
    return {"eval/accuracy": accuracy, "eval/margin": margin, "eval/nll": nll}


def finished(number: int, *numbers: float, total: int = 10) -> Trial:
    trial = Trial(number=number, run=f"x/trials/{number:03d}", values={LAMBDA: 0.1 * (number + 1)})
    trial.note(total, total, evaluation(*numbers))
    trial.state = "finished"
    return trial


# --- ranking --------------------------------------------------------------------------------------


def test_the_margin_decides_among_equal_accuracies_and_among_no_others() -> None:
    near = [
        evaluation(k / PAIRS, margin)
        for k in (400, 401)
        for margin in (-50.0, -0.1, 0.0, 0.1, 50.0)
    ]
    scores = [score("eval/accuracy", each, PAIRS) for each in near]
    assert scores == sorted(scores) and len(set(scores)) == len(scores)


def test_the_score_of_other_metrics_is_the_metric_and_higher_is_better() -> None:
    assert score("eval/margin", evaluation(0.5, 0.3), PAIRS) == 0.3
    assert score("eval/nll", evaluation(0.5, 0.3, 2.0), PAIRS) == -2.0


def test_a_number_that_is_not_finite_is_worse_than_all_others() -> None:
    assert score("eval/accuracy", {"eval/accuracy": 1.0, "eval/margin": None}, PAIRS) == -math.inf


def test_the_pareto_front_holds_trials_that_no_other_beats_in_both() -> None:
    trials = [
        finished(0, 0.9, 0.1, 2.0),
        finished(1, 0.8, 0.1, 1.0),
        finished(2, 0.8, 0.1, 1.5),  # as accurate as trial 1, with a higher NLL
        finished(3, 0.95, 0.1, 3.0),
        finished(4, 0.7, 0.1, 1.2),  # trial 1 is better in both
        finished(5, 0.9, 0.2, 2.0),  # like trial 0, with a larger margin
    ]
    trials[3].state = "stopped"
    assert [trial.number for trial in pareto_front(trials)] == [5, 1]


def test_a_trial_whose_last_numbers_are_not_finite_is_never_best() -> None:
    broken = finished(0, 1.0)
    broken.evaluations[-1]["eval/margin"] = None  # type: ignore[assignment]
    search = Search(
        name="x",
        settings={"metric": "eval/accuracy"},
        trial_count=2,
        pairs=PAIRS,
        trials=[broken, finished(1, 0.5)],
    )
    assert best_trial(search) is search.trials[1]
    assert pareto_front(search.trials) == [search.trials[1]]


def test_only_a_finished_trial_can_be_best() -> None:
    search = Search(name="x", settings={"metric": "eval/accuracy"}, trial_count=3, pairs=PAIRS)
    search.trials = [finished(0, 0.9), finished(1, 0.8), finished(2, 0.99)]
    search.trials[2].state = "stopped"
    assert best_trial(search) is search.trials[0]
    search.trials[0].state = "failed"
    search.trials[1].state = "running"
    assert best_trial(search) is None


def test_the_reading_names_the_best_trial_and_its_cost_in_steps_and_likelihood() -> None:
    search = Search(name="x", settings={"metric": "eval/accuracy"}, trial_count=4, pairs=PAIRS)
    search.trials = [
        finished(0, 0.9, 0.5, 2.0),
        finished(1, 0.75, 0.2, 1.0),
        Trial(number=2, run="", values={}),
        Trial(number=3, run="", values={}),
    ]
    search.trials[2].state, search.trials[2].steps = "stopped", 2
    search.trials[3].state = "failed"
    first, second, third = reading(search)
    assert first.startswith(
        "Trial 0 is best, with objective.lambda=0.1. It prefers the chosen answer for 90.0% of 512"
    )
    assert second == (
        "4 trials: 2 finished, 1 given up early, 1 failed. They took 22 steps; "
        "training every trial to its end would take 40."
    )
    assert third.startswith(
        "Trial 1 keeps the chosen answers likelier (NLL 1.00 compared with 2.00 a token) at "
        "accuracy 75.0%."
    )


def searched(best: Trial, given: Trial, space: dict[str, Any] | None = None) -> Search:
    settings = {"metric": "eval/accuracy", "try_given": True, "space": space or {}}
    return Search(name="x", settings=settings, trial_count=2, pairs=PAIRS, trials=[given, best])


@pytest.mark.parametrize(
    ("low", "high", "says"),
    [
        (
            0.01,
            0.09,
            "(95 % interval +0.010 to +0.090), more than the noise of 512 held-out pairs.",
        ),
        (
            -0.01,
            0.09,
            "within the noise. 512 held-out pairs show no difference of accuracy below 0.012",
        ),
    ],
)
def test_the_reading_compares_the_best_trial_with_the_given_configuration(
    low: float, high: float, says: str
) -> None:
    search = searched(finished(1, 0.75, 0.2, 1.0), finished(0, 0.7, 0.2, 1.0))
    compared = Compared(
        "eval/accuracy",
        Change(Mean(0.7, 0.6, 0.8), Mean(0.75, 0.7, 0.8), Mean(0.05, low, high)),
        10,
    )
    line = reading(search, compared)[-1]
    assert line.startswith(
        "At step 10 the best trial has accuracy 0.750, and the given configuration (trial 0) has "
        "0.700. The difference is +0.050 (95 % interval "
    )
    assert says in line


def test_the_reading_says_that_no_trial_is_better_than_the_given_configuration() -> None:
    search = searched(finished(1, 0.7, 0.2, 1.0), finished(0, 0.75, 0.2, 1.0))
    assert reading(search)[-1].startswith(
        "No trial is better than the given configuration (trial 0)"
    )


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (
            0.1,
            "objective.lambda=0.1 is at the lower end of its range, 0.1 to 10. A better value may ",
        ),
        (
            9.5,
            "objective.lambda=9.5 is at the upper end of its range, 0.1 to 10. A better value may ",
        ),
        (1.0, None),
        (0.2, None),
    ],
)
def test_a_best_value_at_the_end_of_its_range_is_shown_with_the_next_range(
    value: float, says: str | None
) -> None:
    best = finished(1, 0.75, 0.2, 1.0)
    best.values = {LAMBDA: value}
    space = {LAMBDA: {"loguniform": [0.1, 10]}}
    lines = [
        line for line in reading(searched(best, finished(0, 0.7, 0.1), space)) if " end of " in line
    ]
    if says is None:
        assert lines == []
        return
    assert lines[0].startswith(says)
    low, high = 0.1 * value, 10 * value
    assert f"Search {float(f'{low:.2g}'):g} to {float(f'{high:.2g}'):g} next." in lines[0]


# --- what to vary ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("objective", "fields"),
    [
        ({"kind": "orpo"}, [LAMBDA, RATE]),
        ({"kind": "orpo", "nll_weight": 0}, ["objective.beta", RATE]),
        ({"kind": "dpo"}, ["objective.beta", RATE]),
        ({"kind": "dpo", "loss": "sigmoid-norm"}, ["objective.beta", RATE]),
        ({"kind": "ipo"}, ["objective.beta", RATE]),
        ({"kind": "simpo"}, ["objective.beta", "objective.gamma_beta_ratio", RATE]),
        ({"kind": "cpo"}, ["objective.beta", RATE]),
        ({"kind": "sft"}, [RATE]),
    ],
)
def test_each_objective_has_ranges_of_its_own(
    tmp_path: Path, objective: dict[str, Any], fields: list[str]
) -> None:
    said: list[str] = []
    config = with_ranges(run_config(tmp_path, objective=objective), said.append)
    space = resolve(config)
    assert list(space.domains) == fields
    assert all(name in said[0] for name in fields)
    assert config.search is not None and config.search.domains == space.domains


def test_a_loss_per_token_is_searched_at_higher_betas(tmp_path: Path) -> None:
    def betas(**objective: Any) -> Domain:
        said: list[str] = []
        found = with_ranges(run_config(tmp_path, objective=objective), said.append)
        assert not any("objective.beta" in line for line in said[1:]), "it holds the usual beta"
        return resolve(found).domains["objective.beta"]

    assert betas(kind="dpo", loss="nca") == betas(kind="dpo") == Span(0.01, 0.1, log=True)
    assert betas(kind="dpo", loss="sigmoid-norm") == Span(2.0, 10.0, log=True)
    assert betas(kind="orpo", nll_weight=0) == Span(0.1, 10.0, log=True)


def test_a_likelihood_term_is_searched_at_higher_rates(tmp_path: Path) -> None:
    def highest(**objective: Any) -> float:
        config = run_config(tmp_path, objective=objective, search={"try_given": False})
        found = resolve(with_ranges(config, print)).domains[RATE]
        assert isinstance(found, Span)
        return found.high

    assert highest(kind="dpo", nll_weight=1.0) == highest(kind="orpo") > highest(kind="dpo")
    assert highest(kind="cpo", alpha=0.0) == highest(kind="dpo")
    assert highest(kind="orpo", nll_weight=0) == highest(kind="dpo")


def test_full_training_is_searched_at_far_lower_rates(tmp_path: Path) -> None:
    def rates(**sections: Any) -> Span:
        config = run_config(tmp_path, **sections, search={"try_given": False})
        found = resolve(with_ranges(config, print)).domains[RATE]
        assert isinstance(found, Span)
        return found

    for kind in ("orpo", "dpo"):
        lora = rates(objective={"kind": kind})
        full = rates(
            objective={"kind": kind}, adapter={"kind": "none"}, model={"quantization": "none"}
        )
        assert 40 <= math.sqrt(lora.low * lora.high / (full.low * full.high)) <= 100


def test_default_ranges_are_widened_to_hold_what_is_given(tmp_path: Path) -> None:
    def ranges(**sections: Any) -> tuple[dict[str, Domain], list[str]]:
        said: list[str] = []
        config = with_ranges(run_config(tmp_path, **sections), said.append)
        return resolve(config).domains, said[1:]

    assert ranges()[1] == [], "what the ranges hold widens nothing"
    domains, said = ranges(objective={"lambda": 5.0}, training={"learning_rate": 1e-5})
    assert domains == {LAMBDA: Span(0.1, 5.0, log=True), RATE: Span(1e-5, 2e-3, log=True)}
    assert said == [
        "search.space: the range of objective.lambda, 0.1 to 2, is widened to hold the given 5",
        "search.space: the range of training.learning_rate, 0.0001 to 0.002, is widened to hold "
        "the given 1e-05",
    ]
    domains, said = ranges(objective={"lambda": 0.0})
    assert domains[LAMBDA] == Span(0.1, 2.0, log=True)
    assert said == ["search.space: objective.lambda 0 has no logarithm: only trial 0 tries it"]
    chosen = {"space": {LAMBDA: {"loguniform": [0.1, 0.2]}}}
    assert ranges(objective={"lambda": 5.0}, search=chosen)[0] == {LAMBDA: Span(0.1, 0.2, log=True)}


def test_rates_fall_with_the_size_of_the_base() -> None:
    small, large = (suited_rates("lora", True, count).range for count in (10**8, 10**9))
    assert small == {"loguniform": [1e-4, 2e-3]} and large == {"loguniform": [2e-5, 4e-4]}


@pytest.mark.parametrize(
    ("space", "says"),
    [
        (
            {"adapter.dropout": {"uniform": [0.0, 1.5]}},
            "adapter.dropout: must be less than 1, not 1.5",
        ),
        ({"adapter.r": {"uniform": [4, 16]}}, "adapter.r: must be a valid integer"),
        (
            {"training.schedule": {"choice": ["cosine", "cosin"]}},
            "training.schedule: must be 'cosine', 'linear'",
        ),
        (
            {"objective.alpha": {"uniform": [0.1, 0.2]}},
            "search.space: objective.alpha: unknown key; here it is objective.lambda; the authors'",
        ),
    ],
)
def test_a_range_with_invalid_values_is_refused_before_anything_is_trained(
    tmp_path: Path, space: dict[str, Any], says: str
) -> None:
    config = run_config(tmp_path, search={"space": space})
    with pytest.raises(ConfigError, match=r"search\.space: ") as caught:
        resolve(config)
    assert says in str(caught.value)


def test_a_trial_is_the_run_with_its_values_under_a_name_of_its_own(tmp_path: Path) -> None:
    config = run_config(tmp_path, search={"space": {LAMBDA: {"choice": [0.1, 0.7]}}})
    space = resolve(config)
    tried = trial_config(config, space, {LAMBDA: 0.7}, "run/search/trials/003")
    assert tried.objective.lambda_ == 0.7  # type: ignore[union-attr]
    assert tried.run_dir == tmp_path / "run" / "search" / "trials" / "003"
    assert tried.storage_dir == config.storage_dir
    assert tried.training == config.training and tried.search is None


def test_a_whole_section_may_be_chosen(tmp_path: Path) -> None:
    objectives = [{"kind": "orpo", "lambda": 0.5}, {"kind": "dpo", "beta": 0.2}]
    config = run_config(tmp_path, search={"space": {"objective": {"choice": objectives}}})
    space = resolve(config)
    assert trial_config(config, space, {"objective": objectives[1]}, "x").objective.kind == "dpo"


@pytest.mark.parametrize(
    ("stages", "field"),
    [
        ([], "adapter"),
        ([{"training": {"warmup": 0.0}}, {"adapter": {"dropout": 0.3}}], "stages.1.adapter"),
    ],
)
def test_a_chosen_section_changes_only_the_fields_that_it_names(
    tmp_path: Path, stages: list[dict[str, Any]], field: str
) -> None:
    tree = dump(run_config(tmp_path)) | {"stages": stages}
    tree["search"] = {"space": {field: {"choice": [{"dropout": 0.1}, {"dropout": 0.2}]}}}
    config = build(RunConfig, tree, {(): "tests"})
    before = stage_configs(config)[1] if stages else config
    tried = trial_config(config, resolve(config), {field: {"dropout": 0.2}}, "x")
    assert tried.adapter == before.adapter.model_copy(update={"dropout": 0.2})


# --- what to try next, and which trials to give up ------------------------------------------------


def study(
    settings: SearchConfig,
    trials: list[Trial] | None = None,
    domains: dict[str, Domain] = DOMAINS,
    seed: int = 7,
    **sections: Any,
) -> Study:
    """A study that does not try the given configuration, unless `settings` say so."""
    tree = settings.model_dump(exclude_unset=True)
    search = {
        "try_given": False,
        "space": {name: written(d) for name, d in domains.items()},
        **tree,
    }
    config = run_config(Path("nowhere"), search=search, **sections)
    config = with_seed(config, seed)
    return Study(config, domains, PAIRS, trials or [])


def test_only_a_folder_with_a_search_is_suggested(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "plain").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"^plain: .*; name the folder of a run"):
        find_search("plain")
    (tmp_path / "runs" / "searched" / "search").mkdir(parents=True)
    (tmp_path / "runs" / "searched" / "search" / "search.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"^searched: .*; did you mean runs/searched\?$"):
        find_search("searched")


def with_seed(config: RunConfig, seed: int) -> RunConfig:
    return config.model_copy(update={"training": config.training.model_copy(update={"seed": seed})})


def quality(values: dict[str, Any]) -> float:
    """A made-up accuracy with its peak inside the ranges."""
    distance = math.log(values[LAMBDA] / 0.6) ** 2 + math.log(values[RATE] / 2e-4) ** 2 / 4
    return round(PAIRS * math.exp(-distance)) / PAIRS


def play(
    settings: SearchConfig,
    until: int,
    trials: list[Trial] | None = None,
    domains: dict[str, Domain] = DOMAINS,
    seed: int = 7,
    judged_by: Callable[[dict[str, Any]], float] = quality,
) -> list[Trial]:
    """Run trials one after the other, each evaluated at every tenth of its run.

    Those of `trials` are on record already.
    """
    trials = list(trials or [])
    asked = study(settings, trials, domains, seed=seed)
    for number in range(len(trials), until):
        trial = Trial(number=number, run="", values=asked.draw(trials))
        trials.append(trial)
        for step in range(1, 11):
            trial.note(10 * step, 100, evaluation(judged_by(trial.values) * (0.5 + step / 20)))
            if asked.judge(trial):
                trial.state = "stopped"
                break
        else:
            trial.state = "finished"
    return trials


def drawn_by(asked: Study, count: int) -> list[Trial]:
    """The first `count` trials of a study, all running."""
    trials: list[Trial] = []
    for number in range(count):
        trials.append(Trial(number=number, run="", values=asked.draw(trials)))
    return trials


@pytest.mark.parametrize("searcher", ["random", "gp"])
def test_a_resumed_search_continues_like_an_unbroken_one(searcher: str) -> None:
    settings = SearchConfig(searcher=searcher, trials=20)
    domains = {
        **DOMAINS,
        "adapter.alpha": Span(1, 100, log=True, step=5),
        "adapter.r": Span(8, 64, step=8),
    }
    unbroken = play(settings, 20, domains=domains)
    kept = json.loads(json.dumps([vars(trial) for trial in unbroken[:13]]))
    assert play(settings, 20, [Trial(**trial) for trial in kept], domains) == unbroken


def test_fields_are_searched_in_one_order_however_they_are_written(tmp_path: Path) -> None:
    grids = {LAMBDA: {"grid": [0.1, 0.5]}, RATE: {"grid": [1e-5, 1e-4]}}
    orders = [grids, dict(reversed(grids.items()))]
    spaces = [
        resolve(run_config(tmp_path, search={"searcher": "grid", "space": space}))
        for space in orders
    ]
    assert list(spaces[0].domains) == list(spaces[1].domains)


def test_draws_lie_in_their_ranges_and_differ() -> None:
    trials = play(SearchConfig(trials=20), 20)
    assert all(0.1 <= t.values[LAMBDA] <= 2.0 and 1e-5 <= t.values[RATE] <= 1e-3 for t in trials)
    assert len({tuple(t.values.values()) for t in trials}) == 20


def test_later_draws_come_nearer_to_the_peak_than_spread_ones() -> None:
    """Of twelve trials, the best by the Gaussian process is the better one for most seeds."""
    best = {
        searcher: [
            max(quality(trial.values) for trial in play(settings, 12, seed=seed))
            for seed in range(5)
        ]
        for searcher in ("gp", "random")
        for settings in [SearchConfig(searcher=searcher, trials=12)]
    }
    assert min(best["gp"]) > 0.95
    assert sum(gp > random for gp, random in zip(*best.values(), strict=True)) >= 4


def test_no_trial_is_repeated_while_untried_points_are_left() -> None:
    domains: dict[str, Domain] = {
        "adapter.r": Options((4, 8, 16, 32)),
        "adapter.alpha": Options((8, 16, 32, 64)),
    }
    for searcher in ("random", "gp"):
        trials: list[Trial] = []
        asked = study(SearchConfig(searcher=searcher, trials=16), domains=domains)
        for number in range(16):
            trials.append(Trial(number=number, run="", values=asked.draw(trials)))
            trials[-1].note(10, 10, evaluation(0.5 + number / 100))
            trials[-1].state = "finished"
        assert len({tuple(trial.values.values()) for trial in trials}) == 16


def test_a_best_point_in_the_corner_is_found_and_tried_once() -> None:
    def towards_the_corner(values: dict[str, Any]) -> float:
        return quality({LAMBDA: 0.6 * values[LAMBDA] / 2, RATE: 0.2 * values[RATE]})

    trials = play(SearchConfig(trials=16), 16, judged_by=towards_the_corner)
    corner = {LAMBDA: pytest.approx(2.0), RATE: pytest.approx(1e-3)}
    assert [trial.values for trial in trials].count(corner) == 1


def test_trials_that_run_at_once_are_given_different_values() -> None:
    trials = play(SearchConfig(trials=12), 6)
    asked = study(SearchConfig(trials=12), trials)
    alone = asked.draw(trials)
    trials.append(Trial(number=6, run="", values=asked.draw(trials[:6])))
    known = asked._known(trials)
    assert [trial.state.name for trial in known].count("RUNNING") == 1
    assert alone == trials[6].values != asked.draw(trials)


@pytest.mark.parametrize("accuracy", [0.7, None])
def test_trials_of_one_score_or_without_a_finite_one_lead_to_further_draws(
    accuracy: float | None,
) -> None:
    trials = drawn_by(study(SearchConfig(trials=9)), 8)
    for trial in trials:
        trial.note(10, 10, evaluation(accuracy))  # type: ignore[arg-type]
        trial.state = "finished"
    values = study(SearchConfig(trials=9), trials).draw(trials)
    assert all(domain.holds(values[name]) for name, domain in DOMAINS.items())  # type: ignore[union-attr]


def test_the_final_score_of_a_trial_that_was_given_up_is_estimated() -> None:
    ended = [[(0.2, 0.5), (0.6, 0.6), (1.0, 0.7)], [(0.2, 0.8), (0.6, 0.9), (1.0, 0.9)]]
    half = [[(0.2, 0.9), (0.6, 0.75)]]  # ahead at first, then halfway between the other two
    early = [[(0.2, 0.65)], [(0.2, 0.4)], [(0.2, 0.95)]]
    finals = final_scores([*early, *ended, *half])
    assert finals[3:] == pytest.approx([0.7, 0.9, 0.8])
    assert finals[:3] == pytest.approx([0.75, 0.6, 0.9])


def test_a_trial_that_broke_later_estimates_no_other() -> None:
    broke = [(0.2, 0.9), (0.6, 0.9), (1.0, -math.inf)]
    whole = [(0.2, 0.5), (0.6, 0.6), (1.0, 0.7)]
    assert final_scores([[(0.2, 0.6)], [(0.2, -math.inf)], broke]) == [0.6, -math.inf, -math.inf]
    assert final_scores([[(0.2, 0.6)], broke, whole])[0] == pytest.approx(0.7)


def test_a_given_value_between_two_steps_teaches_nothing() -> None:
    domains: dict[str, Domain] = {**DOMAINS, "adapter.r": Span(8, 64, step=8)}
    settings = SearchConfig(trials=8, try_given=True)
    asked = study(settings, domains=domains, adapter={"r": 20})
    trials = drawn_by(asked, 7)
    assert trials[0].values["adapter.r"] == 20
    for trial in trials:
        trial.note(10, 10, evaluation(0.5 + trial.number / 100))
        trial.state = "finished"
    assert asked.draw(trials)["adapter.r"] in range(8, 65, 8)


def test_a_score_is_its_own_estimate_if_no_trial_got_further() -> None:
    assert final_scores([[(0.2, 0.5)], [(0.2, -math.inf)]]) == [0.5, -math.inf]
    assert final_scores([]) == []


def test_drawn_values_keep_to_the_steps_and_choices_of_the_config() -> None:
    domains: dict[str, Domain] = {
        "adapter.r": Span(8, 64, step=8),
        "adapter.alpha": Span(1, 100, log=True, step=0.5),
        "adapter.targets": Options(("all-linear", ["q_proj", "v_proj"])),
    }
    for searcher in ("random", "gp"):
        asked = study(SearchConfig(searcher=searcher, trials=9), domains=domains)
        trials: list[Trial] = []
        for number in range(9):
            values = asked.draw(trials)
            trials.append(Trial(number=number, run="", values=values))
            trials[-1].note(10, 10, evaluation(0.5 + (number * 7 % 9) / 20))
            trials[-1].state = "finished"
            assert values["adapter.r"] in range(8, 65, 8) and isinstance(values["adapter.r"], int)
            assert (values["adapter.alpha"] - 1) % 0.5 == 0
            assert values["adapter.targets"] in ("all-linear", ["q_proj", "v_proj"])


def test_a_grid_tries_every_point_once() -> None:
    settings = SearchConfig(
        searcher="grid", space={LAMBDA: {"grid": [0.1, 0.5]}, RATE: {"grid": [1e-5, 1e-4, 1e-3]}}
    )
    asked = study(settings, domains=settings.domains)
    points = [trial.values for trial in drawn_by(asked, 6)]
    assert points == [
        {LAMBDA: weight, RATE: rate} for weight in (0.1, 0.5) for rate in (1e-5, 1e-4, 1e-3)
    ]


# --- the given configuration, and draws that are spread -------------------------------------------


def test_trial_0_is_the_given_configuration() -> None:
    asked = study(SearchConfig(trials=3, try_given=True), objective={"lambda": 0.3})
    given, *drawn = (trial.values for trial in drawn_by(asked, 3))
    without = study(SearchConfig(trials=3), objective={"lambda": 0.3})
    assert given == {LAMBDA: 0.3, RATE: 1e-3}
    assert drawn == [trial.values for trial in drawn_by(without, 2)]


def test_the_given_configuration_may_lie_outside_of_the_ranges() -> None:
    """It is judged like all others, but the draws do not learn from it."""
    settings = SearchConfig(trials=20, try_given=True)
    asked = study(settings, objective={"lambda": 0.0})
    first, other = drawn_by(asked, 2)
    assert first.values[LAMBDA] == 0.0
    first.note(20, 100, evaluation(0.9))
    assert not asked.judge(first)
    other.note(20, 100, evaluation(0.1))
    assert asked.judge(other), "it is behind the given one"
    first.note(100, 100, evaluation(0.9))
    asked.judge(first)
    first.state = "finished"
    again = study(settings, [first], objective={"lambda": 0.0})
    assert again.draw([first]) == other.values
    taught = play(settings, 12, [first])
    assert all(DOMAINS[LAMBDA].holds(trial.values[LAMBDA]) for trial in taught[1:])  # type: ignore[union-attr]


def test_a_grid_tries_the_given_point_first_and_once() -> None:
    space = {LAMBDA: {"grid": [0.1, 0.5]}, RATE: {"grid": [1e-4, 1e-3]}}
    settings = SearchConfig(searcher="grid", space=space, try_given=True)
    for given, count in ((0.5, 4), (0.7, 5)):
        asked = study(settings, domains=settings.domains, objective={"lambda": given})
        points = [trial.values for trial in drawn_by(asked, count)]
        assert points[0] == {LAMBDA: given, RATE: 1e-3}
        assert len({tuple(point.values()) for point in points}) == count
        config = run_config(Path("nowhere"), objective={"lambda": given}, search=dump(settings))
        assert trial_count(config) == count


def test_trial_0_gets_the_given_section_if_sections_are_chosen(tmp_path: Path) -> None:
    choices = [{"kind": "orpo", "lambda": 0.5}, {"kind": "dpo", "beta": 0.2}]
    search = {"space": {"objective": {"choice": choices}}}
    for given, first in ((choices[1], choices[1]), ({"kind": "cpo"}, None)):
        config = run_config(tmp_path, objective=given, search=search)
        drawn = Study(config, resolve(config).domains, PAIRS, []).draw([])["objective"]
        assert drawn == first or (first is None and drawn["kind"] == "cpo")
        assert (
            trial_config(config, resolve(config), {"objective": drawn}, "x").objective
            == config.objective
        )


def test_the_given_value_of_a_stage_is_the_stages_own(tmp_path: Path) -> None:
    stages = [{"objective": {"kind": "sft"}}, {"objective": {"kind": "dpo", "beta": 0.03}}]
    space = {"stages.1.objective.beta": {"loguniform": [0.01, 0.1]}}
    tree = settings_tree(tmp_path) | {"stages": stages, "search": {"space": space}}
    config = build(RunConfig, tree, {(): "tests"})
    drawn = Study(config, resolve(config).domains, PAIRS, []).draw([])
    assert drawn == {"stages.1.objective.beta": 0.03}


@pytest.mark.parametrize("count", [2, 3, 4, 5, 8, 13, 16])
def test_the_first_draws_are_spread_over_each_range(count: int) -> None:
    """Draws come from both halves of each range; 2, 4, 8 or 16 draws hit as many equal parts."""
    for seed in range(5):
        drawn = [spread_values(DOMAINS, seed, number) for number in range(count)]
        for field, domain in DOMAINS.items():
            assert isinstance(domain, Span)
            wide = math.log(domain.high / domain.low)
            shares = [math.log(values[field] / domain.low) / wide for values in drawn]
            assert {int(2 * share) for share in shares} == {0, 1}
            if count in (2, 4, 8, 16):
                assert len({int(count * share) for share in shares}) == count
    assert spread_values(DOMAINS, 0, 1) != spread_values(DOMAINS, 1, 1)


def test_asha_gives_up_at_the_rungs_only_and_never_the_first_nor_at_the_end() -> None:
    trials = play(SearchConfig(searcher="random", trials=30, grace=0.2, eta=3), 30)
    assert trials[0].state == "finished"
    assert {trial.steps for trial in trials if trial.state == "stopped"} == {20, 60}
    assert all(trial.steps == 100 for trial in trials if trial.state == "finished")
    steps = sum(trial.steps for trial in trials)
    assert steps < 0.55 * 30 * 100


def test_asha_lets_the_best_third_continue() -> None:
    asked = study(SearchConfig(trials=9, searcher="random", grace=0.2, eta=3))
    accuracies = [0.5, 0.6, 0.7, 0.4, 0.9, 0.3, 0.8, 0.2, 0.95]
    continued = []
    for number, accuracy in enumerate(accuracies):
        trial = Trial(number=number, run="", values={})
        trial.note(20, 100, evaluation(accuracy))
        if not asked.judge(trial):
            continued.append(accuracy)
    # Of fewer than six trials one continues, then two, and of nine three.
    assert continued == [0.5, 0.6, 0.7, 0.9, 0.8, 0.95]


def test_a_trial_that_continued_is_given_up_when_better_ones_have_come() -> None:
    asked = study(SearchConfig(trials=9, grace=0.2, eta=3))
    first = Trial(number=0, run="", values={})
    first.note(20, 100, evaluation(0.7))
    assert not asked.judge(first)
    for number, accuracy in enumerate((0.6, 0.8, 0.9), start=1):
        other = Trial(number=number, run="", values={})
        other.note(20, 100, evaluation(accuracy))
        assert asked.judge(other) == (accuracy < 0.7)
    first.note(40, 100, evaluation(0.99))
    assert asked.judge(first), "its score at the rung counts"


def test_the_given_configuration_is_never_given_up() -> None:
    asked = study(SearchConfig(trials=9, grace=0.2, eta=3, try_given=True))
    given = Trial(number=0, run="", values={})
    for number in range(1, 9):
        other = Trial(number=number, run="", values={})
        other.note(20, 100, evaluation(0.9))
        asked.judge(other)
    for step in (20, 60, 100):
        given.note(step, 100, evaluation(0.1))
        assert not asked.judge(given)


def test_one_in_nine_of_all_continues_after_the_second_rung() -> None:
    rungs = Rungs(grace=0.2, eta=3)
    for number in range(9):
        rungs.gives_up(number, 0.2, number / 10)
    assert [rungs.gives_up(number, 0.4, 1.0) for number in range(9)] == [True] * 6 + [False] * 3
    assert not rungs.gives_up(7, 0.6, 0.9)
    assert not rungs.gives_up(8, 0.6, 0.95)
    assert rungs.gives_up(7, 0.8, 1.0)
    for number in range(9, 18):
        rungs.gives_up(number, 0.2, 0.0)
    assert not rungs.gives_up(7, 0.8, 1.0), "two of eighteen continue"


def test_at_least_one_trial_finishes() -> None:
    rungs = Rungs(grace=0.2, eta=3)
    assert not rungs.gives_up(0, 0.2, 0.5)
    assert not rungs.gives_up(0, 0.6, 0.9)
    assert not rungs.gives_up(1, 0.2, 0.8), "better at the first rung"
    assert rungs.gives_up(1, 0.6, 0.7), "behind at the second"
    assert not rungs.gives_up(0, 0.8, 0.9), "the second rung counts, and the other one ended there"


def test_a_trial_is_never_given_up_at_the_end_of_its_run() -> None:
    rungs = Rungs(grace=0.2, eta=3)
    assert not rungs.gives_up(0, 0.2, 0.9)
    assert rungs.gives_up(1, 0.2, 0.8)
    asked = study(SearchConfig(trials=2))
    best, other = (Trial(number=number, run="", values={}) for number in range(2))
    best.note(10, 10, evaluation(0.9))
    other.note(10, 10, evaluation(0.1))
    assert not asked.judge(best) and not asked.judge(other)


@pytest.mark.parametrize(
    ("grace", "eta", "rungs"),
    [(0.2, 3, (20, 60)), (0.3, 3, (30, 90)), (0.5, 2, (50,)), (0.1, 4, (10, 40)), (1, 2, ())],
)
def test_rungs_lie_within_the_run(grace: float, eta: int, rungs: tuple[int, ...]) -> None:
    """A trial that falls behind is ended at the next rung, or at once if it is at a rung."""
    for behind_from in range(1, 101):
        asked = Rungs(grace, eta)
        for percent in range(1, 101):
            asked.gives_up(0, percent / 100, 0.5)
        scores = [(percent, 0.0 if percent >= behind_from else 1.0) for percent in range(1, 101)]
        ended = next(
            (percent for percent, value in scores if asked.gives_up(1, percent / 100, value)), None
        )
        assert ended == next((rung for rung in rungs if rung >= behind_from), None)


def test_trials_of_different_lengths_are_compared_at_the_same_share_of_their_runs() -> None:
    asked = study(SearchConfig(trials=3, grace=0.2))
    long, short = (Trial(number=number, run="", values={}) for number in range(2))
    long.note(20, 100, evaluation(0.9))
    assert not asked.judge(long)
    short.note(1, 10, evaluation(0.5))
    assert not asked.judge(short)
    short.note(2, 10, evaluation(0.5))
    assert asked.judge(short)


def test_without_a_scheduler_all_trials_finish() -> None:
    trials = play(SearchConfig(trials=10, scheduler="none"), 10)
    assert {trial.state for trial in trials} == {"finished"}


# --- the course of a search -----------------------------------------------------------------------


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    (tmp_path / "run").mkdir()
    space = {LAMBDA: {"loguniform": [0.1, 2.0]}, RATE: {"loguniform": [1e-5, 1e-3]}}
    return run_config(tmp_path, search={"space": space, "trials": 4})


@pytest.fixture
def begin(config: RunConfig) -> Callable[[], tuple[Course, Search]]:
    """Makes a course from the record in the search's folder, as a new process does."""

    def make() -> tuple[Course, Search]:
        assert config.search is not None
        run = SearchRun(config)
        search = run.search() or Search(
            name=config.name, settings=config.search.model_dump(), trial_count=4, pairs=PAIRS
        )
        made = Study(config, DOMAINS, PAIRS, search.trials)
        return Course(run, Space(DOMAINS), search, made, SILENT), search

    return make


def test_what_happened_is_on_record_at_once(
    config: RunConfig, begin: Callable[[], tuple[Course, Search]]
) -> None:
    course, search = begin()
    first = course.next()
    assert first is not None
    trial, tried = first
    assert tried.run_dir == config.run_dir / "trials" / "000"
    assert SearchRun(config).search() == search
    course.evaluated(trial, 10, 10, evaluation(0.9))
    assert SearchRun(config).search() == search
    course.finished(trial)
    found = SearchRun(config).search()
    assert found is not None and found.trials[0].state == "finished"


def test_an_interrupted_trial_is_resumed_first(
    begin: Callable[[], tuple[Course, Search]],
) -> None:
    course, _ = begin()
    tried = [course.next() for _ in range(3)]
    assert tried[1] is not None
    course.failed(tried[1][0], "no memory")
    again, search = begin()
    order = [found[0].number for found in iter(again.next, None)]
    assert order == [0, 2, 3]
    assert search.trials[1].error == "no memory"


def test_values_that_make_no_valid_run_are_a_failed_trial_and_the_next_one_follows(
    tmp_path: Path,
) -> None:
    (tmp_path / "run").mkdir()
    space = {
        "adapter.kind": {"choice": ["lora", "none"]},
        "model.quantization": {"choice": ["none", "nf4"]},
    }
    config = run_config(
        tmp_path, model={"quantization": "none"}, search={"space": space, "trials": 12}
    )
    assert config.search is not None
    search = Search(
        name=config.name, settings=config.search.model_dump(), trial_count=12, pairs=PAIRS
    )
    made = study(config.search, domains=config.search.domains)
    course = Course(SearchRun(config), resolve(config), search, made, SILENT)
    begun = [found[0].number for found in iter(course.next, None)]
    failed = [trial for trial in search.trials if trial.state == "failed"]
    assert failed and sorted(begun + [trial.number for trial in failed]) == list(range(12))
    assert all(
        trial.values == {"adapter.kind": "none", "model.quantization": "nf4"} for trial in failed
    )
    assert all(
        "adapter.kind=none trains the base's own weights" in str(trial.error) for trial in failed
    )


def test_a_trial_that_found_no_resources_is_tried_again_and_a_wrong_one_is_not(
    config: RunConfig, begin: Callable[[], tuple[Course, Search]]
) -> None:
    course, search = begin()
    tried = [course.next() for _ in range(2)]
    assert tried[0] is not None and tried[1] is not None
    course.failed(tried[0][0], "the cluster is busy", may_pass=True)
    course.failed(tried[1][0], "no such module")
    take_up(SearchRun(config), search)
    assert [(trial.state, trial.error) for trial in search.trials] == [
        ("running", None),
        ("failed", "no such module"),
    ]


def test_a_run_that_ended_while_no_process_listened_is_judged_by_its_files(
    config: RunConfig, begin: Callable[[], tuple[Course, Search]]
) -> None:
    course, _ = begin()
    tried = [course.next() for _ in range(2)]
    assert tried[0] is not None and tried[1] is not None
    (with_metrics, first), (without_metrics, _config) = tried[0], tried[1]
    course.evaluated(with_metrics, 5, 10, evaluation(0.5))
    first.run_dir.mkdir(parents=True)
    (first.run_dir / "metrics.jsonl").write_text(
        json.dumps({"step": 10, **evaluation(0.9)}) + "\n", encoding="utf-8"
    )
    course.finished(with_metrics)
    assert (with_metrics.state, with_metrics.last["eval/accuracy"]) == ("finished", 0.9)
    course.finished(without_metrics)
    assert without_metrics.state == "failed"
    assert "lacks the evaluation of its last step" in str(without_metrics.error)


def test_an_evaluation_that_is_reported_twice_is_recorded_once(
    begin: Callable[[], tuple[Course, Search]],
) -> None:
    course, _ = begin()
    first = course.next()
    assert first is not None
    trial, _config = first
    course.evaluated(trial, 0, 10, evaluation(0.5))
    course.evaluated(trial, 5, 10, evaluation(0.9))
    assert not course.evaluated(trial, 5, 10, evaluation(0.1))
    assert [each["step"] for each in trial.evaluations] == [0, 5]
    assert trial.last["eval/accuracy"] == 0.9


def test_evaluations_that_no_process_read_are_read_from_the_trial(tmp_path: Path) -> None:
    trial = Trial(number=0, run="run/trials/000", values={}, total_steps=10)
    trial.note(0, 10, evaluation(0.5))
    folder = tmp_path / trial.run
    folder.mkdir(parents=True)
    lines = [
        {"step": 0, **evaluation(0.5)},
        {"step": 1, "train/loss": 1.0},
        {"step": 5, **evaluation(0.8)},
    ]
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8"
    )
    take_up(
        SearchRun(run_config(tmp_path)),
        Search(name="run", settings={}, trial_count=1, pairs=PAIRS, trials=[trial]),
    )
    assert trial.evaluations == [{"step": 0, **evaluation(0.5)}, {"step": 5, **evaluation(0.8)}]


def test_a_finished_search_is_not_run_again_unless_it_is_to_have_more_trials(
    config: RunConfig,
) -> None:
    assert config.search is not None
    trials = [finished(number, 0.9) for number in range(4)]
    search = Search(
        name=config.name,
        settings=config.search.model_dump(),
        trial_count=4,
        pairs=PAIRS,
        status="finished",
        trials=trials,
    )
    SearchRun(config).keep(search)
    assert SearchRun(config).finished() is None, "it has no outcome yet"
    search.outcome = Found(
        best=0,
        values={},
        metrics={},
        adapter="",
        config="",
        pareto=[],
        answers=[],
        trial_steps=40,
        reading=[],
    )
    SearchRun(config).keep(search)
    assert SearchRun(config).finished() == search
    more = config.model_copy(update={"search": config.search.model_copy(update={"trials": 5})})
    assert SearchRun(more).finished() is None


@pytest.mark.parametrize(
    "trial",
    [
        {},
        {"number": 0, "run": "x", "values": {}, "state": "done"},
        {"number": 0, "run": "x", "values": None},
        {"number": 0, "run": "x", "values": {}, "evaluations": 3},
    ],
)
def test_a_damaged_record_is_refused_by_name(tmp_path: Path, trial: dict[str, Any]) -> None:
    content = {"name": "x", "settings": {}, "trial_count": 1, "pairs": 1, "trials": [trial]}
    run = SearchRun(run_config(tmp_path))
    run.folder.mkdir()
    run.path("search.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"search\.json: not as a search wrote it"):
        run.search()


def test_a_trial_of_another_objective_gets_its_own_usual_rate(tmp_path: Path) -> None:
    space = {"objective": {"choice": [{"kind": "orpo"}, {"kind": "dpo"}]}}
    tree = settings_tree(tmp_path) | {"search": {"space": space}}
    del tree["training"]["learning_rate"]
    config = RunConfig.model_validate(tree)
    trials = [with_values(config, {"objective": {"kind": kind}}) for kind in ("orpo", "dpo")]
    assert [trial.training.learning_rate for trial in trials] == [2e-4, 5e-5]
    named = with_values(config, {"objective": {"kind": "dpo"}, "training.learning_rate": 3e-4})
    assert named.training.learning_rate == 3e-4
