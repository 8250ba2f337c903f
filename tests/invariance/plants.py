"""What tests put into processes that train together: counters and faults."""

import json
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import GradientState
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from orpo_ray.errors import NonFiniteError
from orpo_ray.models.base import load_base
from orpo_ray.training import load as loading
from orpo_ray.training import loop
from orpo_ray.training.state import collect_state
from orpo_ray.training.trainer import PreferenceTrainer
from orpo_ray.training.world import World

BAD_STEP, BAD_RANK = 3, 1
"""The step and rank that get a number that is not finite. Steps count from 1."""


def note(world: World, run_dir: Path, what: Any) -> None:
    """Write what this process saw to noted-RANK.json in the run's folder, for the test to read."""
    (run_dir / f"noted-{world.rank}.json").write_text(json.dumps(what), encoding="utf-8")


def wrap(name: str, around: Callable[..., Any]) -> None:
    """Replace a method of the trainer; `around` gets the original one first."""
    original = getattr(PreferenceTrainer, name)
    setattr(
        PreferenceTrainer,
        name,
        lambda self, *args, **kwargs: around(original, self, *args, **kwargs),
    )


# --- counters -------------------------------------------------------------------------------------


def count_updates(world: World, run_dir: Path) -> None:
    """Count packs, optimizer steps and DDP's reductions, and note the weights' formats."""
    counts: Counter[str] = Counter(packs=0, steps=0, updates=0, reductions=0)

    def reduce(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        counts["reductions"] += bucket.is_last()
        return allreduce_hook(state, bucket)

    def prepared(original: Any, self: PreferenceTrainer, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        innermost = self.optimizer.optimizer
        while not isinstance(innermost, torch.optim.Optimizer) or hasattr(innermost, "optimizer"):
            innermost = innermost.optimizer
        innermost.register_step_pre_hook(lambda *_: counts.update(updates=1))
        if isinstance(self.model_wrapped, DistributedDataParallel):
            self.model_wrapped.register_comm_hook(None, reduce)
        return result

    def step(original: Any, self: PreferenceTrainer, *args: Any, **kwargs: Any) -> Any:
        counts["steps"] += 1
        return original(self, *args, **kwargs)

    def pack(original: Any, self: PreferenceTrainer, *args: Any, **kwargs: Any) -> Any:
        counts["packs"] += 1
        return original(self, *args, **kwargs)

    def train(original: Any, self: PreferenceTrainer, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        formats = {
            str(parameter.dtype) for parameter in self.model.parameters() if parameter.requires_grad
        }
        note(world, run_dir, {**counts, "formats": sorted(formats)})
        return result

    wrap("_prepare_for_training", prepared)
    wrap("training_step", step)
    wrap("_run_pack", pack)
    wrap("train", train)


def note_dropout(world: World, run_dir: Path) -> None:
    """Note the first dropout mask that this process would draw in each step."""
    masks: dict[int, list[float]] = {}

    def step(original: Any, self: PreferenceTrainer, *args: Any, **kwargs: Any) -> Any:
        with torch.random.fork_rng(devices=[]):
            masks[self.state.global_step + 1] = torch.nn.functional.dropout(
                torch.ones(64), 0.5
            ).tolist()
        note(world, run_dir, masks)
        return original(self, *args, **kwargs)

    wrap("training_step", step)


def note_fetches(world: World, run_dir: Path) -> None:
    """Count how often this process fetched the base, and how often it loaded it too early.

    Too early is before a process of its server has fetched it.
    """
    seen = {"fetches": 0, "loads_too_early": 0}
    fetched = run_dir / "fetched"

    def fetch(config: Any) -> None:
        seen["fetches"] += 1
        fetched.touch()

    def load(*args: Any, **kwargs: Any) -> Any:
        seen["loads_too_early"] += not fetched.exists()
        note(world, run_dir, seen)
        return load_base(*args, **kwargs)

    loop.fetch_base, loading.load_base = fetch, load


# --- faults ---------------------------------------------------------------------------------------


def update_at_every_pack(world: World, run_dir: Path) -> None:
    """Fault: accelerate takes every pack for the last one of its step."""
    count_updates(world, run_dir)
    original = GradientState._set_sync_gradients
    GradientState._set_sync_gradients = lambda self, last: original(self, True)


def reduce_at_every_pack(world: World, run_dir: Path) -> None:
    """Fault: DDP takes every pack for the last one of its step."""

    def sync(original: Any, self: PreferenceTrainer, *args: Any) -> AbstractContextManager[None]:
        return nullcontext()

    count_updates(world, run_dir)
    wrap("_gradient_sync", sync)


def loss_is_nan(world: World, run_dir: Path) -> None:
    """Fault: on one rank, in one step, log-probs are NaN."""

    def pack(original: Any, self: PreferenceTrainer, model: Any, *args: Any) -> Any:
        if not _is_bad(self, world):
            return original(self, model, *args)
        return original(self, lambda batch: model(batch) * float("nan"), *args)

    wrap("_run_pack", pack)
    _watch_failure(world, run_dir)


def gradient_is_nan(world: World, run_dir: Path) -> None:
    """Fault: on one rank, in one step, one value of one gradient is NaN. The loss is right."""

    def prepared(original: Any, self: PreferenceTrainer, *args: Any, **kwargs: Any) -> Any:
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        parameter = trained[-1]

        def spoil(gradient: Tensor) -> Tensor:
            if not _is_bad(self, world):
                return gradient
            gradient = gradient.clone()
            gradient.view(-1)[-1] = float("nan")
            return gradient

        parameter.register_hook(spoil)
        return original(self, *args, **kwargs)

    wrap("_prepare_for_training", prepared)
    _watch_failure(world, run_dir)


def _is_bad(trainer: PreferenceTrainer, world: World) -> bool:
    return world.rank == BAD_RANK and trainer.state.global_step + 1 == BAD_STEP


def _watch_failure(world: World, run_dir: Path) -> None:
    """Note which weights and optimizer state the failed step has changed."""
    before: dict[str, Tensor] = {}

    def step(original: Any, self: PreferenceTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step + 1 == BAD_STEP:
            before.update(_everything(self))
        return original(self, *args, **kwargs)

    def train(original: Any, self: PreferenceTrainer, *args: Any, **kwargs: Any) -> Any:
        try:
            return original(self, *args, **kwargs)
        except NonFiniteError:
            after = _everything(self)
            changed = [
                name for name, tensor in before.items() if not torch.equal(tensor, after[name])
            ]
            note(
                world,
                run_dir,
                {
                    "compared": len(before),
                    "changed": changed,
                    "same_names": before.keys() == after.keys(),
                },
            )
            raise

    wrap("training_step", step)
    wrap("train", train)


def _everything(trainer: PreferenceTrainer) -> dict[str, Tensor]:
    """What a checkpoint would hold, and the live weights that this process has whole."""
    live = {
        f"{name}/live": parameter.detach().clone()
        for name, parameter in trainer.model.named_parameters()
        if parameter.requires_grad and not hasattr(parameter, "ds_id")
    }
    return collect_state(trainer.model, trainer.optimizer.optimizer, keep=True) | live
