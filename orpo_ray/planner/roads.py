"""The roads from pairs to an aligned model that the advice weighs, with the hours of each."""

from dataclasses import dataclass, replace
from typing import Any

from orpo_ray.config import RunConfig
from orpo_ray.config.build import build, dump
from orpo_ray.errors import ConfigError
from orpo_ray.planner.hardware import Gpu
from orpo_ray.planner.interval import Interval
from orpo_ray.planner.plan import Paper

_METHODS: dict[str, dict[str, Any]] = {
    "orpo": {"objective": {"kind": "orpo"}, "stages": []},
    "dpo": {"objective": {"kind": "dpo"}, "stages": []},
    "sft>dpo": {
        "objective": {"kind": "orpo"},
        "stages": [{"objective": {"kind": "sft"}}, {"objective": {"kind": "dpo"}}],
    },
}


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
        changed = {**dump(paper.config), "search": None, **_METHODS[method]}
        try:
            config = build(RunConfig, changed, {(): paper.config.name})
        except ConfigError:
            return None
        found = replace(paper, config=config, prices=None).on(gpu).hours
        if found is None:
            return None
        hours[method] = found
    return Roads(gpu.name, hours)
