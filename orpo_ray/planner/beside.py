"""What a run takes of a server besides its GPUs: its own memory, and room on its disk."""

from orpo_ray.planner.duration import checkpoint_bytes
from orpo_ray.planner.engine import Engine
from orpo_ray.planner.interval import Interval
from orpo_ray.planner.plan import GpuPlan, Paper

_HOST = Interval(0.9e9, 2.0e9, 4.0e9)
"""Bytes of a worker's process. On a CPU 0.86e9 were measured; CUDA's libraries were not."""


def disk_bytes(paper: Paper, plan: GpuPlan) -> dict[str, float]:
    """Bytes on disk: the base as it is downloaded, the checkpoints that stay, and an export."""
    engine = Engine(paper.shape, plan.stages[-1].fit.method)
    whole = 2.0 * paper.shape.total
    kept = paper.config.training.keep + 1  # the next one is written before an old one goes
    return {"base": whole, "checkpoints": kept * checkpoint_bytes(engine), "export": whole}


def host_bytes(paper: Paper, plan: GpuPlan) -> Interval:
    """Bytes of a server's own memory, for all of its workers.

    ZeRO-3 has every worker load the whole base there before it is shared out, unless the base is
    quantised.
    """
    workers = paper.place.count
    method = plan.worst.fit.method
    found = _HOST.times(workers)
    if plan.worst.strategy.strategy.shares_weights and method.quantization == "none":
        number = 4 if method.rank is None else method.number
        found += Interval.sure(float(workers * number * paper.shape.total))
    return found
