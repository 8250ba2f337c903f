"""The tables of `orpo-ray plan`: GPUs side by side, one GPU in parts, servers, and checked rows."""

from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from orpo_ray.api.planning import Estimate
    from orpo_ray.planner.cost import Prices
    from orpo_ray.planner.plan import GpuPlan

_GIB = 2**30
_WIDTH = 100
"""Columns at least: a narrow terminal wraps lines, and no figure is cut."""
_PARTS = {
    "weights": "weights of the base",
    "adapter": "trained weights",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "activations": "activations that layers keep",
    "layer": "work in the largest layer",
    "head": "work in the head",
    "workspace": "workspace of matrix products",
    "slack": "torch's free blocks",
    "context": "CUDA",
}


def _console() -> Console:
    return Console(width=max(_WIDTH, Console().width))


def print_estimate(found: "Estimate") -> None:
    """Print the run on each GPU; a single GPU with its memory and time by part."""
    console, paper = _console(), found.paper
    place = paper.place
    servers = "" if place.nodes == 1 else f", {place.nodes} servers, {place.network.name}"
    for line in (
        f"base: {paper.shape.name}, {_size(paper.shape.total)} numbers ({found.base_source})",
        f"pairs: {_count(paper.lengths.pairs)} trained, {paper.lengths.held_out:,} held out "
        f"({paper.lengths.source})",
        f"GPUs of a server: {place.count}{servers}",
    ):
        console.print(Text(line), soft_wrap=True)
    console.print(_gpus(found.gpus, paper.prices))
    for line in _remarks(found):
        console.print(Text(line), soft_wrap=True)
    if len(found.gpus) == 1:
        _print_one(found, found.gpus[0], console)
    advice = found.advice
    console.print(
        Text(f"advice: {advice.method}: {advice.reason} ({advice.source})"), soft_wrap=True
    )
    console.print(Text(f"        {advice.check}"), soft_wrap=True)


def _remarks(found: "Estimate") -> list[str]:
    """What the table cannot hold: missing memory, unmeasured GPUs, what hours count, no hours."""
    lines = [
        f"{plan.gpu.name}: {_obstacle(plan)}; the cheapest change: {plan.change}"
        for plan in found.gpus
        if not plan.fits
    ]
    fitting = [plan for plan in found.gpus if plan.fits]
    if unmeasured := [plan.gpu.name for plan in fitting if plan.is_unmeasured]:
        lines.append(
            f"uncertain in time: {', '.join(unmeasured)}: no measurement is published, so the "
            "interval is wide"
        )
    step, workers = found.paper.config.training.pairs_per_step, found.paper.place.workers
    if step < workers:
        lines.append(
            f"{workers - step} of {workers} workers have nothing to do: a step has {step} pairs"
        )
    if any(plan.search for plan in fitting):
        lines.append("hours and cost are those of the whole search")
    if fitting and not any(plan.hours for plan in fitting):
        lines.append(
            "hours are uncertain: nobody knows how many pairs there are; set data.train.0.limit or "
            "training.max_steps, or run orpo-ray prepare"
        )
    return lines


def _size(numbers: int) -> str:
    return f"{numbers / 1e9:.2f} billion" if numbers >= 1e8 else f"{numbers / 1e6:.2f} million"


def _obstacle(plan: "GpuPlan") -> str:
    """Why a run does not fit."""
    missing = plan.worst.fit.missing / _GIB
    return f"{missing:.1f} GiB are missing" if missing > 0 else "it has no bfloat16"


def _count(pairs: int | None) -> str:
    return "an unknown number" if pairs is None else f"{pairs:,}"


def _gpus(plans: "tuple[GpuPlan, ...]", prices: "Prices | None") -> Table:
    has_prices = any(plan.cost for plan in plans)
    currency = prices.currency if prices else ""
    table = Table()
    columns = ["", "fits", "GiB", "of", "tokens", "pairs/s", "hours"]
    for column in [*columns, f"cost {currency}".strip()] if has_prices else columns:
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for plan in plans:
        worst = plan.worst
        peak = worst.fit.peak.times(1 / _GIB)
        cells = [
            plan.gpu.name,
            _fits(plan),
            f"{peak.low:.1f} to {peak.high:.1f}",
            f"{plan.gpu.memory / _GIB:.1f}",
            "" if worst.fit.tokens is None else f"{worst.fit.tokens:,}",
            _between(plan.pairs_per_second),
            _between(plan.search or plan.hours),
        ]
        table.add_row(*cells, *([_between(plan.cost)] if has_prices else []))
    return table


def _fits(plan: "GpuPlan") -> str:
    if plan.is_memory_uncertain:
        return "uncertain"
    return "yes" if plan.fits else "no"


def _between(found: Any) -> str:
    return "" if found is None else f"{_short(found.low)} to {_short(found.high)}"


def _short(value: float) -> str:
    return f"{value:.2g}" if value < 10 else f"{value:,.0f}"


def _print_one(found: "Estimate", plan: "GpuPlan", console: Console) -> None:
    """Print the memory and the time of one GPU by part, and why figures are intervals."""
    worst = plan.worst
    table = Table(title="memory at the worst moment, GiB", title_justify="left")
    table.add_column("")
    table.add_column("", justify="right")
    for name, label in _PARTS.items():
        table.add_row(label, f"{worst.fit.parts[name] / _GIB:.2f}")
    console.print(table)
    checkpointing = "recomputed" if worst.fit.method.checkpointing else "kept"
    notes = [
        f"layout {worst.layout.layout}: {worst.layout.reason}",
        f"strategy {worst.strategy.strategy}: {worst.strategy.reason}",
        f"activations {checkpointing}; either the layer or the head is at work",
        f"time: {plan.reason}",
    ]
    notes.append(_beside(found, plan))
    for stage in plan.stages:
        if stage.duration is not None:
            parts = ", ".join(
                f"{name} {_minutes(part.low, part.high)}"
                for name, part in stage.duration.parts.items()
            )
            notes.append(f"{stage.objective}, {stage.duration.steps} steps: {parts}")
    for line in notes:
        console.print(Text(line), soft_wrap=True)


def _minutes(low: float, high: float) -> str:
    first, last = f"{low / 60:.0f}", f"{high / 60:.0f}"
    return f"{first} min" if first == last else f"{first} to {last} min"


def _beside(found: "Estimate", plan: "GpuPlan") -> str:
    """What a run takes of a server besides its GPUs."""
    from orpo_ray.planner.beside import disk_bytes, host_bytes

    host = host_bytes(found.paper, plan).times(1 / _GIB)
    disk = ", ".join(
        f"{name} {size / _GIB:.1f}" for name, size in disk_bytes(found.paper, plan).items()
    )
    return f"a server's own memory: {host.low:.1f} to {host.high:.1f} GiB; disk, GiB: {disk}"


def print_scaling(found: dict[str, Any]) -> None:
    """Print how a run grows with its servers."""
    console = _console()
    if not found:
        console.print(Text("the run fits into none of these GPUs, so it is not scaled"))
        return
    for name, title in (("trained", "what is trained"), ("every_weight", "every weight")):
        table = Table(
            title=f"gradients of {title}, {found['gpu']}, {found['network']}", title_justify="left"
        )
        for column in ("servers", "workers", "pairs/s", "efficiency", "exchange", "limit"):
            table.add_column(column, justify="right")
        for row in found[name]["nodes"]:
            cells = (
                str(row["nodes"]),
                str(row["workers"]),
                f"{_short(row['low'])} to {_short(row['high'])}",
                f"{row['efficiency']:.0%}",
                f"{row['exchanged']:.0%}",
                row["limit"],
            )
            table.add_row(*cells)
        console.print(table)
        for key in ("faster_network", "larger_step"):
            if paid := found[name][key]:
                console.print(
                    Text(
                        f"from {paid['nodes']} server{'s' * (paid['nodes'] > 1)} on, "
                        f"{paid['change']} pays: {paid['gain']:.2f} times the pairs a second"
                    )
                )


def print_check(found: dict[str, Any]) -> None:
    """Print how far predictions are from measured rows."""
    console = _console()
    table = Table(title=f"{found['file']}: {found['rows']} rows", title_justify="left")
    for column in ("", "rows", "mean error", "mean of sizes", "worst", "held"):
        table.add_column(column, justify="right" if column else "left")
    groups = {"grade a": found, **found["by_source"]}
    if found["kind"] == "memory":
        groups = {"grade a": found, "grade a, device": found["device"], **found["by_source"]}
    for name, score in groups.items():
        held = next(value for key, value in score.items() if key.startswith("share_within"))
        worst = score["worst"]
        cells = (
            name,
            str(score["scored"]),
            _percent(score["mean_error"]),
            "" if score["mean_abs_error"] is None else f"{score['mean_abs_error']:.1%}",
            "" if worst is None else f"{worst['row']} {_percent(worst['error'])}",
            "" if held is None else f"{held:.0%}",
        )
        table.add_row(*cells)
    console.print(table)
    console.print(
        Text(f"{len(found['others'])} rows are not scored or not held; --json lists them")
    )


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:+.1%}"
