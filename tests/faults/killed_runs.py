"""Trains runs in processes of their own that kill themselves: `python killed_runs.py JOBS.json`.

JOBS.json is a list of {"config": path of a YAML, "at": a place of PLACES, "step": when}. Each job is a fork of this
process, so that the imports are paid for once, and ends by SIGKILL: no handler, no `finally`, no flush. Prints the
list of exit codes (-9: killed as planned) as JSON.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orpo_ray import api
from orpo_ray.config import load_config
from orpo_ray.training import checkpoint, loop

Watch = Callable[[int, int, dict[str, float]], None]


def die() -> None:
    """End this process as a power failure would."""
    os.kill(os.getpid(), signal.SIGKILL)


def at_report(step: int) -> Watch:
    """Die when the train metrics of a step have been reported: the weights have moved, nothing is saved."""

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

    loop.write_model_card = killing
    return lambda *_: None


PLACES: dict[str, Callable[[int], Watch]] = {
    "report": at_report,
    "checkpoint": in_checkpoint,
    "prune": in_prune,
    "finish": in_finish,
}


def run_job(job: dict[str, Any]) -> int:
    """Train in a fork; returns its exit code, negative for a signal."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            api.train(load_config(job["config"]), lambda line: None, PLACES[job["at"]](job["step"]))
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    jobs = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    print(json.dumps([run_job(job) for job in jobs]))
