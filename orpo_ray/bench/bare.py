"""One worker of a run without Ray, for `bench ray`.

Usage: RANK=0 WORLD_SIZE=2 ... python -m orpo_ray.bench.bare CONFIG.yaml ARTIFACT
"""

import sys
from pathlib import Path

import torch.distributed as dist

from orpo_ray.config import load_config
from orpo_ray.data.store import open_artifact
from orpo_ray.models.hardware import CPU
from orpo_ray.runs.console import SILENT
from orpo_ray.runs.run import Run
from orpo_ray.training import loop
from orpo_ray.training.reporter import GroupReporter, LocalReporter
from orpo_ray.training.setup import settle
from orpo_ray.training.world import current_world


def main(config_path: str, artifact_path: str) -> None:
    """Train as one worker of the group that the environment describes."""
    dist.init_process_group("gloo")
    world = current_world()
    run = Run(load_config(config_path))
    artifact = open_artifact(Path(artifact_path))
    run.folder.mkdir(parents=True, exist_ok=True)
    world.wait()
    setup = settle(run, artifact, SILENT.announce, CPU, world.size) if world.is_first else None
    reporter = GroupReporter(LocalReporter(run, SILENT), world)
    loop.train(run, artifact, world.from_first(setup), reporter, SILENT.announce)


if __name__ == "__main__":
    main(*sys.argv[1:])
