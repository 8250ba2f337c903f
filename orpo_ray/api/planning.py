"""What a run needs, before anything is rented: `plan` of the command line, as Python functions.

Nothing here loads torch or Ray.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orpo_ray.api.ground import PRINTING, refuse_others
from orpo_ray.config import RunConfig, stage_configs
from orpo_ray.errors import ConfigError
from orpo_ray.runs.console import Console
from orpo_ray.runs.files import PLAN, RUN_FILE
from orpo_ray.runs.run import Run

if TYPE_CHECKING:
    from orpo_ray.planner.advice import Advice
    from orpo_ray.planner.contest import Contest
    from orpo_ray.planner.foreseen import Measured, Prediction
    from orpo_ray.planner.interval import Interval
    from orpo_ray.planner.lengths import Lengths
    from orpo_ray.planner.plan import GpuPlan, Paper, Place
    from orpo_ray.planner.roads import Roads
    from orpo_ray.planner.shapes import Shape

_GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What `estimate` found: the run on each GPU, and what it was planned from."""

    paper: Paper
    base_source: str
    gpus: tuple[GpuPlan, ...]
    advice: Advice
    roads: Roads | None
    contest: Contest | None

    @property
    def fits(self) -> bool:
        """Whether the run fits into one of the GPUs."""
        return any(plan.fits for plan in self.gpus)

    def to_json(self) -> dict[str, Any]:
        """Plain data: sizes in GiB, times in hours."""
        paper = self.paper
        return {
            "name": paper.config.name,
            "base": {"name": paper.shape.name, "source": self.base_source},
            "pairs": {
                "train": paper.lengths.pairs,
                "held_out": paper.lengths.held_out,
                "source": paper.lengths.source,
            },
            "workers": {
                "count": paper.place.count,
                "nodes": paper.place.nodes,
                "network": paper.place.network.name,
            },
            "fits": self.fits,
            "gpus": [_gpu_json(paper, plan) for plan in self.gpus],
            "advice": asdict(self.advice),
            "methods": None if self.roads is None else _roads_json(self.roads),
            "comparison": None if self.contest is None else _contest_json(self.contest),
        }


def estimate(
    config: RunConfig,
    gpu: str = "all",
    *,
    count: int | None = None,
    nodes: int = 1,
    network: str | None = None,
    prices: str | Path | None = None,
    within: float | None = None,
    is_tuned: bool | None = None,
    console: Console = PRINTING,
) -> Estimate:
    """Whether a run fits into GPUs, how long it takes on them, and what it costs.

    `gpu` is a list of names such as `l4,h100`, or `all`. `count` is the number of GPUs of a server;
    without it, that of `scale.workers`, or one. For the advice, `within` is the most hours that
    there are, and `is_tuned` says whether the base was instruction-tuned; without it, its name and
    its template may tell. Raises ConfigError for a wrong name, and CannotTellError for a base whose
    layers are not known.
    """
    from orpo_ray.planner.advice import advise, has_template, is_chat_model
    from orpo_ray.planner.bases import find_shape
    from orpo_ray.planner.calibration import calibration_file, read_calibrations
    from orpo_ray.planner.contest import find_contest
    from orpo_ray.planner.cost import read_prices
    from orpo_ray.planner.hardware import find_gpus
    from orpo_ray.planner.lengths import find_lengths
    from orpo_ray.planner.plan import Paper
    from orpo_ray.planner.roads import Roads, find_roads

    refuse_others(config, console)
    gpus = find_gpus(gpu)
    place = _place(config, count, nodes, network)
    paid = None if prices is None else read_prices(Path(prices))
    found = find_shape(config.model.base, config.model.revision, announce=console.announce)
    lengths = find_lengths(config)
    _refuse_unread(found.shape, lengths)
    paper = Paper(
        config=config,
        shape=found.shape,
        lengths=lengths,
        place=place,
        prices=paid,
        learnt=read_calibrations(calibration_file()),
    )
    plans = _ranked([paper.on(each) for each in gpus])
    has_pairs = not config.objective.reads_single_answers
    best = next((plan for plan in plans if plan.hours), None)
    if is_tuned is None:
        is_tuned = is_chat_model(config.model.base, has_template(found.folder))
    roads = contest = None
    if best is not None and has_pairs:
        roads = find_roads(paper, best.gpu, is_tuned=bool(is_tuned))
        contest = find_contest(paper, best.gpu)
    elif best is not None and best.hours is not None:
        roads = Roads(best.gpu.name, {"kto": best.hours})
    return Estimate(
        paper=paper,
        base_source=found.source,
        gpus=tuple(plans),
        advice=advise(lengths.pairs, is_tuned, roads, contest, budget=within, has_pairs=has_pairs),
        roads=roads,
        contest=contest,
    )


def scaling(found: Estimate, most: int) -> dict[str, Any]:
    """How the run grows from the planned number of servers to `most`, on the first GPU that fits.

    For the gradients that the run has, and for those of every weight of the base.
    """
    from orpo_ray.planner.scaled import scaled

    plan = next((plan for plan in found.gpus if plan.fits), None)
    if plan is None:
        return {}
    return scaled(found.paper, plan, most)


def calibrate(config: RunConfig) -> dict[str, Any]:
    """Learn from a finished run how far plans are off on its device, for all later plans there.

    Each stage of a run in stages teaches. Raises ConfigError for a run that has no plan, or that
    has measured nothing.
    """
    from orpo_ray.planner.calibration import (
        Calibration,
        calibration_file,
        learn,
        read_calibrations,
        write_calibrations,
    )

    runs = [Run(each) for each in stage_configs(config) or [config]]
    path = calibration_file()
    found = before = read_calibrations(path)
    for run in runs:
        predicted, measured = _foretold(run)
        device = predicted.device
        found = found | {device: learn(found.get(device), str(run.place), predicted, measured)}
    write_calibrations(path, found)
    new, old = found[device], before.get(device) or Calibration({})
    changes = (
        f"{device}: time times {new.seconds:.2f} (before: {old.seconds:.2f}), memory times "
        f"{new.memory:.2f} (before: {old.memory:.2f}), from {new.told}; kept in {path}"
    )
    if new == old:
        changes = f"{device}: {runs[0].place} has been learnt from already; nothing changes"
    return {
        "device": device,
        "file": str(path),
        "seconds": new.seconds,
        "memory": new.memory,
        "runs": list(new.runs),
        "changes": [changes],
    }


def _foretold(run: Run) -> tuple[Prediction, Measured]:
    """What was predicted for a run, and what it measured."""
    from orpo_ray.planner.foreseen import read_plan

    run.refresh()
    try:
        return read_plan(run.facts().get(PLAN))
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"--calibrate: {run.place} has no whole plan in {RUN_FILE}; take a finished run of "
            "this version whose base the planner knows, and which has measured a step"
        ) from error


def _place(config: RunConfig, count: int | None, nodes: int, network: str | None) -> Place:
    """The servers; `scale.workers` says how many GPUs they have together if `count` does not."""
    from orpo_ray.planner.hardware import USUAL_NETWORK, find_network
    from orpo_ray.planner.plan import Place

    link = find_network(USUAL_NETWORK if network is None else network)
    workers = config.scale.workers
    if count is None and workers != "auto":
        if workers % nodes:
            raise ConfigError(
                f"--nodes: scale.workers={workers} cannot be shared equally by {nodes} servers; "
                "set scale.workers, or name the GPUs of a server with --count"
            )
        count = workers // nodes
    if workers not in ("auto", (count or 1) * nodes):
        raise ConfigError(
            f"--count: {count} GPUs on each of {nodes} servers are not scale.workers={workers}; "
            f"set scale.workers={(count or 1) * nodes}, or leave --count out"
        )
    return Place(count=count or 1, nodes=nodes, network=link)


def _refuse_unread(shape: Shape, lengths: Lengths) -> None:
    """Raise ConfigError for pairs that are longer than the base reads, as the run does."""
    longest = int((lengths.lengths[:, 0] + lengths.lengths[:, 1:].max(axis=1)).max())
    if shape.positions is not None and longest > shape.positions:
        raise ConfigError(
            f"data.max_length: the longest pair has {longest} tokens, but {shape.name} reads "
            f"{shape.positions}; set data.max_length={shape.positions}"
        )


def _ranked(plans: Sequence[GpuPlan]) -> list[GpuPlan]:
    """Those that fit first: the cheapest, and the fastest where there is no price."""

    def rank(plan: GpuPlan) -> tuple[bool, float, float]:
        cost = plan.cost.middle if plan.cost else float("inf")
        hours = plan.hours.middle if plan.hours else float("inf")
        return (not plan.fits, cost, hours)

    return sorted(plans, key=rank)


def _gpu_json(paper: Paper, plan: GpuPlan) -> dict[str, Any]:
    from orpo_ray.planner.beside import disk_bytes, host_bytes

    worst = plan.worst
    peak = worst.fit.peak.times(1 / _GIB)
    return {
        "gpu": plan.gpu.name,
        "title": plan.gpu.title,
        "memory_gib": plan.gpu.memory / _GIB,
        "fits": plan.fits,
        "uncertain": plan.is_uncertain,
        "peak_gib": peak.middle,
        "low": peak.low,
        "high": peak.high,
        "missing_gib": worst.fit.missing / _GIB,
        "change": plan.change,
        "tokens_per_microbatch": worst.fit.tokens,
        "gradient_checkpointing": worst.fit.method.checkpointing,
        "layout": str(worst.layout.layout),
        "strategy": str(worst.strategy.strategy),
        **_interval("pairs_per_second", plan.pairs_per_second),
        **_interval("hours", plan.hours),
        **_interval("search_hours", plan.search),
        **_interval("cost", plan.cost),
        "currency": paper.prices.currency if paper.prices else None,
        "parts": {name: size / _GIB for name, size in worst.fit.parts.items()},
        "disk": {name: size / _GIB for name, size in disk_bytes(paper, plan).items()},
        "host": host_bytes(paper, plan).times(1 / _GIB).to_json(),
        "stages": [_stage_json(stage) for stage in plan.stages],
        "reason": plan.reason,
    }


def _roads_json(roads: Roads) -> dict[str, Any]:
    return {
        "gpu": roads.gpu,
        "hours": {method: hours.to_json() for method, hours in roads.hours.items()},
    }


def _contest_json(contest: Contest) -> dict[str, Any]:
    return {**asdict(contest), "hours": contest.hours.to_json()}


def _stage_json(stage: Any) -> dict[str, Any]:
    took = stage.duration
    return {
        "name": stage.name,
        "objective": stage.objective,
        "peak_gib": stage.fit.peak.middle / _GIB,
        "steps": took.steps if took else None,
        "seconds": {name: part.to_json() for name, part in took.parts.items()} if took else None,
    }


def _interval(name: str, found: Interval | None) -> dict[str, float | None]:
    if found is None:
        return {name: None, f"{name}_low": None, f"{name}_high": None}
    return {name: found.middle, f"{name}_low": found.low, f"{name}_high": found.high}
