"""One worker of a run without Ray: `RANK=0 WORLD_SIZE=2 ... python -m orpo_ray.bench.bare CONFIG.yaml ARTIFACT`."""

import sys
from pathlib import Path

import torch.distributed as dist

from orpo_ray.config import load_config
from orpo_ray.data.store import open_artifact
from orpo_ray.models.hardware import CPU
from orpo_ray.training import loop
from orpo_ray.training.reporter import GroupReporter, LocalReporter
from orpo_ray.training.setup import settle
from orpo_ray.training.world import current_world


def main(config_path: str, artifact_path: str) -> None:
    """Train as one of the processes that the environment tells of."""
    dist.init_process_group("gloo")
    world = current_world()
    config = load_config(config_path)
    artifact = open_artifact(Path(artifact_path))
    config.run_dir.mkdir(parents=True, exist_ok=True)
    world.wait()

    def say_nothing(line: str) -> None:
        """Its numbers are in the run's folder."""

    setup = settle(config, artifact, say_nothing, CPU, world.size) if world.is_first else None
    local = LocalReporter(config.run_dir, keep=config.training.keep, announce=say_nothing)
    loop.train(config, artifact, world.from_first(setup), GroupReporter(local, world), say_nothing)


if __name__ == "__main__":
    main(*sys.argv[1:])
