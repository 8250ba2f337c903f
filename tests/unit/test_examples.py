"""The examples that the project ships can be loaded, and they agree with one another."""

from pathlib import Path

import pytest
import yaml

from orpo_ray.cli.demo_run import demo_config
from orpo_ray.config import RunConfig, load_config, stage_configs
from orpo_ray.config.objectives import OBJECTIVES
from orpo_ray.search.space import resolve

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
CONFIGS = sorted(EXAMPLES.rglob("*.yaml"))
FOLDERS = sorted(
    path for path in EXAMPLES.iterdir() if path.is_dir() and path.name != "__pycache__"
)

KINDS = sorted(objective().kind for objective in OBJECTIVES.values())


def relative(path: Path) -> str:
    return str(path.relative_to(EXAMPLES))


def test_there_are_examples() -> None:
    assert len(CONFIGS) >= 3 and len(FOLDERS) >= 3


@pytest.mark.parametrize("path", CONFIGS, ids=relative)
def test_every_example_loads_and_names_files_that_are_there(path: Path) -> None:
    config = load_config(path)
    for name in [
        config.model.base,
        *(source.source for source in (*config.data.train, *config.data.eval)),
    ]:
        if name.startswith("orpo_ray/"):
            assert (ROOT / name).exists(), f"{name}: examples are run from the project's root"


@pytest.mark.parametrize("folder", FOLDERS, ids=relative)
def test_every_example_has_a_readme_that_names_its_configs(folder: Path) -> None:
    readme = (folder / "README.md").read_text(encoding="utf-8")
    assert readme.startswith("# ")
    for config in folder.glob("*.yaml"):
        assert config.relative_to(ROOT).as_posix() in readme


def test_examples_go_to_runs_of_their_own() -> None:
    runs = [load_config(path).run_dir for path in CONFIGS]
    assert len(set(runs)) == len(runs)


def test_the_second_stage_starts_from_the_first() -> None:
    first, second = stage_configs(load_config(EXAMPLES / "sft-then-dpo" / "sft-then-dpo.yaml"))
    assert second.adapter.init_from == str(first.run_dir)
    assert (first.objective.kind, second.objective.kind) == ("sft", "dpo")
    assert (second.model, second.data) == (first.model, first.data)


@pytest.mark.parametrize(
    "path", [path for path in CONFIGS if load_config(path).search], ids=relative
)
def test_every_value_of_a_search_that_is_shown_makes_a_run(path: Path) -> None:
    assert resolve(load_config(path)).domains


@pytest.mark.parametrize("kind", KINDS)
def test_the_demo_has_a_recipe_for_every_objective(kind: str, tmp_path: Path) -> None:
    config = demo_config(kind, str(tmp_path), "now")
    assert config.objective.kind == kind
    assert config.name == f"demo-{kind}-now"
    assert config.run_dir.parent == tmp_path
    assert Path(config.model.base).is_dir()
    assert [Path(source.source).name for source in config.data.eval] == [
        "h1.jsonl",
        "h2.jsonl",
        "h3.jsonl",
    ]
    assert all(Path(source.source).is_file() for source in (*config.data.train, *config.data.eval))


def test_every_recipe_of_the_demo_is_that_of_an_objective() -> None:
    recipes = yaml.safe_load(
        (ROOT / "orpo_ray" / "demo" / "recipes.yaml").read_text(encoding="utf-8")
    )
    assert set(recipes) - {"common"} <= set(KINDS)


def test_the_quickstart_is_the_demo_as_an_ordinary_config() -> None:
    quickstart = load_config(EXAMPLES / "quickstart-cpu" / "orpo.yaml")
    demo: RunConfig = demo_config("orpo", "runs", "now")
    for section in ("adapter", "objective", "scale"):
        assert getattr(quickstart, section) == getattr(demo, section), section
    theirs = demo.training.model_dump() | {"checkpoint_every": quickstart.training.checkpoint_every}
    assert quickstart.training.model_dump() == theirs
    assert quickstart.model.quantization == demo.model.quantization
    assert (quickstart.data.max_length, quickstart.data.max_prompt_length) == (96, 48)
