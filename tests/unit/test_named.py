"""A run is named by its YAML, or by the folder where it lies, also after it was moved."""

import shutil
from pathlib import Path

import pytest
import yaml
from support import BASE, run_config, settings

from orpo_ray.errors import ConfigError
from orpo_ray.runs.files import RESULT_FILE, write_json
from orpo_ray.runs.named import named_config
from orpo_ray.runs.run import Run
from orpo_ray.runs.search import Found, Search, Trial
from orpo_ray.runs.search_run import SearchRun, search_for


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run that has begun."""
    made = Run(run_config(tmp_path / "runs", "first"))
    made.write_config()
    return made


def test_a_folder_and_its_yaml_name_the_same_run(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(settings(tmp_path / "runs", "first")), encoding="utf-8")
    assert named_config(run.folder) == named_config(str(file)) == run.config
    assert named_config(f"{run.folder}/").name == "first"


def test_overrides_count(run: Run) -> None:
    assert named_config(run.folder, ["training.seed=9"]).training.seed == 9
    assert named_config(run.folder, ["name=other"]).name == "other"


def test_a_relative_name_is_enough(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.root.parent)
    assert Run(named_config("runs/first")).folder == run.folder


def test_a_folder_that_was_moved_is_read_where_it_is(run: Run, tmp_path: Path) -> None:
    shutil.move(run.folder, tmp_path / "kept")
    config = named_config(tmp_path / "kept")
    assert (config.name, Run(config).folder) == ("kept", tmp_path / "kept")
    assert Run(config).adapter == str(tmp_path / "kept" / "adapter")


def test_a_stage_whose_storage_was_moved_keeps_its_name(tmp_path: Path) -> None:
    stage = Run(run_config(tmp_path / "runs", "both").model_copy(update={"name": "both/1-sft"}))
    stage.write_config()
    shutil.move(tmp_path / "runs", tmp_path / "moved")
    config = named_config(tmp_path / "moved" / "both" / "1-sft")
    assert (config.name, config.storage_dir) == ("both/1-sft", tmp_path / "moved")


@pytest.fixture
def search(run: Run) -> SearchRun:
    """A search of two trials of the run, of which the second is the best."""
    made = search_for(run.config)
    made.write_config()
    trials = [
        Trial(number=number, run=f"{made.name}/trials/{number:03d}", values={}) for number in (0, 1)
    ]
    for trial in trials:
        Run(run.config.model_copy(update={"name": trial.run})).write_config()
    made.keep(Search(name=made.name, settings={}, trial_count=2, pairs=9, trials=trials))
    return made


FOUND = Found(
    best=1,
    values={},
    metrics={},
    adapter="",
    config="",
    pareto=[],
    answers=[],
    trial_steps=1,
    reading=[],
)


def test_a_search_names_its_best_trial(run: Run, search: SearchRun, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the search has not ended"):
        named_config(run.folder)
    record = search.search()
    assert record is not None
    record.outcome = FOUND
    search.keep(record)
    for place in (run.folder, search.folder):
        assert named_config(place).name == "first/search/trials/001"
    shutil.move(run.folder, tmp_path / "kept")
    assert Run(named_config(tmp_path / "kept")).folder == tmp_path / "kept/search/trials/001"


def test_a_finished_run_counts_more_than_its_search(run: Run, search: SearchRun) -> None:
    write_json(run.path(RESULT_FILE), {})
    assert named_config(run.folder).name == "first"
    del search


def test_what_is_no_run_is_refused_in_one_line(tmp_path: Path) -> None:
    for nothing in (tmp_path / "none", ""):
        with pytest.raises(ConfigError, match="no run is there"):
            named_config(nothing)
    with pytest.raises(ConfigError, match=r"no such file"):
        named_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match=r"no config\.json in it"):
        named_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"config\.json"):
        named_config(tmp_path)
    (tmp_path / "config.json").write_text('{"foo": 1}')
    with pytest.raises(ConfigError, match="foo"):
        named_config(tmp_path)


def test_a_models_folder_is_not_taken_for_a_run() -> None:
    with pytest.raises(ConfigError, match="a model lies there, not a run"):
        named_config(BASE)
