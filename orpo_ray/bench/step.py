"""A training step of ours beside one of stock TRL: same pairs, model, dtype and checkpointing, in one process.

A step is forward and backward passes of its pairs in one micro-batch, the host's share included; the optimizer's own
step, which is the same for both, is left out. Nothing here needs Ray.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from orpo_ray.bench.measure import peak_memory, ratio_of, time_in_turns
from orpo_ray.bench.models import full_size, small_llama, with_adapter
from orpo_ray.bench.pairs import Shape, pairs_of_file, pairs_of_shape
from orpo_ray.bench.sides import Ours, Side, Stock
from orpo_ray.data.pairs import TokenPair
from orpo_ray.training.pair_model import PairModel
from orpo_ray.training.plan import SHARED_PREFIX

STEPS = 4
"""Different steps that are measured together, so that ragged pairs come in several mixtures."""
_PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate")

Announce = Callable[[str], None]


@dataclass(frozen=True)
class Case:
    """What is measured. `base`: a name of BASES in NF4 on a GPU; without one a small float32 Llama."""

    shape: Shape
    pairs: int
    ragged: float = 0.0
    objective: str = "orpo"
    hidden: int = 256
    vocabulary: int = 1400
    data: str | None = None
    tokenizer: str | None = None
    max_length: int = 1024
    device: str = "cpu"
    base: str | None = None


def bench_step(case: Case, turns: int, announce: Announce) -> dict[str, Any]:
    """Time both sides in turns. `ratio` is stock / ours, of the time of all steps; memory is that of the costliest."""
    torch.set_num_threads(1)
    model, steps = build(case, announce)
    ours = Ours(pair_model(model, case), steps, case.objective, SHARED_PREFIX)
    stock = Stock(model, steps, case.objective, case.device)
    grouped = Stock(model, group_by_length(steps), case.objective, case.device)
    differences = [compare(model, ours, stock, number) for number in range(len(steps))]
    announce("loss and gradients compared; timing")
    sides: list[Side] = [stock, ours, grouped]
    taken = time_in_turns([lambda side=side: run_all(model, side) for side in sides], turns, case.device)
    memory = [
        max(peak_memory(lambda n=n, s=side: run(model, s, n), case.device) for n in range(STEPS)) for side in sides
    ]
    seconds = [statistics.median(times) / STEPS for times in taken]
    return {
        "name": "step",
        "ratio": ratio_of(taken[0], taken[1]),
        "ratio_grouped": ratio_of(taken[2], taken[1]),
        "ours": seconds[1],
        "stock": seconds[0],
        "stock_grouped": seconds[2],
        "tokens_ours": ours.tokens,
        "tokens_stock": stock.tokens,
        "tokens_stock_grouped": grouped.tokens,
        "memory_ratio": memory[1] / memory[0],
        "memory_ours": memory[1],
        "memory_stock": memory[0],
        "max_rel_loss_diff": max(loss for loss, _ in differences),
        "max_rel_grad_diff": max(gradient for _, gradient in differences),
        "turns": turns,
        "device": torch.cuda.get_device_name() if case.device == "cuda" else "cpu",
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Of the packages that a step goes through."""
    return {name: version(name) for name in _PACKAGES}


def build(case: Case, announce: Announce) -> tuple[PeftModel, list[list[TokenPair]]]:
    """The model, trained with checkpoints in every layer, and the pairs of each step."""
    base = full_size(case.base, case.device) if case.base else small_llama(case.hidden, case.vocabulary)
    model = with_adapter(base.to(case.device))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    vocabulary, count = base.config.vocab_size, STEPS * case.pairs
    if case.data:
        assert case.tokenizer is not None, "the command asks for it"
        pairs = pairs_of_file(case.data, case.tokenizer, case.max_length, count, vocabulary, announce)
    else:
        pairs = pairs_of_shape(case.shape, count, case.ragged, vocabulary)
    return model, [pairs[start : start + case.pairs] for start in range(0, count, case.pairs)]


def pair_model(model: PeftModel, case: Case) -> PairModel:
    """The model as our training sees it."""
    return PairModel(model, torch.bfloat16 if case.device == "cuda" else None)


def group_by_length(steps: Sequence[Sequence[TokenPair]]) -> list[list[TokenPair]]:
    """The same pairs in steps of neighbours in length, which spares stock most of its padding."""
    size = len(steps[0])
    pairs = sorted(
        (pair for step in steps for pair in step),
        key=lambda pair: len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)),
    )
    return [pairs[start : start + size] for start in range(0, len(pairs), size)]


def run(model: PeftModel, side: Side, number: int) -> Tensor:
    """One step, its gradients dropped before."""
    model.zero_grad(set_to_none=True)
    return side.step(number)


def run_all(model: PeftModel, side: Side) -> None:
    """Every step once."""
    for number in range(STEPS):
        run(model, side, number)


def compare(model: PeftModel, ours: Side, stock: Side, number: int) -> tuple[float, float]:
    """Relative differences of a step's loss, and of all its gradients as one vector."""
    found = []
    for side in (stock, ours):
        loss = run(model, side, number)
        gradients = [p.grad.flatten().float().clone() for p in model.parameters() if p.grad is not None]
        found.append((float(loss), torch.cat(gradients)))
    (loss, gradient), (our_loss, our_gradient) = found
    return abs(our_loss - loss) / abs(loss), float((our_gradient - gradient).norm() / gradient.norm())
