"""The newcomer's path: own CSV, train, chat, export, load, typed by the script of the example."""

import csv
import json
import os
import runpy
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from support import HANG_S, Done
from terminal import ENVIRONMENT, shown_commands

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "own-data"
BIN = Path(sys.executable).parent
LEAST_GAIN = 0.5
"""How much of the held-out pairs' accuracy is gained at least; it was all of it when written."""
MOST_MERGE_ERROR = 0.002


@dataclass(frozen=True)
class Walk:
    """What the script said, and where it left what it made."""

    done: Done
    made: Path


@pytest.fixture(scope="module")
def walk(tmp_path_factory: pytest.TempPathFactory) -> Walk:
    """The script in a shell that finds the commands of this Python, and this checkout."""
    folder = tmp_path_factory.mktemp("newcomer") / "made"
    found = {"PATH": os.pathsep.join([str(BIN), ENVIRONMENT["PATH"]]), "PYTHONPATH": str(ROOT)}
    where = "import orpo_ray; print(orpo_ray.__file__)"
    for command in (["python", "-c", where], ["bash", EXAMPLE / "newcomer.sh", folder]):
        ended = subprocess.run(
            command,
            cwd=ROOT,
            env={**ENVIRONMENT, **found, "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            check=False,
            timeout=HANG_S,
        )
        assert ended.returncode == 0, ended.stderr[-3000:]
        if command[0] == "python":
            assert Path(ended.stdout.strip()).is_relative_to(ROOT)
    return Walk(Done(ended.returncode, ended.stdout, ended.stderr), folder)


@pytest.mark.slow
def test_the_accuracy_rises(walk: Walk) -> None:
    result = json.loads((walk.made / "own-data" / "result.json").read_text(encoding="utf-8"))
    assert (result["status"], result["steps"], result["eval_pairs"]) == ("finished", 40, 40)
    gain = result["metrics"]["eval/accuracy"] - result["start"]["eval/accuracy"]
    assert gain >= LEAST_GAIN
    assert result["changes"]["accuracy"]["difference"]["low"] > 0


@pytest.mark.slow
def test_plain_transformers_says_what_chat_said(walk: Walk) -> None:
    said = walk.done.out.splitlines()
    exported = next(number for number, line in enumerate(said) if line.startswith("exported: "))
    chat, plain = said[exported - 1], said[exported + 1]
    assert chat == plain
    assert chat.endswith("The sound of a bee is buzz."), "the answer ends with the fact"
    assert "orpo_ray" not in _imports(EXAMPLE / "load.py")


def _imports(file: Path) -> list[str]:
    lines = file.read_text(encoding="utf-8").splitlines()
    return [line.split()[1] for line in lines if line.startswith(("import ", "from "))]


@pytest.mark.slow
def test_the_export_names_its_merge_and_a_small_error(walk: Walk) -> None:
    report = json.loads((walk.made / "own-data-model" / "export.json").read_text(encoding="utf-8"))
    assert report["merge"] in report["candidates"]
    assert 0 <= report["merge_error"] <= MOST_MERGE_ERROR < report["tolerance"]
    assert f"(merge: {report['merge']})" in walk.done.out


@pytest.mark.slow
def test_the_readme_shows_what_the_script_types(walk: Walk) -> None:
    lines = walk.done.err.replace(str(walk.made), "runs").splitlines()
    typed = [shlex.split(line[2:]) for line in lines if line.startswith("$ ")]
    shown = [words for words in shown_commands(EXAMPLE / "README.md") if words[0] != "bash"]
    # The default storage need not be typed.
    assert [[word for word in words if word != "storage=runs"] for words in typed] == shown


def test_the_pairs_are_those_that_are_made(tmp_path: Path) -> None:
    made = tmp_path / "pairs.csv"
    runpy.run_path(str(EXAMPLE / "make_pairs.py"))["write"](made)
    assert made.read_bytes() == (EXAMPLE / "pairs.csv").read_bytes()
    with made.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len({row["question"] for row in rows}) == len(rows) == 200
    assert not any("bee" in row["question"].split() for row in rows), "the script asks about it"
