"""docs/data.md says what the code does: each example on it is read here."""

import csv
import io
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from text_pairs import read_pair

import orpo_ray
from orpo_ray.config import RunConfig
from orpo_ray.config.data import Columns
from orpo_ray.data import formats, messages
from orpo_ray.data.checks import REASONS, WHOLE_FILE, check_pair
from orpo_ray.data.formats import SHAPES, Shape
from orpo_ray.data.pairs import Pair, Refusal
from orpo_ray.data.rows import parse_row
from orpo_ray.models.templates import TEMPLATES

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
ANSWERS = {("Blue.", "Seven."), ("4", "5"), ("Hello!", "Go."), ("Bonjour", "Hola"), ("Cuatro", "5")}
"""Chosen and rejected of all examples: a shape that mixes them up is noticed."""


def sections(level: str) -> dict[str, str]:
    """The sections of the page with headings of this level, by heading."""
    parts = re.split(rf"^{level} (.+)$", PAGE, flags=re.MULTILINE)
    return {
        heading: re.split(r"^##? ", text, flags=re.MULTILINE)[0]
        for heading, text in zip(parts[1::2], parts[2::2], strict=True)
    }


def blocks(language: str, text: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def rows(text: str) -> list[dict[str, Any]]:
    lines = [line for block in blocks("jsonl", text) for line in block.splitlines()]
    parsed = [parse_row(line.encode()) for line in lines]
    assert len(parsed) == 2 and all(isinstance(row, dict) for row in parsed), parsed
    return [row for row in parsed if isinstance(row, dict)]


def read(row: dict[str, Any], columns: Columns | None = None) -> Pair:
    pair = read_pair(row, columns, single_answers=True)
    assert isinstance(pair, Pair), (pair, row)
    assert check_pair(pair) is None
    said = {side: turns[-1]["content"] for side, turns in pair.answers.items()}
    assert any(
        said.items() <= {"chosen": good, "rejected": bad}.items() for good, bad in ANSWERS
    ), said
    return pair


def configs() -> list[RunConfig]:
    """Every YAML block of the page as a whole config."""
    common = {"name": "page", "storage": "runs", "model": {"base": "my-base"}}
    return [
        orpo_ray.load_config({**common, **yaml.safe_load(block)}) for block in blocks("yaml", PAGE)
    ]


@pytest.fixture
def shape_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, Any]], str]:
    """Gives the name of the shape that a row is read by."""
    names: list[str] = []

    def recording(shape: Shape) -> Shape:
        def reads(*arguments: Any) -> Any:
            found = shape.read(*arguments)
            if found is not None:
                names.append(shape.name)
            return found

        return replace(shape, read=reads)

    monkeypatch.setattr(formats, "SHAPES", tuple(recording(shape) for shape in SHAPES))

    def find(row: dict[str, Any]) -> str:
        names.clear()
        read(row)
        return names[-1]

    return find


def test_every_shape_has_a_section_in_the_order_of_the_table() -> None:
    assert list(sections("###")) == [shape.name for shape in SHAPES]


@pytest.mark.parametrize("name", [shape.name for shape in SHAPES])
def test_two_rows_of_each_shape_are_read_by_it(
    name: str, shape_of: Callable[[dict[str, Any]], str]
) -> None:
    assert [shape_of(row) for row in rows(sections("###")[name])] == [name, name]


def test_every_column_that_a_shape_takes_is_named() -> None:
    for shape in SHAPES:
        for column in (*shape.prompt, *(name for pair in shape.sides for name in pair)):
            assert re.search(rf'[`"]{column}[`"]', PAGE), (shape.name, column)
    for role in messages.ROLES:
        assert f"`{role}`" in PAGE, role


def test_named_columns_are_read_with_their_system_turn() -> None:
    section = sections("##")["Other column names"]
    [named] = [config.data.columns for config in configs() if config.data.columns is not None]
    first, second = (read(row, named) for row in rows(section))
    assert first.prompt[0] == {"role": "system", "content": "You are a teacher."}
    assert [message["role"] for message in second.prompt] == ["user"]
    assert isinstance(read_pair(rows(section)[0]), Refusal)


def test_both_system_columns_become_the_system_turn() -> None:
    pairs = [read(row) for row in rows(sections("##")["System turns"])]
    assert [pair.prompt[0]["content"] for pair in pairs] == ["You are a teacher.", "Be brief."]
    assert {pair.prompt[0]["role"] for pair in pairs} == {"system"}


def test_tools_are_read() -> None:
    pairs = [read(row) for row in rows(sections("##")["Tools and documents"])]
    assert [list(pair.context) for pair in pairs] == [["tools"], []]


def test_the_csv_example_is_read() -> None:
    [text] = blocks("csv", PAGE)
    [row] = csv.DictReader(io.StringIO(text))
    assert read(dict(row)).chosen["content"] == "4"


def test_the_yaml_examples_are_configs() -> None:
    columns, turns, sources, lengths, template = (config.data for config in configs())
    assert turns.train_on == "all-assistant"
    assert columns.columns is not None and template.max_prompt_length == 1024
    assert [source.weight for source in sources.train] == [1, 2, 0.5]
    assert [source.split for source in sources.eval] == ["test_prefs"]
    assert (lengths.max_length, lengths.max_prompt_length) == (2048, 1024)
    assert configs()[-1].model.chat_template == "chatml"


def reasons() -> dict[str, tuple[str, str]]:
    """The table of reasons: message and example by code."""
    found = re.findall(r"^\| `([\w-]+)` \| (.+?) \| (.+) \|$", sections("##")["Bad rows"], re.M)
    return {code: (message, example) for code, message, example in found}


def test_every_reason_is_on_the_page_with_its_message() -> None:
    assert {code: message for code, (message, _) in reasons().items()} == REASONS
    whole = {code for code, (_, example) in reasons().items() if example.startswith("whole file")}
    assert whole == WHOLE_FILE


@pytest.mark.parametrize("code", [code for code, (_, text) in reasons().items() if "`{" in text])
def test_each_example_of_a_bad_row_has_its_reason(code: str) -> None:
    [text] = re.findall(r"`([{\[].*)`", reasons()[code][1])
    row = parse_row(text.encode())
    found = row if isinstance(row, Refusal) else read_pair(row)
    found = found if isinstance(found, Refusal) else check_pair(found)
    assert found is not None and found.code == code


def test_the_message_of_a_refused_file_is_the_one_shown() -> None:
    text = re.findall(r"`([{\[].*)`", reasons()["unknown-shape"][1])[0]
    found = read_pair(parse_row(text.encode()))
    assert isinstance(found, Refusal)
    assert f"pairs.jsonl: {REASONS[found.code]}: {found.detail}\n" in PAGE


def test_every_chat_template_is_named() -> None:
    assert [name for name in TEMPLATES if f"`{name}`" not in PAGE] == []
