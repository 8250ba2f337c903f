"""Trains runs in processes of their own that end themselves in mid-run.

Run as a program it is the process behind KilledRuns: each line that it reads is a job, and it
answers with the exit code (-9: killed as planned). Each job is a fork of this process, so that the
imports are paid for once.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from orpo_ray import api
from orpo_ray.cli import progress
from orpo_ray.cli.main import run
from orpo_ray.config import load_config
from orpo_ray.runs.console import Console
from orpo_ray.training import checkpoint, conclude

_LOADED = ("bitsandbytes", "deepspeed", "peft", "transformers.models.llama.modeling_llama")
"""What a run imports when it is at work."""


@dataclass(frozen=True)
class Job:
    """A run that is killed `at` a place of PLACES, in a step: no handler, no `finally`, no flush.

    Where `at` is the name of a signal, it is the command's run, which gets that signal.
    """

    config: str
    at: str
    step: int
    environment: Mapping[str, str] = field(default_factory=dict)


class KilledRuns:
    """A process that has everything imported, and runs jobs one by one in forks of itself."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        command = [sys.executable, __file__]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command,
            env=environment,
            stdin=pipe,
            stdout=pipe,
            text=True,
        )

    def run(self, job: Job) -> int:
        """The exit code, negative for a signal."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(asdict(job)), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        assert answer, "the process that runs jobs has ended"
        return int(answer)

    def close(self) -> None:
        """End of input ends the process."""
        self._process.communicate()


Watch = Callable[[int, int, dict[str, float]], None]


class Watching(Console):
    """A silent console that shows each step to a function."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch  # type: ignore[method-assign]


def die() -> None:
    """End this process as a power failure would."""
    os.kill(os.getpid(), signal.SIGKILL)


def at_report(step: int) -> Watch:
    """Die when the train metrics of a step have been reported: the weights have moved, nothing is
    saved.
    """

    def watch(reported: int, total_steps: int, metrics: dict[str, float]) -> None:
        if reported == step and "train/loss" in metrics:
            die()

    return watch


def in_checkpoint(step: int) -> Watch:
    """Die while a step's checkpoint is written: tensors are there, the manifest is not."""
    write_manifest = checkpoint.write_manifest

    def killing(folder: Path) -> None:
        if json.loads((folder / "position.json").read_text(encoding="utf-8"))["step"] == step:
            assert (folder / "state.safetensors").exists()
            die()
        write_manifest(folder)

    checkpoint.write_manifest = killing
    return lambda *_: None


def in_prune(step: int) -> Watch:
    """Die while the checkpoint of a step is being deleted: half of its files are gone."""
    rmtree = checkpoint.shutil.rmtree

    def killing(folder: Path, *args: Any, **kwargs: Any) -> None:
        position = Path(folder) / "position.json"
        if position.exists() and json.loads(position.read_text(encoding="utf-8"))["step"] == step:
            position.unlink()
            die()
        rmtree(folder, *args, **kwargs)

    checkpoint.shutil.rmtree = killing
    return lambda *_: None


def in_finish(step: int) -> Watch:
    """Die after the last step, when the final adapter lies there but result.json does not."""

    def killing(folder: Path, *args: Any) -> None:
        assert (folder / "adapter_model.safetensors").exists()
        die()

    conclude.write_model_card = killing
    return lambda *_: None


PLACES: dict[str, Callable[[int], Watch]] = {
    "report": at_report,
    "checkpoint": in_checkpoint,
    "prune": in_prune,
    "finish": in_finish,
}


def command_that_is_sent(number: signal.Signals, job: Job) -> int:
    """The real command, which gets a signal once it has shown a step; what it says goes to a
    file.
    """
    show = progress.ProgressLine.__call__

    def showing(
        line: progress.ProgressLine,
        step: int,
        total_steps: int,
        metrics: dict[str, float],
    ) -> None:
        show(line, step, total_steps, metrics)
        if step == job.step and "train/loss" in metrics:
            os.kill(os.getpid(), number)

    progress.ProgressLine.__call__ = showing  # type: ignore[method-assign]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with said_by(job).open("w") as file:
        os.dup2(file.fileno(), 2)
        return run(["train", job.config])


def said_by(job: Job) -> Path:
    """Where a command's stderr goes."""
    return Path(job.config).with_suffix(".err")


def run_job(job: Job) -> int:
    """Train in a fork; returns its exit code, negative for a signal."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.environ |= job.environment
            if job.at in signal.Signals.__members__:
                code = command_that_is_sent(signal.Signals[job.at], job)
            else:
                api.train(load_config(job.config), Watching(PLACES[job.at](job.step)))
                code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def serve() -> None:
    """Answer on what stdout is at the start; what a library prints goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for name in _LOADED:
        importlib.import_module(name)
    for line in sys.stdin:
        print(run_job(Job(**json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    serve()
