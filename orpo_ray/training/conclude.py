"""Ends a run whose steps are all trained: its adapter, its model card, its result."""

from pathlib import Path
from typing import Any

from orpo_ray.runs.files import PLAN
from orpo_ray.runs.metrics import last_metrics, metric_by_step, metrics_at
from orpo_ray.runs.results import TrainResult
from orpo_ray.runs.run import Run
from orpo_ray.runs.summary import compared, on_preference, plain, remarks
from orpo_ray.runs.versions import versions
from orpo_ray.training.checkpoint import best_whole, read_position
from orpo_ray.training.model_card import write_model_card
from orpo_ray.training.plan import Indices
from orpo_ray.training.session import Session
from orpo_ray.training.trackers import send_page


def conclude(session: Session, checkpoint: Path) -> None:
    """Put the adapter beside the checkpoints, then write result.json as the last file."""
    run, summary = session.run, session.artifact.summary
    chosen = _chosen(session, checkpoint)
    position = read_position(chosen)
    metrics = last_metrics(run.folder) | position.metrics
    found = compared(run.scores(0), run.scores(position.step))
    facts = run.facts()
    result = TrainResult(
        name=run.name,
        steps=len(session.steps),
        adapter=run.adapter,
        adapter_step=position.step,
        metrics=metrics,
        start=metrics_at(run.folder, 0, "eval/"),
        changes=plain(found),
        eval_pairs=len(session.artifact.eval),
        remarks=(*remarks(found, len(session.artifact.eval)), *_on_preference(run)),
        seconds=sum(metric_by_step(run.folder, "train/seconds").values()),
        peak_memory_bytes=facts.get("peak_memory_bytes"),
        pairs_per_second=_speed(run.folder, session.steps),
        workers=tuple(facts["workers"]),
        strategy=facts["strategy"],
        layout=facts.get("layout", facts["decisions"]["layout"]),
        versions=versions(),
    )
    if plan := facts.get(PLAN):
        run.add_facts({PLAN: {**plan, "measured": _measured(result)}})
    write_model_card(run.lay_adapter(chosen / "adapter"), run.config, summary, result)
    run.conclude(result)
    send_page(run, session.announce)


def _measured(result: TrainResult) -> dict[str, Any]:
    """What came, under the names of the plan."""
    return {
        "seconds": result.seconds,
        "pairs_per_second": result.pairs_per_second,
        "peak_bytes": result.peak_memory_bytes,
    }


def _on_preference(run: Run) -> list[str]:
    shares = metric_by_step(run.folder, "train/preference_share").values()
    return on_preference(shares, run.config.objective.more_preference)


def _chosen(session: Session, newest: Path) -> Path:
    """The checkpoint that the adapter is taken from."""
    if session.run.config.training.adapter_from == "last":
        return newest
    best = best_whole(newest.parent, session.announce)
    step = read_position(best).step
    session.announce(
        f"the adapter is that of step {step} of {len(session.steps)}, the best by held-out accuracy"
    )
    return best


def _speed(folder: Path, steps: list[Indices]) -> float | None:
    """Pairs per second of training, over all steps on record."""
    speeds = metric_by_step(folder, "train/pairs_per_second")
    sizes = {number: len(pairs) for number, pairs in enumerate(steps, start=1) if number in speeds}
    if not sizes:
        return None
    seconds = sum(size / speeds[number] for number, size in sizes.items())
    return sum(sizes.values()) / seconds
