"""What the tests of the command line share: a small config, a command's outcome, a real process."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from forked_commands import ForkedCommand, command_server
from support import BASE, DEMO, Done

FAILED, WRONG, LACKING, STOPPED = 1, 2, 3, 4
"""Exit codes."""

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "100"}

TINY = f"""\
name: tiny
storage: STORAGE
model: {{base: {BASE}}}
adapter: {{r: 4, alpha: 8}}
data:
  train: [{{source: {DEMO / "train.jsonl"}, limit: 48}}]
  eval: [{{source: {DEMO / "h1.jsonl"}, limit: 16}}]
  max_length: 96
  max_prompt_length: 48
objective: {{kind: orpo, lambda: 0.5}}
training:
  {{pairs_per_step: 8, max_steps: 4, eval_every: 2, checkpoint_every: 2, learning_rate: 1.0e-3}}
scale: {{workers: 1}}
"""


Command = Callable[..., Done]


@dataclass(frozen=True)
class Finished:
    """A run that a real `orpo-ray train CONFIG --json` brought to its end."""

    config: Path
    run_dir: Path
    done: Done


def write_config(folder: Path) -> Path:
    """The YAML of a small run in a folder, with a storage in the same folder."""
    path = folder / "tiny.yaml"
    path.write_text(TINY.replace("STORAGE", str(folder / "storage")), encoding="utf-8")
    return path


def start(*arguments: object, **variables: str) -> ForkedCommand:
    """Start `orpo-ray` in a process of its own, which a test can time or send signals."""
    words = [str(argument) for argument in arguments]
    return command_server().start(words, Path.cwd(), {**ENVIRONMENT, **variables})


def shell(*arguments: object) -> Done:
    """Run `orpo-ray` with the given arguments in a process of its own."""
    return start(*arguments).end()


def fresh_shell(*arguments: object) -> Done:
    """`shell` in a new interpreter, as a person's shell starts it.

    For what a fork cannot show: `-m` as entry point, what libraries say when they are loaded, and
    which are.
    """
    command = [sys.executable, "-m", "orpo_ray.cli.main", *map(str, arguments)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    return Done(done.returncode, done.stdout, done.stderr)


def shown_commands(readme: Path) -> list[list[str]]:
    """The command lines of a README, in order: those of its `sh` blocks, or its indented ones."""
    text = readme.read_text(encoding="utf-8")
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).splitlines() or re.findall(r"^    (\S.*)$", text, re.MULTILINE)
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def one_line(done: Done, code: int, *told: str) -> str:
    """The complaint of a command that failed as it should."""
    complaints = [line for line in done.said if line.startswith("orpo-ray: ")]
    assert (done.code, len(complaints), done.said[-1:]) == (code, 1, complaints), done.err
    assert "Traceback" not in done.err
    for part in told:
        assert part in complaints[0], (part, complaints[0])
    return complaints[0]


def nothing_in_the_way(command: Command, config: Path) -> None:
    """Whatever the failed command left, the run can begin, and says so."""
    run_dir = config.parent / "storage" / "tiny"
    left = {path.name for path in run_dir.iterdir()} if run_dir.is_dir() else set()
    assert left <= {".lock", "run.log", "config.json", "run.json"}, left
    done = command("train", config, "--dry-run")
    assert (done.code, done.said[-1]) == (0, "the plan has 4 steps; nothing was started"), done.err
