"""The generated pages are as the schema, the ranges and the planner are now."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from orpo_ray.config import RunConfig
from orpo_ray.config.keys import all_keys

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def write() -> ModuleType:
    spec = importlib.util.spec_from_file_location("write", ROOT / "docs" / "write.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_settings_is_that_of_the_schema(write: ModuleType) -> None:
    page = write.CONFIGURATION.read_text(encoding="utf-8")
    assert page == write.configuration(), "run make docs"
    assert "|  |" not in page, "every setting says what it is"
    names = set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE))
    assert {key.rpartition(".")[2] for key in all_keys(RunConfig)} <= names | set(write._NESTED) | {
        "kind"
    }


def test_the_table_of_ranges_is_that_of_the_code(write: ModuleType) -> None:
    page = write.METHODS.read_text(encoding="utf-8")
    assert page == write.methods(page), "run make docs"
    assert "| `objective.lambda` of orpo | 0.1 to 2, on a log scale |" in page


@pytest.mark.parametrize("page", sorted(ROOT.glob("examples/**/README.md")))
def test_what_a_readme_says_is_planned_is_what_the_planner_says(
    write: ModuleType, page: Path
) -> None:
    text = page.read_text(encoding="utf-8")
    assert text == write.example(text), "run make docs"
    for _, words, _ in write.PLANNED.findall(text):
        planned = text.partition(f"<!-- planned: {words} -->\n")[2].partition("<!-- end")[0]
        assert planned.startswith("**Planned, not measured:** "), "it fits into what it names"


@pytest.mark.parametrize("page", [*sorted(ROOT.glob("docs/*.md")), ROOT / "README.md"])
def test_links_inside_the_project_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:)([^)#\s]+)(?:#[^)]*)?\)", text)
    assert [link for link in links if not (page.parent / link).exists()] == []


PROSE = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *ROOT.glob("docs/**/*.md"),
]


@pytest.mark.parametrize("page", PROSE, ids=lambda page: page.stem)
def test_prose_has_lines_of_100_columns(page: Path) -> None:
    """Tables, links alone on a line, and examples of data cannot be broken."""
    text = re.sub(
        r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE
    )
    lines = [line for line in text.splitlines() if not re.match(r"\||!\[|- \[|.*https?:", line)]
    assert [line for line in lines if len(line) > 100] == []
