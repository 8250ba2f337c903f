"""The sections `search` and `stages`: what they accept, and the one line that refuses the rest."""

import re
from pathlib import Path
from typing import Any

import pytest

from orpo_ray.config import RunConfig, dump, load_config, stage_configs
from orpo_ray.config.searched import trial_count
from orpo_ray.config.space import Options, Span, parse_domain
from orpo_ray.errors import ConfigError

RUN = "name: tiny\nmodel: {base: some/model}\ndata: {train: [{source: pairs.jsonl}]}\n"
STAGES = (
    "stages:\n  - {objective: {kind: sft}}\n  - {objective: {kind: dpo, beta: 0.2}, training: "
    "{max_steps: 7}}\n"
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.yaml"


def load(path: Path, text: str, *overrides: str) -> RunConfig:
    path.write_text(text, encoding="utf-8")
    return load_config(path, overrides)


def complaint(path: Path, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(path, text, *overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix(f"{path.parent}/")


def search(inside: str) -> str:
    return f"{RUN}search: {{{inside}}}\n"


# --- ranges ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "domain"),
    [
        ({"uniform": [0, 0.5]}, Span(0, 0.5)),
        ({"loguniform": [1e-5, 1e-3]}, Span(1e-5, 1e-3, log=True)),
        ({"quniform": [8, 64, 8]}, Span(8, 64, step=8)),
        ({"qloguniform": [8, 64, 8]}, Span(8, 64, log=True, step=8)),
        ({"choice": [1, "a", {"kind": "sft"}]}, Options((1, "a", {"kind": "sft"}))),
        ({"grid": [0.1, 0.5]}, Options((0.1, 0.5), is_grid=True)),
    ],
)
def test_a_range_is_read_as_it_is_written(written: dict[str, Any], domain: Span | Options) -> None:
    assert parse_domain(written) == domain


@pytest.mark.parametrize(
    ("written", "says"),
    [
        (
            {"loguniform": [1.0, 0.1]},
            "loguniform: 1 to 0.1 is no range; write the smaller number first",
        ),
        (
            {"uniform": [0.1, 0.1]},
            "uniform: 0.1 to 0.1 is no range; write the smaller number first",
        ),
        (
            {"loguniform": [0, 1]},
            "loguniform: its low end is 0, which has no logarithm; start above 0, or use uniform",
        ),
        (
            {"qloguniform": [-1, 1, 0.5]},
            "qloguniform: its low end is -1, which has no logarithm; start above 0, or use uniform",
        ),
        (
            {"quniform": [0, 1, 0]},
            "quniform: the step must be above 0 and no larger than the range, not 0",
        ),
        ({"quniform": [0, 1]}, "quniform: write [low, high, step], finite numbers without quotes"),
        ({"uniform": ["0.1", 1]}, "uniform: write [low, high], finite numbers without quotes"),
        ({"uniform": [True, 2]}, "uniform: write [low, high], finite numbers without quotes"),
        (
            {"uniform": [0, float("inf")]},
            "uniform: write [low, high], finite numbers without quotes",
        ),
        ({"uniform": 3}, "uniform: write [low, high]"),
        ({"uniform": {"low": 1, "high": 2}}, "uniform: write [low, high]"),
        ({"choice": []}, "choice: it has no values; write some"),
        ({"choice": [1, 1]}, "choice: a value is in it twice; write each value once"),
        ({"loguniforn": [1, 2]}, "loguniforn: unknown; did you mean loguniform?"),
        (
            {"normal": [1, 2]},
            "normal: unknown; known: uniform, loguniform, quniform, qloguniform, choice, grid",
        ),
    ],
)
def test_a_range_that_is_none_is_refused(written: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(says)}$"):
        parse_domain(written)


def test_the_line_of_a_wrong_range_is_named(path: Path) -> None:
    text = RUN + "search:\n  trials: 4\n  space:\n    objective.lambda: {loguniform: [0, 1]}\n"
    says = "loguniform: its low end is 0, which has no logarithm; start above 0, or use uniform"
    assert complaint(path, text) == f"run.yaml:6: search.space: objective.lambda: {says}"


@pytest.mark.parametrize(
    ("span", "drawn", "value"),
    [
        (Span(8, 64, step=8), 30.1, 32),
        (Span(8, 64, log=True, step=8), 8.4, 8),
        (Span(0.1, 0.7, step=0.1), 0.3000001, 0.3),
        (Span(5, 13, step=4), 13, 13),
        (Span(5, 14, log=True, step=4), 14.0, 13),
        (Span(0.0, 1.0), 0.123456789, 0.123456789),
    ],
)
def test_a_drawn_number_becomes_a_multiple_of_its_step(
    span: Span, drawn: float, value: float
) -> None:
    assert span.settle(drawn) == value
    assert type(span.settle(drawn)) is type(value)


# --- fields, metrics, methods ---------------------------------------------------------------------


def test_fields_may_be_written_with_dots_or_nested(path: Path) -> None:
    dotted = load(path, search("space: {objective.lambda: {choice: [0.1]}}"))
    nested = load(path, search("space: {objective: {lambda: {choice: [0.1]}}}"))
    override = load(path, RUN, "search.space.objective.lambda={choice: [0.1]}")
    assert dotted.search is not None
    assert dotted.search == nested.search == override.search
    assert dotted.search.space == {"objective.lambda": {"choice": [0.1]}}


def test_a_range_given_on_the_command_line_replaces_that_of_the_file(path: Path) -> None:
    text = search("space: {objective.lambda: {choice: [0.1]}}")
    config = load(path, text, "search.space.objective.lambda={choice: [0.2]}")
    assert config.search is not None
    assert config.search.space == {"objective.lambda": {"choice": [0.2]}}


@pytest.mark.parametrize(
    ("field", "says"),
    [
        ("objective.lamda", "objective.lamda: unknown field; did you mean objective.lambda?"),
        ("lambda", "lambda: unknown field; did you mean objective.lambda?"),
        (
            "training.learningrate",
            "training.learningrate: unknown field; did you mean training.learning_rate?",
        ),
        (
            "scale.workers",
            "scale.workers is not searched: it decides who does the work, not what is trained",
        ),
        (
            "data.max_length",
            "data.max_length is not searched: the pairs are prepared once, for all trials",
        ),
        ("model.base", "model.base is not searched: the pairs are prepared once, for all trials"),
        (
            "training.seed",
            "training.seed is not searched: the best seed is luck, not a better setting",
        ),
        (
            "training",
            "training holds training.seed, which is not searched: the best seed is luck, not a "
            "better setting; name a field of training",
        ),
        ("stages.0.objective.beta", "stages.0.objective.beta: the run has no stages"),
    ],
)
def test_a_field_that_cannot_be_searched_is_refused(path: Path, field: str, says: str) -> None:
    text = search(f"space: {{{field}: {{choice: [1, 2]}}}}")
    assert complaint(path, text) == f"run.yaml:4: search.space: {says}"


@pytest.mark.parametrize(
    ("metric", "says"),
    [
        (
            "eval/acuracy",
            "eval/acuracy is not a metric of a search; did you mean eval/accuracy?",
        ),
        ("accuracy", "accuracy is not a metric of a search; did you mean eval/accuracy?"),
        (
            "eval/loss",
            "eval/loss is scaled by lambda or beta: the smallest weight would win; use "
            "eval/accuracy",
        ),
        (
            "train/loss",
            "train/loss is scaled by lambda or beta: the smallest weight would win; use "
            "eval/accuracy",
        ),
        (
            "eval/rewards/margins",
            "eval/rewards/margins is the margin times beta: the largest beta would win; "
            "use eval/accuracy or eval/margin",
        ),
    ],
)
def test_a_metric_that_means_something_else_for_every_trial_is_refused(
    path: Path, metric: str, says: str
) -> None:
    assert complaint(path, search(f"metric: {metric}")) == f"run.yaml:4: search.metric: {says}"


@pytest.mark.parametrize(
    ("inside", "says"),
    [
        ("trials: 0", "search.trials: must be greater than 0, not 0"),
        ("eta: 1", "search.eta: must be greater than or equal to 2, not 1"),
        ("grace: 0", "search.grace: must be greater than 0, not 0"),
        ("scheduler: asha2", "search.scheduler: must be 'asha' or 'none', not 'asha2'"),
        (
            "scheduler: pbt",
            "search.scheduler: pbt copies the checkpoint of a better trial into a worse one, and "
            "Ray Tune skips that without an error if a trial is a Ray Train run; use asha or none",
        ),
        (
            "searcher: grid",
            "search: searcher: grid tries every combination; give each field of space {grid: "
            "[values]}",
        ),
        (
            "searcher: grid, trials: 3, space: {objective.lambda: {grid: [0.1, 0.2]}}",
            "search: trials: the grid has 2 points, not 3; remove trials",
        ),
        (
            f"searcher: grid, space: {{objective.lambda: {{grid: {list(range(101))}}}, "
            f"adapter.dropout: {{grid: {[number / 200 for number in range(101)]}}}}}",
            "search: space: the grid has 10201 points; 10000 is the most",
        ),
        (
            "space: {objective.lambda: {loguniform: {low: 1, high: 2}}}",
            "search.space: objective.lambda: loguniform: write [low, high]",
        ),
        (
            "space: {objective: {lambda: 0.3}}",
            "search.space: objective.lambda: write one of uniform, loguniform, quniform, "
            "qloguniform, choice, grid, "
            "such as {loguniform: [0.05, 1.0]}",
        ),
        (
            "space: {objective: {lambda: {loguniforn: [1, 2]}}}",
            "search.space: objective.lambda: loguniforn: unknown; did you mean loguniform?",
        ),
        (
            "space: {objective.lambda: {grid: [0.1, 0.2]}}",
            "search: space: grid is for searcher: grid; gp draws from {choice: [values]}",
        ),
    ],
)
def test_settings_of_a_search_that_do_not_go_together_are_refused(
    path: Path, inside: str, says: str
) -> None:
    assert complaint(path, search(inside)).partition(": ")[2] == says


def test_the_grid_says_how_many_trials_there_are(path: Path) -> None:
    grid = "space: {objective.lambda: {grid: [0.2, 0.5]}, adapter.r: {grid: [4, 8, 16]}}"
    config = load(path, search(f"searcher: grid, {grid}"))
    assert trial_count(config) == 6
    assert trial_count(load(path, search(f"searcher: grid, {grid}"), "adapter.r=32")) == 7
    without = f"searcher: grid, try_given: false, {grid}"
    assert trial_count(load(path, search(without), "adapter.r=32")) == 6
    one = "space: {objective.lambda: {uniform: [0.1, 0.2]}}"
    assert trial_count(load(path, search(f"searcher: random, {one}"))) == 16


# --- stages ---------------------------------------------------------------------------------------


def test_a_stage_is_the_run_with_some_settings_replaced_and_starts_from_the_one_before(
    path: Path,
) -> None:
    config = load(path, RUN + STAGES, "training.learning_rate=1e-3", f"storage={path.parent}")
    sft, dpo = stage_configs(config)
    assert [sft.name, dpo.name] == ["tiny/1-sft", "tiny/2-dpo"]
    assert [sft.objective.kind, dpo.objective.kind] == ["sft", "dpo"]
    assert dump(dpo)["objective"]["beta"] == 0.2
    assert [sft.training.max_steps, dpo.training.max_steps] == [None, 7]
    assert sft.training.learning_rate == dpo.training.learning_rate == 1e-3
    assert sft.adapter.init_from is None
    assert dpo.adapter.init_from == str(sft.run_dir)
    assert dpo.run_dir == path.parent / "tiny" / "2-dpo"
    assert not sft.stages and dpo.search is None


def test_a_stage_without_a_learning_rate_gets_one_for_its_own_objective(path: Path) -> None:
    config = load(path, RUN + STAGES)
    assert config.training.learning_rate is None, "a run with stages trains nothing itself"
    sft, dpo = stage_configs(config)
    assert (sft.training.learning_rate, dpo.training.learning_rate) == (2e-4, 5e-5)
    assert stage_configs(RunConfig.model_validate(dump(config))) == [sft, dpo]


def test_a_stage_may_start_from_another_adapter(path: Path) -> None:
    config = load(path, RUN + STAGES, "stages.1.adapter={init_from: runs/other}")
    assert stage_configs(config)[1].adapter.init_from == "runs/other"


def test_full_training_hands_the_whole_model_on(path: Path) -> None:
    config = load(path, RUN + STAGES, "adapter.kind=none", "model.quantization=none")
    sft, dpo = stage_configs(config)
    assert dpo.model.base == str(sft.run_dir / "adapter")


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("stages.1.objective.bata=1", "objective.bata: unknown key; did you mean objective.beta?"),
        ("stages.1.training.max_steps=0", "training.max_steps: must be greater than 0, not 0"),
        ("stages.0.objective.lambda=1", "sft has no lambda; remove it"),
        ("stages.1.storage={}", "storage is no section of a stage"),
        ("stages.1.trainin={}", "trainin is no section of a stage; did you mean training?"),
        ("stages.1.training=3", "stages.1.training: must be a section, not 3"),
        (
            "stages.1.model.base=other/model",
            "stages.1.model.base: all stages train the run's base; set ",
        ),
        ("stages.2.training.max_steps=1", "stages has 2 items, its keys are 0 to 1"),
        (
            "stages.1.adapter={r: 4}",
            "stages.1.adapter.r: 4, but the stage before it saves an adapter with 16; use the "
            "same value",
        ),
    ],
)
def test_a_stage_that_cannot_be_is_refused_before_the_first_is_run(
    path: Path, override: str, says: str
) -> None:
    assert says in complaint(path, RUN + STAGES, override)


def test_a_mistake_in_stages_from_the_command_line_is_not_put_on_a_line_of_the_file(
    path: Path,
) -> None:
    text = RUN + "training: {warmup: 0.1}\n"
    override = "stages=[{}, {training: {learning_rat: 1}}]"
    says = "training.learning_rat: unknown key; did you mean training.learning_rate?"
    assert complaint(path, text, override) == f"override '{override}': {says}"


def test_a_mistake_in_a_stage_is_found_by_its_line(path: Path) -> None:
    text = RUN + "stages:\n  - objective: {kind: sft}\n  - training:\n      learnin_rate: 1\n"
    says = "training.learnin_rate: unknown key; did you mean training.learning_rate?"
    assert complaint(path, text) == f"run.yaml:7: {says}"


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (
            "objective.beta: {choice: [1]}",
            "objective.beta: the run has stages; name the stage, such as stages.0.",
        ),
        (
            "stages.2.objective.beta: {choice: [1]}",
            "the run has 2 stages, named stages.0 to stages.1",
        ),
        (
            "stages.1.objective.beat: {choice: [1]}",
            "stages.1.objective.beat: unknown field; did you mean stages.1.objective.beta?",
        ),
        (
            "stages.1.training.seed: {choice: [1]}",
            "stages.1.training.seed is not searched: the best seed",
        ),
        (
            "stages.1: {choice: [{}]}",
            "stages.1: name a field of the stage, such as stages.1.training.learning_rate",
        ),
        (
            "stages.1.objective.beta: {choice: [1]}, stages.0.training.learning_rate: {choice: "
            "[1]}",
            "fields of stages 0 and 1; search one stage at a time",
        ),
    ],
)
def test_a_search_in_stages_names_one_stage(path: Path, fields: str, says: str) -> None:
    assert says in complaint(path, RUN + STAGES + f"search: {{space: {{{fields}}}}}\n")


def test_a_field_of_a_stage_may_be_searched(path: Path) -> None:
    text = RUN + STAGES + "search: {space: {stages.1.objective.beta: {loguniform: [0.01, 0.1]}}}\n"
    config = load(path, text)
    assert config.search is not None
    assert config.search.domains == {"stages.1.objective.beta": Span(0.01, 0.1, log=True)}
