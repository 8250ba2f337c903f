"""Our training step compared with stock TRL's: same pairs, model, dtype and checkpointing.

A step is the forward and backward passes of its pairs in one micro-batch, with the work of the
host. The optimizer's own step is the same for both and is left out. Both run in one process,
without Ray.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any

import numpy as np
import psutil
import torch
from peft import PeftModel
from torch import Tensor

from orpo_ray.bench.measure import peak_memory, ratio_of, relative_differences, time_in_turns
from orpo_ray.bench.models import quantised_base, small_llama, with_adapter
from orpo_ray.bench.pairs import Shape, pairs_of_file, pairs_of_shape
from orpo_ray.bench.sides import Ours, Side, Stock, TrlTrainer
from orpo_ray.data.pairs import TokenPair
from orpo_ray.errors import ConfigError, ResourceError
from orpo_ray.planner.engine import Engine
from orpo_ray.planner.hardware import Gpu
from orpo_ray.planner.here import cpu, gpu_named
from orpo_ray.planner.interval import Interval
from orpo_ray.planner.memory import Method, bytes_of_batch, micro_batch
from orpo_ray.planner.shapes import read_shape
from orpo_ray.runs.console import Announce
from orpo_ray.training.attention_kernels import VARLEN
from orpo_ray.training.logprobs import SelectedLogProbs
from orpo_ray.training.pair_model import PairModel
from orpo_ray.training.plan import PACKED, PADDED, SHARED_PREFIX, Layout

STEPS = 4
"""So many different steps are measured together, so that ragged pairs mix in several ways."""
_PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate")


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is measured.

    `base` names one of BASES, in NF4 on a GPU; `tiny` makes it so small that a CPU will do. Without
    a base the model is a small float32 Llama.
    """

    shape: Shape = (256, 256, 256)
    pairs: int = 2
    ragged: float = 0.0
    objective: str = "orpo"
    hidden: int = 256
    vocabulary: int = 1400
    data: str | None = None
    tokenizer: str | None = None
    max_length: int = 1024
    device: str = "cpu"
    base: str | None = None
    window: int | None = None
    tiny: bool = False


@dataclass(frozen=True)
class Measured:
    """The measurements of one side."""

    seconds: list[float]
    """Of all steps together, for each turn."""
    memory: int
    """Bytes that the costliest step adds to what was there before."""

    @property
    def step(self) -> float:
        """Median of the seconds of a step."""
        return statistics.median(self.seconds) / STEPS


class Bench:
    """A case with its model and pairs, which both sides use in turns."""

    def __init__(self, case: Case, announce: Announce) -> None:
        _refuse(case)
        torch.set_num_threads(1)
        self._case, self._announce = case, announce
        base: Any = (
            quantised_base(case.base, case.device, case.window, tiny=case.tiny)
            if case.base
            else small_llama(case.hidden, case.vocabulary, window=case.window)
        )
        self._model: PeftModel = with_adapter(base.to(torch.device(case.device)))
        self._model.gradient_checkpointing_enable({"use_reentrant": False})
        self._trainer = TrlTrainer(self._model, case.objective, case.device)
        self.steps = self._pairs(base.config.vocab_size)

    def _pairs(self, vocabulary: int) -> list[list[TokenPair]]:
        case, count = self._case, STEPS * self._case.pairs
        if case.data and case.tokenizer:
            pairs = pairs_of_file(
                case.data,
                case.tokenizer,
                max_length=case.max_length,
                count=count,
                vocabulary=vocabulary,
                announce=self._announce,
            )
        else:
            pairs = pairs_of_shape(case.shape, count, case.ragged, vocabulary)
        return [pairs[start : start + case.pairs] for start in range(0, count, case.pairs)]

    def ours(self, layout: Layout = SHARED_PREFIX, *, frozen_head: bool = True) -> Ours:
        """Our step.

        Without `frozen_head` the head's chunks are checkpointed, as those of a trained head.
        """
        model = PairModel(self._model, torch.bfloat16 if self._case.device == "cuda" else None)
        if not frozen_head:
            model.scorer.__class__ = _Checkpointed
        return Ours(model, self.steps, self._case.objective, layout)

    def stock(self, *, grouped: bool = False) -> Stock:
        """TRL's step with the same pairs; `grouped` groups them by length over all steps."""
        return Stock(self._trainer, group_by_length(self.steps) if grouped else self.steps)

    def measure(self, sides: Sequence[Side], turns: int) -> list[Measured]:
        """Time the sides in turns, then measure the memory of each."""
        device = self._case.device
        runs = [partial(self._run_all, side) for side in sides]
        taken = time_in_turns(runs, turns, device)
        memory = [max(self._peak(side, number) for number in range(STEPS)) for side in sides]
        return [Measured(seconds, peak) for seconds, peak in zip(taken, memory, strict=True)]

    def _peak(self, side: Side, number: int) -> int:
        """Bytes that a step adds.

        Gradients of the step before would be subtracted: the step drops them.
        """
        self._model.zero_grad(set_to_none=True)
        return peak_memory(partial(self.run, side, number), self._case.device)

    def planned(self) -> dict[str, Any]:
        """What the planner says: bytes of our costliest step, and the seconds of one."""
        case, on_gpu = self._case, self._case.device == "cuda"
        base: Any = self._model.get_base_model()
        path = PairModel(self._model, torch.bfloat16 if on_gpu else None).attention_path
        method = Method(
            quantization="nf4" if case.base else "none",
            half=on_gpu,
            on_gpu=on_gpu,
            flash=path == VARLEN,
        )
        shape = read_shape(base.config.to_dict())
        batches = [
            micro_batch(
                np.array([[len(p.prompt), len(p.chosen), len(p.rejected)] for p in pairs]),
                SHARED_PREFIX,
                score_prompt=case.objective == "orpo",
                windows=shape.windows,
            )
            for pairs in self.steps
        ]
        gpu, engine = _device(case.device), Engine(shape, method)
        steps = [engine.seconds(batch, gpu) for batch in batches] if gpu else []
        return {
            "memory_planned": max(bytes_of_batch(shape, method, batch) for batch in batches),
            "ours_planned": Interval.total(steps).times(1 / STEPS).to_json() if steps else None,
            "flops_needed": sum(map(engine.needed_flops, batches)) / STEPS,
            "peak_flops": gpu.half_flops if gpu and on_gpu else None,
        }

    def _run_all(self, side: Side) -> None:
        for number in range(STEPS):
            self.run(side, number)

    def run(self, side: Side, number: int) -> Tensor:
        """Run one step, after the gradients of the last one are dropped."""
        self._model.zero_grad(set_to_none=True)
        return side.step(number)

    def differences(self, ours: Side, stock: Side) -> tuple[float, float]:
        """Largest relative differences over the steps: of the loss, and of the gradient vector."""
        losses, gradients = zip(
            *(self._compare(ours, stock, number) for number in range(STEPS)), strict=True
        )
        return max(losses), max(gradients)

    def _compare(self, ours: Side, stock: Side, number: int) -> tuple[float, float]:
        found: list[tuple[float, Tensor]] = []
        for side in (stock, ours):
            loss = float(self.run(side, number))
            gradients = [
                p.grad.flatten().float() for p in self._model.parameters() if p.grad is not None
            ]
            found.append((loss, torch.cat(gradients)))
        return relative_differences(*found)


def describe(device: str) -> dict[str, Any]:
    """The device and the versions, for every result."""
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return {"device": name, "versions": {package: version(package) for package in _PACKAGES}}


def _device(device: str) -> Gpu | None:
    """What the planner knows of the device; None for a GPU that it does not know."""
    if device == "cuda":
        memory = torch.cuda.get_device_properties().total_memory
        return gpu_named(torch.cuda.get_device_name(), memory)
    return cpu(torch.get_num_threads(), psutil.virtual_memory().total)


class _Checkpointed(SelectedLogProbs):
    @property
    def is_frozen(self) -> bool:
        return False


def refuse_device(device: str) -> None:
    """Raise ResourceError if the device is not there."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ResourceError("--device: there is no CUDA device here; use cpu")


def _refuse(case: Case) -> None:
    refuse_device(case.device)
    if case.base and not case.tiny and case.device != "cuda":
        raise ConfigError(f"--base: {case.base} in NF4 is measured on a GPU; add --device cuda")
    if case.base and (case.hidden, case.vocabulary) != (Case.hidden, Case.vocabulary):
        raise ConfigError(f"--hidden and --vocab are those of {case.base}; leave them out")
    if case.tiny and not case.base:
        raise ConfigError("--tiny makes a --base small; name one")
    if case.window is not None and case.base == "llama-3-8b":
        raise ConfigError(f"--window: {case.base} has none; take mistral-7b")
    if bool(case.data) != bool(case.tokenizer):
        raise ConfigError("--data and --tokenizer go together: name both, or neither")


def _mfu(planned: dict[str, Any], seconds: float) -> float | None:
    """The share of the device's peak that the needed operations take; None if it is not known."""
    if not planned["peak_flops"]:
        return None
    return float(planned["flops_needed"] / seconds / planned["peak_flops"])


def group_by_length(steps: Sequence[Sequence[TokenPair]]) -> list[list[TokenPair]]:
    """The same pairs in steps of similar lengths, which saves stock most of its padding."""
    size = len(steps[0])
    pairs = sorted(
        (pair for step in steps for pair in step),
        key=lambda pair: len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)),
    )
    return [pairs[start : start + size] for start in range(0, len(pairs), size)]


def bench_step(case: Case, turns: int, announce: Announce) -> dict[str, Any]:
    """Time both sides in turns.

    `ratio` is stock / ours, for the time of all steps. Memory is that of the costliest step. If
    lengths differ, stock also gets the same pairs grouped by length.
    """
    bench = Bench(case, announce)
    ours, stock = bench.ours(), bench.stock()
    sides: list[Side] = [stock, ours]
    grouped = bench.stock(grouped=True)
    if grouped.tokens != stock.tokens:
        sides.append(grouped)
    loss, gradient = bench.differences(ours, stock)
    announce(f"losses differ by {loss:.1e}, gradients by {gradient:.1e}; now {turns} turns")
    theirs, mine, *rest = bench.measure(sides, turns)
    planned = bench.planned()
    result = {
        "name": "step",
        "ratio": ratio_of(theirs.seconds, mine.seconds),
        "ours": mine.step,
        "stock": theirs.step,
        "tokens_ours": ours.tokens,
        "tokens_stock": stock.tokens,
        "memory_ratio": mine.memory / theirs.memory,
        "memory_ours": mine.memory,
        "memory_stock": theirs.memory,
        **planned,
        "mfu": _mfu(planned, mine.step),
        "max_rel_loss_diff": loss,
        "max_rel_grad_diff": gradient,
        "turns": turns,
    }
    for other in rest:
        result |= {
            "ratio_grouped": ratio_of(other.seconds, mine.seconds),
            "stock_grouped": other.step,
            "tokens_stock_grouped": grouped.tokens,
        }
    return {**result, **describe(case.device)}


TECHNIQUES: dict[str, dict[str, Any]] = {
    "selected log-probs": {"layout": PADDED, "frozen_head": False},
    "gradient in the forward pass": {"layout": PADDED},
    "no padding": {"layout": PACKED, "frozen_head": False},
    "shared prompts, no padding": {"layout": SHARED_PREFIX, "frozen_head": False},
    "all": {"layout": SHARED_PREFIX},
}
"""Each builds on the selected log-probs, which every step of ours uses."""


def bench_ablation(case: Case, turns: int, announce: Announce) -> dict[str, Any]:
    """Compare each technique alone with stock TRL; `ratio` and the rest are those of all together.

    `techniques` has the ratios of time and memory of each.
    """
    bench = Bench(case, announce)
    stock = bench.stock()
    ours = {name: bench.ours(**options) for name, options in TECHNIQUES.items()}
    differences = {name: bench.differences(side, stock) for name, side in ours.items()}
    announce(f"losses and gradients compared; now {turns} turns of {len(ours) + 1} sides")
    theirs, *mine = bench.measure([stock, *ours.values()], turns)
    techniques = {
        name: {
            "ratio": ratio_of(theirs.seconds, measured.seconds),
            "seconds": measured.step,
            "memory_ratio": measured.memory / theirs.memory,
            "tokens": side.tokens,
        }
        for (name, side), measured in zip(ours.items(), mine, strict=True)
    }
    return {
        "name": "ablation",
        "ratio": techniques["all"]["ratio"],
        "ours": techniques["all"]["seconds"],
        "stock": theirs.step,
        "tokens_ours": techniques["all"]["tokens"],
        "tokens_stock": stock.tokens,
        "memory_ratio": techniques["all"]["memory_ratio"],
        "techniques": techniques,
        "max_rel_loss_diff": max(loss for loss, _ in differences.values()),
        "max_rel_grad_diff": max(gradient for _, gradient in differences.values()),
        "turns": turns,
        **describe(case.device),
    }
