"""The roads from pairs to an aligned model that the advice weighs, with the hours of each."""

from dataclasses import dataclass, replace

from orpo_ray.config.contenders import contender
from orpo_ray.errors import ConfigError
from orpo_ray.planner.hardware import Gpu
from orpo_ray.planner.interval import Interval
from orpo_ray.planner.plan import Paper


@dataclass(frozen=True)
class Roads:
    """The hours of methods on one kind of GPU."""

    gpu: str
    hours: dict[str, Interval]


def find_roads(paper: Paper, gpu: Gpu, *, is_tuned: bool) -> Roads | None:
    """ORPO and its rival with a run's own base, pairs and settings.

    The rival is SFT and then DPO, or DPO alone for a base that is instruction-tuned. None if one of
    them does not fit, if the settings refuse it, or if nobody knows how many pairs there are.
    """
    hours = {}
    for method in ("orpo", "dpo" if is_tuned else "sft>dpo"):
        try:
            run = contender(paper.config, method)
            found = replace(paper, config=run, prices=None).on(gpu).hours
        except ConfigError:  # its stages may be refused, or its engine cannot compute it
            return None
        if found is None:
            return None
        hours[method] = found
    return Roads(gpu.name, hours)
