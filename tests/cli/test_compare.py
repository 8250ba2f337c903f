"""`orpo-ray compare` refuses what it cannot compare, in one line, before anything is trained."""

from pathlib import Path

import pytest
import yaml
from support import settings
from terminal import WRONG, Command, one_line


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings(tmp_path / "storage", "tiny")), encoding="utf-8")
    return path


MISTAKES: dict[str, tuple[tuple[str, ...], str]] = {
    "nothing": ((), "name a CONFIG.yaml to compare with"),
    "show and a config": (("CONFIG", "--show", "x"), "--show RUN takes no config and no --curve"),
    "no comparison": (("--show", "nowhere"), "nowhere: no comparison.json here"),
    "a method": (("CONFIG", "compare.methods=[dpo, orpp]"), "no method 'orpp'; did you mean orpo?"),
    "no numbers": (("CONFIG", "--curve", "12,few"), "--curve: write numbers of pairs such as"),
    "too many pairs": (
        ("CONFIG", "--curve", "6,5000"),
        "5,000 training pairs are asked for, and there are 36",
    ),
    "no budget": (("CONFIG", "compare.budget={}"), "compare.budget: name one of pairs"),
    "a small budget": (
        ("CONFIG", "compare.budget={pairs: 12}", "compare.methods=[dpo]"),
        "compare.budget: the reference alone reads",
    ),
    "a judge without answers": (
        ("CONFIG", "compare.answers=0", "compare.judge={endpoint: http://x/v1, model: m}"),
        "compare: judge: there is nothing to judge with answers: 0",
    ),
    "a judge that is no URL": (
        ("CONFIG", "compare.judge={endpoint: x, model: m}"),
        "compare.judge.endpoint: must be a URL such as",
    ),
    "a judge without its key": (
        ("CONFIG", "compare.judge={endpoint: http://x/v1, model: m, key_file: nowhere}"),
        "compare.judge.key_file: nowhere: No such file",
    ),
    "large steps": (
        ("CONFIG", "compare.budget={pairs: 100}", "training.pairs_per_step=64"),
        "compare.budget: 100 pairs are no whole number of steps",
    ),
    "settings": (
        ("CONFIG", "compare.methods=[x]", "compare.settings={x: {training: {epoch: 2}}}"),
        "compare.methods: x",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(
    command: Command, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    words, said = MISTAKES[name]
    monkeypatch.chdir(tmp_path)
    done = command("compare", *(str(config) if word == "CONFIG" else word for word in words))
    one_line(done, WRONG, said)
    assert not (tmp_path / "storage" / "tiny").exists()
