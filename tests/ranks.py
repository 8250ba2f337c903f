"""Trains runs in several processes without Ray, as bare torch.distributed.

Run as a program it is the process behind Ranks: each line that it reads is a list of jobs, and it
answers with a line that holds, for each of them, what its processes raised ("" where nothing), by
rank. Each process is a fork of this one, so that the imports are paid for once.
"""

import importlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

from support import ENVIRONMENT, HANG_S

from orpo_ray.runs.console import Console

_LOADED = (
    "accelerate",
    "deepspeed.runtime.engine",
    "deepspeed.runtime.zero.muon.original_muon",
    "orpo_ray.training.loop",
    "peft",
)


@dataclass(frozen=True)
class Job:
    """One run, or its next part: it stops with a checkpoint after step `stop_at`.

    `plant` names a function, as `FILE.py:FUNCTION`, that each process calls with its world and the
    run's folder before it trains: to count something there, or to break it.
    """

    config: str
    artifact: str
    workers: int
    stop_at: int | None = None
    plant: str | None = None


class Ranks:
    """A process that has everything imported and runs jobs one after the other in forks of
    itself.

    `where` is a command that starts it somewhere, such as in a network namespace.
    """

    def __init__(self, where: Sequence[str] = ()) -> None:
        command = [*where, sys.executable, __file__]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command, env=ENVIRONMENT, stdin=pipe, stdout=pipe, text=True
        )

    def run(self, jobs: list[Job]) -> list[list[str]]:
        """What each process of each job raised."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps([asdict(job) for job in jobs]), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        assert answer, "the process that runs jobs has ended"
        raised: list[list[str]] = json.loads(answer)
        return raised

    def close(self) -> None:
        """End of input ends the process."""
        self._process.communicate()


def _run(job: Job) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        children = [_fork(job, rank, Path(folder)) for rank in range(job.workers)]
        for child in children:
            os.waitpid(child, 0)
        return [
            (Path(folder) / f"{rank}.txt").read_text(encoding="utf-8")
            for rank in range(job.workers)
        ]


def _fork(job: Job, rank: int, folder: Path) -> int:
    child = os.fork()
    if child:
        return child
    failure = ""
    try:
        _train(job, rank, folder / "rendezvous")
    except BaseException as error:  # noqa: BLE001 - told to the test, by which process raised it
        failure = f"{type(error).__name__}: {error}"
        traceback.print_exc()
    finally:
        (folder / f"{rank}.txt").write_text(failure, encoding="utf-8")
        os._exit(0)
    return 0


def _train(job: Job, rank: int, rendezvous: Path) -> None:
    import torch.distributed as dist

    from orpo_ray.config import load_config
    from orpo_ray.data.store import open_artifact
    from orpo_ray.models.hardware import CPU
    from orpo_ray.runs.run import Run
    from orpo_ray.training import loop
    from orpo_ray.training.checkpoint import read_position
    from orpo_ray.training.reporter import GroupReporter, LocalReporter
    from orpo_ray.training.setup import settle
    from orpo_ray.training.world import current_world

    place = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": job.workers,
        "LOCAL_WORLD_SIZE": job.workers,
    }
    os.environ |= {name: str(value) for name, value in place.items()}
    url, patience = f"file://{rendezvous}", timedelta(seconds=HANG_S)
    dist.init_process_group(
        "gloo", init_method=url, rank=rank, world_size=job.workers, timeout=patience
    )
    world = current_world()
    run = Run(load_config(job.config))
    run.folder.mkdir(parents=True, exist_ok=True)
    artifact = open_artifact(Path(job.artifact))
    console = _Stopping(job.stop_at, speaks=world.is_first)
    setup = world.from_first(
        settle(run, artifact, console.announce, CPU, job.workers) if world.is_first else None
    )
    if job.plant:
        file, _, name = job.plant.rpartition(":")
        runpy.run_path(file)[name](world, run.folder)
    local = LocalReporter(run, console)
    begun = local.latest_checkpoint() if world.is_first else None
    console.reached = read_position(begun).step if begun else 0
    loop.train(run, artifact, setup, GroupReporter(local, world), console.announce)


class _Stopping(Console):
    """Says what it hears on stderr, and asks to stop at a step."""

    def __init__(self, stop_at: int | None, speaks: bool) -> None:
        self._stop_at, self._speaks = stop_at, speaks
        self.reached = 0

    def announce(self, line: str) -> None:
        if self._speaks:
            print(line, file=sys.stderr)

    def watch(self, step: int, total_steps: int, metrics: dict[str, float]) -> None:
        self.reached = step

    def stop_requested(self) -> bool:
        """A request is heard in the step after it."""
        return self._stop_at is not None and self.reached >= self._stop_at - 1


def _load() -> None:
    """Import what training needs, with what each process would otherwise do for itself in about a
    second.
    """
    import torch
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    from orpo_ray.training.zero import prepare_deepspeed

    torch.set_num_threads(1)
    prepare_deepspeed("cpu")
    get_checkpoint_conversion_mapping("llama")
    for name in _LOADED:
        importlib.import_module(name)


def _serve() -> None:
    """Answer on what stdout is at the start; whatever a library prints goes to stderr, which pytest
    shows.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    _load()
    for line in sys.stdin:
        print(json.dumps([_run(Job(**job)) for job in json.loads(line)]), file=answers, flush=True)


if __name__ == "__main__":
    _serve()
