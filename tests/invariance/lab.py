"""Runs with different workers and strategies, and the differences of their results."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from ranks import Job, Ranks
from safetensors.torch import load_file
from support import layout_of, read_metrics, settings
from torch import Tensor

from orpo_ray.config import RunConfig, build
from orpo_ray.data.store import Artifact
from orpo_ray.training.run_plan import plan_run

TRAIN, EVAL, PAIRS_PER_STEP, STEPS = 16, 4, 8, 10
TOLERANCE = 1e-6
CLOCKS = ("train/seconds", "train/pairs_per_second", "train/memory_bytes")
"""Metrics that are different in every run."""
PLANTS = Path(__file__).with_name("plants.py")
STRATEGIES = ("ddp", "zero-0", "zero-1", "zero-2", "zero-3")
PLAIN: dict[str, Any] = {"model": {"quantization": "none"}}
FULL: dict[str, Any] = {**PLAIN, "adapter": {"kind": "none"}}
DPO: dict[str, Any] = {
    **PLAIN,
    "objective": {"kind": "dpo", "beta": 0.5},
    "training": {"max_grad_norm": 2.0},
}
"""Its gradient norms are between 1 and 6, so only the first steps are clipped."""


class Cell(NamedTuple):
    """One of the ways to compute a curve."""

    workers: int
    packs: int
    """The packs of each worker in a step."""
    strategy: str
    layout: str = "auto"

    def __str__(self) -> str:
        layout = "" if self.layout == "auto" else f"-{self.layout}"
        return f"{self.workers}x{self.packs}-{self.strategy}{layout}"


ALONE = Cell(1, 1, "ddp")
GRID = [
    *(Cell(w, p, s) for w in (1, 2) for p in (1, 3) for s in ("ddp", "zero-1", "zero-2", "zero-3")),
    Cell(2, 3, "zero-0"),
]
"""All of them give one curve."""


@dataclass
class Lab:
    """Runs jobs together in forked processes, and finds their results by the name of the run."""

    ranks: Ranks
    root: Path
    base: Path
    artifact: Artifact
    jobs: list[Job] = field(default_factory=list)
    raised: dict[str, list[list[str]]] = field(default_factory=dict)
    """What the processes of each part of a run raised, by the run's name."""
    cells: list[Cell] = field(default_factory=list)

    def config(
        self,
        name: str,
        workers: int = 1,
        strategy: str = "ddp",
        packs: int = 1,
        steps: int = STEPS,
        **sections: Any,
    ) -> RunConfig:
        """A run with `packs` packs per rank in every step, without dropout by default.

        Activations are kept, so that no memory must be measured. Measuring would take a third of so
        short a run.
        """
        training = {
            "pairs_per_step": PAIRS_PER_STEP,
            "max_steps": steps,
            "eval_every": 5,
            "checkpoint_every": 1.0,
            "gradient_checkpointing": False,
        }
        deepspeed = {"stage": int(strategy[-1])} if strategy.startswith("zero") else "none"
        tree = settings(
            self.root,
            name,
            model={"base": str(self.base), **sections.get("model", {})},
            adapter={"dropout": 0.0, **sections.get("adapter", {})},
            objective=sections.get("objective", {"kind": "orpo", "lambda": 0.1}),
            training={**training, **sections.get("training", {})},
            scale={"workers": workers, "deepspeed": deepspeed},
        )
        if tree["adapter"].get("kind") == "none":
            tree["adapter"] = {"kind": "none"}
        config = build(RunConfig, tree, {(): "test"})
        tree["training"]["tokens_per_microbatch"] = budget_of(config, self.artifact, workers, packs)
        return build(RunConfig, tree, {(): "test"})

    def add(self, name: str, workers: int = 1, *args: Any, **kwargs: Any) -> str:
        """Add a run, or its next part. Takes the arguments of `config` and Job."""
        job = {key: kwargs.pop(key) for key in ("stop_at", "plant") if key in kwargs}
        if "plant" in job:
            job["plant"] = f"{PLANTS}:{job['plant']}"
        config = self.config(name, workers, *args, **kwargs)
        path = self.root / f"{len(self.jobs)}-{name}.yaml"
        path.write_text(
            yaml.safe_dump(config.model_dump(mode="json", by_alias=True)), encoding="utf-8"
        )
        self.jobs.append(Job(str(path), str(self.artifact.path), workers, **job))
        return name

    def add_cells(self, cells: list[Cell], **options: Any) -> list[str]:
        """Add a run for each cell, under the cell's name."""
        self.cells += cells
        training = options.pop("training", {})
        return [
            self.add(
                str(c),
                c.workers,
                c.strategy,
                c.packs,
                training={**training, "layout": c.layout},
                **options,
            )
            for c in cells
        ]

    def run(self, may_fail: Iterable[str] = ()) -> None:
        """Run what was added. Every process must end as its job says."""
        wrong: dict[str, list[str]] = {}
        for job, raised in zip(self.jobs, self.ranks.run(self.jobs), strict=True):
            name = Path(job.config).stem.partition("-")[2]
            self.raised.setdefault(name, []).append(raised)
            stopped = f"StoppedError: stopped at step {job.stop_at} of" if job.stop_at else ""
            as_asked = all(
                text.startswith(stopped) and bool(text) == bool(stopped) for text in raised
            )
            if not as_asked and name not in may_fail:
                wrong[Path(job.config).stem] = raised
        assert not wrong
        self.jobs.clear()

    def path(self, name: str, file: str) -> Path:
        return self.root / name / file

    def curves(self, name: str) -> dict[str, list[float]]:
        """Every metric except those of time, by name, in order of steps."""
        curves: dict[str, list[float]] = {}
        for line in read_metrics(self.root / name):
            for key, value in line.items():
                curves.setdefault("steps" if key == "step" else key, []).append(value)
        return {key: values for key, values in curves.items() if key not in CLOCKS}

    def noted(self, name: str, workers: int) -> list[Any]:
        """What a plant noted, by rank."""
        return [
            json.loads(self.path(name, f"noted-{rank}.json").read_text("utf-8"))
            for rank in range(workers)
        ]

    def result(self, name: str) -> dict[str, Any]:
        result: dict[str, Any] = json.loads(
            self.path(name, "result.json").read_text(encoding="utf-8")
        )
        return result

    def state(self, name: str, step: int = STEPS) -> dict[str, Tensor]:
        return load_file(self.path(name, f"checkpoints/step-{step:06d}/state.safetensors"))

    def check_float32(self, name: str, workers: int, steps: int = STEPS) -> None:
        """Check that trained weights are float32 in the model, the checkpoint and the result.

        `count_updates` has noted the formats in the model.
        """
        assert [counts["formats"] for counts in self.noted(name, workers)] == [
            ["torch.float32"]
        ] * workers, name
        masters = {
            tensor.dtype
            for key, tensor in self.state(name, steps).items()
            if key.endswith("/master")
        }
        assert masters == {torch.float32}, name
        (weights,) = self.path(name, "adapter").glob("*.safetensors")
        assert {tensor.dtype for tensor in load_file(weights).values()} == {torch.float32}, name


MakeLab = Callable[..., Lab]


def budget_of(config: RunConfig, artifact: Artifact, workers: int, packs: int) -> int:
    """The largest token budget that gives every rank `packs` packs in each of the first steps.

    Only the first STEPS steps are checked: over forty steps with different pairs no budget does so
    in all.
    """
    for budget in (100_000, *range(2000, 16, -4)):
        steps = plan_run(config, artifact.train, workers, budget, layout_of(config))
        if {len(rank) for step in steps[:STEPS] for rank in step.packs} == {packs}:
            return budget
    raise AssertionError(f"no budget gives {workers} workers {packs} packs each")


def differences(one: dict[str, list[float]], other: dict[str, list[float]]) -> dict[str, float]:
    """The largest difference between two runs over all steps, by metric.

    Both runs must have the same metrics. For numbers above 1, such as DPO's gradient norms, it is
    the relative difference.
    """
    assert one.keys() == other.keys()
    assert all(len(one[key]) == len(other[key]) for key in one)
    assert one["steps"] == other["steps"]
    return {
        key: max(abs(a - b) / max(1.0, abs(b)) for a, b in zip(one[key], other[key], strict=True))
        for key in one
    }


def largest(
    lab: Lab,
    reference: str,
    names: Iterable[str],
    only: Iterable[str] = (),
    besides: Iterable[str] = (),
) -> float:
    """The largest difference of some runs from the run `reference`.

    It is taken over the metrics `only`, or over all except `besides`. It is printed for the log.
    """
    only, besides = set(only), set(besides)

    def curves(name: str) -> dict[str, list[float]]:
        kept = {key: values for key, values in lab.curves(name).items() if key not in besides}
        return {key: values for key, values in kept.items() if not only or key in {"steps", *only}}

    expected, found = curves(reference), []
    for name in names:
        metric, value = max(differences(curves(name), expected).items(), key=lambda item: item[1])
        print(f"{name} differs from {reference} by {value:.2g} in {metric}")
        found.append(value)
    return max(found)
