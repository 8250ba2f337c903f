"""docs/python.md runs as it stands there, and adds an objective as it says."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import ENVIRONMENT

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "python.md"
USES_MARGIN = """
import orpo_ray
settings = {settings}
overrides = ["name=margin", "objective={{kind: margin, gap: 0.5}}", "training.max_steps=2"]
config = orpo_ray.load_config(settings, overrides)
result = orpo_ray.train(config, orpo_ray.Console())
assert result.steps == 2 and result.metrics["train/loss"] > 0, result
"""


def blocks() -> list[str]:
    return re.findall(
        r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )


def files() -> dict[str, str]:
    """The blocks that are files, by the path in their first line."""
    named = (re.match(r"# (\S+\.py)\n(.*)", block, re.DOTALL) for block in blocks())
    return {match[1]: match[2] for match in named if match}


def run(code: str, folder: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**ENVIRONMENT, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the package: what is added to it stays there."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "orpo_ray", tmp_path / "orpo_ray", ignore=ignored)
    return tmp_path


@pytest.mark.long
@pytest.mark.ray
@pytest.mark.slow
def test_the_examples_run_as_they_stand(project: Path) -> None:
    code = "\n".join(block for block in blocks() if not re.match(r"# \S+\.py\n", block))
    out = run(code, project)
    assert "64 pairs to train on, 16 to evaluate with" in out
    assert "4 steps, if it is trained" in out
    assert "orpo_ray: run from-python is finished" in out
    assert "training.learning_rat: unknown key; did you mean training.learning_rate?" in out
    assert "2 trials" in out
    assert re.search(r"^\{'objective\.lambda': (0\.1|1\.0)\} \d\.\d+$", out, re.MULTILINE)
    assert re.search(r"^trained \d\.\d+$", out, re.MULTILINE)


def test_the_objective_is_two_files(project: Path) -> None:
    assert list(files()) == [
        "orpo_ray/config/objectives/margin.py",
        "orpo_ray/objectives/margin.py",
    ]
    for name, text in files().items():
        (project / name).write_text(text, encoding="utf-8")
    settings = re.search(r"settings = (\{.*?^\})", blocks()[0], re.MULTILINE | re.DOTALL)
    assert settings is not None
    path = os.pathsep.join([str(project), os.environ.get("PYTHONPATH", "")])
    run(USES_MARGIN.format(settings=settings[1]), project, PYTHONPATH=path)
