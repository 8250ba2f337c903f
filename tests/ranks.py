"""Trains runs in several processes without Ray, as bare torch.distributed: `python ranks.py JOBS.json`.

JOBS.json is a list of {"config": path of a YAML, "artifact": folder, "workers": n, "stop_at": step or null, "plant":
"FILE.py:FUNCTION" or null}. Each process is a fork of this one, so that the imports are paid for once. Prints a list
with, for each job, what its processes raised ("" where nothing), by rank.
"""

import importlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from support import ENVIRONMENT

_PATIENCE = timedelta(seconds=60)
"""For processes that wait for one that has failed."""


@dataclass(frozen=True)
class Job:
    """One run, or its next part: it stops with a checkpoint after step `stop_at`.

    `plant` names a function, as `FILE.py:FUNCTION`, that each process calls with its world and the run's folder before
    it trains: to count something there, or to break it.
    """

    config: str
    artifact: str
    workers: int
    stop_at: int | None = None
    plant: str | None = None


def run_jobs(jobs: list[Job], folder: Path) -> list[list[str]]:
    """Run jobs one after the other in processes of their own; what each process of each job raised."""
    listed = folder / "jobs.json"
    listed.write_text(json.dumps([asdict(job) for job in jobs]), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, __file__, str(listed)], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    failures: list[list[str]] = json.loads(done.stdout.splitlines()[-1])
    return failures


def _run(job: Job) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        children = [_fork(job, rank, Path(folder)) for rank in range(job.workers)]
        for child in children:
            os.waitpid(child, 0)
        return [(Path(folder) / f"{rank}.txt").read_text(encoding="utf-8") for rank in range(job.workers)]


def _fork(job: Job, rank: int, folder: Path) -> int:
    child = os.fork()
    if child:
        return child
    failure = ""
    try:
        _train(job, rank, folder / "rendezvous")
    except BaseException as error:  # told to the test, by which process raised it
        failure = f"{type(error).__name__}: {error}"
        if os.environ.get("RANKS_TRACE"):
            raise
    finally:
        (folder / f"{rank}.txt").write_text(failure, encoding="utf-8")
        os._exit(0)
    return 0


def _train(job: Job, rank: int, rendezvous: Path) -> None:
    import torch.distributed as dist

    from orpo_ray.config import load_config
    from orpo_ray.data.store import open_artifact
    from orpo_ray.models.hardware import CPU
    from orpo_ray.training import loop
    from orpo_ray.training.checkpoint import read_position
    from orpo_ray.training.reporter import GroupReporter, LocalReporter
    from orpo_ray.training.setup import settle
    from orpo_ray.training.world import current_world

    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job.workers, "LOCAL_WORLD_SIZE": job.workers}
    os.environ |= {name: str(value) for name, value in place.items()}
    rendezvous_url = f"file://{rendezvous}"
    dist.init_process_group("gloo", init_method=rendezvous_url, rank=rank, world_size=job.workers, timeout=_PATIENCE)
    world = current_world()
    config = load_config(job.config)
    config.run_dir.mkdir(parents=True, exist_ok=True)
    artifact = open_artifact(Path(job.artifact))
    announce = (lambda line: print(line, file=sys.stderr)) if world.is_first else (lambda line: None)
    setup = world.from_first(settle(config, artifact, announce, CPU, job.workers) if world.is_first else None)
    reached = 0

    def watch(step: int, total_steps: int, metrics: dict[str, float]) -> None:
        nonlocal reached
        reached = step

    if job.plant:
        file, _, name = job.plant.rpartition(":")
        runpy.run_path(file)[name](world, config.run_dir)
    local = LocalReporter(
        config.run_dir,
        keep=config.training.keep,
        announce=announce,
        # A request is heard in the step after it.
        stop_requested=lambda: job.stop_at is not None and reached >= job.stop_at - 1,
        watch=watch,
    )
    begun = local.latest_checkpoint() if world.is_first else None
    reached = read_position(begun).step if begun else 0
    loop.train(config, artifact, setup, GroupReporter(local, world), announce)


if __name__ == "__main__":
    import accelerate  # noqa: F401 - imported once, before the forks
    import torch
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    from orpo_ray.training import loop  # noqa: F401
    from orpo_ray.training.zero import prepare_deepspeed

    torch.set_num_threads(1)
    prepare_deepspeed("cpu")
    # What each process would otherwise do for itself, in about a second.
    get_checkpoint_conversion_mapping("llama")
    for name in ("peft", "deepspeed.runtime.engine", "deepspeed.runtime.zero.muon.original_muon"):
        importlib.import_module(name)
    jobs: list[dict[str, Any]] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    print(json.dumps([_run(Job(**job)) for job in jobs]))
