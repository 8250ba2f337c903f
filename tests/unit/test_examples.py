"""The examples that the project ships can be loaded, and they agree with one another."""

import re
from pathlib import Path

import pytest
import yaml

import orpo_ray
from orpo_ray.cli.demo_run import demo_config
from orpo_ray.config import RunConfig, dump, load_config, stage_configs
from orpo_ray.config.extends import read_config
from orpo_ray.config.objectives import OBJECTIVES
from orpo_ray.jobs.hosts import load_hosts
from orpo_ray.search.space import resolve

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
BASES = sorted((EXAMPLES / "bases").glob("*.yaml"))
HOSTS = sorted(EXAMPLES.rglob("hosts.yaml"))
CONFIGS = sorted(set(EXAMPLES.rglob("*.yaml")) - {*BASES, *HOSTS})
ON_THE_HUB = [
    path for path in CONFIGS if not load_config(path).model.base.startswith((".real", "orpo_ray/"))
]
"""Those that their authors could not run."""
FOLDERS = sorted(
    path for path in EXAMPLES.iterdir() if path.is_dir() and path.name != "__pycache__"
)

KINDS = sorted(objective().kind for objective in OBJECTIVES.values())


def relative(path: Path) -> str:
    return str(path.relative_to(EXAMPLES))


def test_there_are_examples() -> None:
    assert len(CONFIGS) >= 3 and len(FOLDERS) >= 3 and BASES and HOSTS and ON_THE_HUB


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


def test_the_page_of_all_examples_leads_to_each() -> None:
    page = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert [f for f in FOLDERS if f"({f.name}/README.md" not in page] == []


@pytest.mark.parametrize("page", sorted(EXAMPLES.rglob("README.md")), ids=relative)
def test_links_of_an_example_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#\s]+)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("path", BASES, ids=relative)
def test_a_base_becomes_a_run_by_what_extends_it(path: Path) -> None:
    tree, _ = read_config(path)
    assert "name" not in tree and "learning_rate" not in tree["training"]
    names = "|".join(re.escape(form) for form in (path.name, f"../bases/{path.name}"))
    extending = re.compile(rf"^extends: ({names})$", re.MULTILINE)
    texts = [other.read_text(encoding="utf-8") for other in (*CONFIGS, *BASES)]
    assert sum(extending.search(text) is not None for text in texts) >= 2, "or it saves nothing"


@pytest.mark.parametrize("path", HOSTS, ids=relative)
def test_servers_that_are_shown_are_servers(path: Path) -> None:
    hosts = load_hosts(path)
    run = load_config(path.with_name("orpo.yaml"))
    assert isinstance(run.scale.workers, int) and run.scale.workers % len(hosts.addresses) == 0


@pytest.mark.parametrize("path", ON_THE_HUB, ids=relative)
def test_an_example_for_gpus_says_what_it_takes(path: Path) -> None:
    """How many pairs; and at one marked place memory and hours, as planned for a machine."""
    readme = (path.parent / "README.md").read_text(encoding="utf-8")
    assert re.search(r"^\*\*(Pairs|Rows):\*\* .*\d", readme, re.MULTILINE)
    assert re.search(r"^\*\*Needs:\*\* ", readme, re.MULTILINE)
    name = re.escape(path.relative_to(ROOT).as_posix())
    begin = rf"<!-- planned: {name} --gpu [\w-]+(?: --\w+ \w+)* -->"
    end = "<!-- end of planned -->"
    assert len(re.findall(rf"^{begin}\n(?:.*\n)*?{end}$", readme, re.MULTILINE)) == 1


def made(config: RunConfig) -> bool:
    """Whether files that the config names are there, where it names files and no hub's data set."""
    files = [source.source for source in config.data.train if source.source.endswith(".jsonl")]
    return all(Path(file).is_file() for file in files)


@pytest.mark.parametrize("path", CONFIGS, ids=relative)
def test_every_example_is_planned(path: Path, tmp_path: Path) -> None:
    """It fits or needs a change that is named; for a GGUF file the planner says what it takes.

    Pairs that a script of the example makes first cannot be planned before.
    """
    config = orpo_ray.load_config(path, [f"storage={tmp_path}"])
    if config.model.base.endswith(".gguf"):
        (tmp_path / "base.gguf").touch()
        config = orpo_ray.load_config(
            path, [f"storage={tmp_path}", f"model.base={tmp_path / 'base.gguf'}"]
        )
        with pytest.raises(orpo_ray.CannotTellError, match="plan with the hub name or the folder"):
            orpo_ray.estimate(config, "t4", console=orpo_ray.Console())
        return
    if not made(config):
        with pytest.raises(orpo_ray.DataError, match="no such file"):
            orpo_ray.estimate(config, "t4", console=orpo_ray.Console())
        return
    found = orpo_ray.estimate(config, "t4,h200", console=orpo_ray.Console())
    assert found.fits, "the largest GPU holds every example"
    for plan in found.gpus:
        assert plan.fits or (plan.worst.fit.missing > 0 and plan.change)
        assert plan.worst.fit.peak.low <= plan.worst.fit.peak.middle <= plan.worst.fit.peak.high
        if plan.hours is not None:
            assert 0 < plan.hours.low < plan.hours.middle < plan.hours.high


@pytest.mark.parametrize(
    ("folder", "changed"),
    [
        ("four-rtx-4090", {"scale"}),
        ("two-servers", {"scale", "storage"}),
        ("mistral-7b-dora", {"adapter", "training"}),
    ],
)
def test_an_example_changes_what_it_says(folder: str, changed: set[str]) -> None:
    one = dump(load_config(EXAMPLES / "mistral-7b-orpo" / "orpo.yaml"))
    other = dump(load_config(EXAMPLES / folder / "orpo.yaml"))
    assert {section for section in one if one[section] != other[section]} == {"name", *changed}


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
