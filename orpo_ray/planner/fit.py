"""Whether a run fits into a GPU, and with which micro-batch: the decision that the run makes.

`training/budget.py` decides from measured packs. Here the same function gets predicted ones.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from orpo_ray.planner.hardware import Gpu
from orpo_ray.planner.interval import Interval
from orpo_ray.planner.memory import (
    Method,
    MicroBatch,
    computed,
    held,
    micro_batch,
    state_bytes,
    trained_numbers,
)
from orpo_ray.planner.shapes import Shape
from orpo_ray.planner.stock import CUBLAS_WORKSPACE, context_bytes
from orpo_ray.training.budget import (
    MOST_TOKENS,
    Sizes,
    find_budget,
    sample_pack,
    usable,
    with_set_tokens,
)
from orpo_ray.training.plan import Indices, PackCosts, pack_costs
from orpo_ray.training.strategy import ModelSize, Strategy

_LAW = (0.95, 1.0, 1.1)
"""What the law of memory may be off by: the measured tests allow 5 % either way.

On a GPU that nobody has measured with this engine, kernels may need workspaces besides.
"""
_SLACK = (0.05, 0.2, 0.3)
"""What torch reserves besides, as a part of what comes and goes: `stock.py` has the rows."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What must fit: a base, a method, its pairs, and what the config sets.

    `lengths` [n, 3] are those of all pairs. `tokens` and `checkpointing` are None if the run
    decides them. `step` is the number of tokens of the largest step. `untried`: no micro-batch is
    tried before the first step, so memory may run out in it. `learnt` is how many times as much
    memory as by the law micro-batches have taken in earlier runs on the device.
    """

    shape: Shape
    method: Method
    strategy: Strategy
    lengths: Indices
    step: int
    tokens: int | None
    checkpointing: bool | None
    with_rejected: bool = True
    scores_prompt: bool = False
    untried: bool = False
    learnt: float = 1.0

    @property
    def costs(self) -> PackCosts:
        """The tokens that pairs take in the layout."""
        return pack_costs(self.lengths, self.method.layout, with_rejected=self.with_rejected)

    @property
    def given(self) -> tuple[int, bool]:
        """Tokens of a micro-batch and checkpointing, where the run decides neither."""
        assert self.tokens is not None and self.checkpointing is not None
        return self.tokens, self.checkpointing

    def largest(self, tokens: int) -> int:
        """Tokens of the largest pack, if a micro-batch may have so many."""
        return max(int(self.costs.tokens.max()), min(tokens, self.step))

    def worst(self, tokens: int) -> MicroBatch:
        """The pack of that many tokens that takes the most memory."""
        return self.batch(sample_pack(self.costs, tokens))

    def batch(self, pairs: Indices) -> MicroBatch:
        """The micro-batch of some pairs."""
        return micro_batch(
            self.lengths[pairs],
            self.method.layout,
            with_rejected=self.with_rejected,
            score_prompt=self.scores_prompt,
            windows=self.shape.windows,
        )


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How a run fits into one GPU.

    `tokens` of a micro-batch is None if not even the longest pair fits, or not what is set; `parts`
    and `peak` are then those of that pack. `peak` is in bytes of the whole device. `missing` says
    how many bytes more the GPU must have; the run leaves some free. It is 0 if the run fits.
    """

    tokens: int | None
    method: Method
    parts: dict[str, float]
    peak: Interval
    missing: float
    is_uncertain: bool


def fit(request: Request, gpu: Gpu) -> Fit:
    """The micro-batch that the run takes on a GPU, and the memory for it."""
    found = {law: _budget(request, gpu, law) for law in _LAW}
    low, middle, high = (found[law] for law in _LAW)
    tokens, checkpointing = middle or (request.tokens or 0, request.checkpointing is not False)
    method = replace(request.method, checkpointing=checkpointing)
    size = request.largest(tokens)
    batch = request.worst(size)
    parts = _parts(request, method, batch, gpu)
    peak = _device(parts, _moving(parts), gpu, fits=middle is not None)
    # torch gives its free blocks back before memory runs out.
    beyond = total(parts) - peak.middle
    parts["slack"] = max(0.0, parts["slack"] - max(0.0, beyond))
    missing = 0.0
    if middle is None:
        missing = _missing(replace(request, checkpointing=checkpointing), gpu)
    return Fit(
        tokens=None if middle is None else tokens,
        method=method,
        parts=parts,
        peak=peak,
        missing=missing,
        is_uncertain=(low is None) != (high is None),
    )


def _budget(request: Request, gpu: Gpu, law: float) -> tuple[int, bool] | None:
    """Tokens of a micro-batch and checkpointing, if the law of memory is off by a factor."""
    if request.untried:
        return _given(request, gpu, law)
    longest = request.largest(0)
    most = max(longest, request.tokens or MOST_TOKENS)
    another = request.costs.of(sample_pack(request.costs, 2 * longest))
    room, measure = _room(request, _free(request, gpu)), _measure(request, law)
    found = find_budget(
        measure, room, Sizes(longest, another, request.step, most), request.checkpointing
    )
    if found is None:
        return None
    if request.tokens is None:
        return found.tokens, found.checkpointing
    checkpointing = with_set_tokens(found, request.largest(request.tokens), request.checkpointing)
    return _given(replace(request, checkpointing=checkpointing), gpu, law)


def _given(request: Request, gpu: Gpu, law: float) -> tuple[int, bool] | None:
    """The micro-batch that is set, or that a run takes untried, if the memory is enough for it."""
    return request.given if _needed(request, gpu, law) <= gpu.memory else None


def _free(request: Request, gpu: Gpu) -> int:
    """Bytes that the frozen weights and the trained ones leave, below 0 if they do not fit."""
    parts = held(request.shape, request.method)
    context = context_bytes(gpu.name, request.method.workers) + CUBLAS_WORKSPACE
    return gpu.memory - context - int(parts["weights"] + parts["adapter"])


def _room(request: Request, free: int) -> int:
    """Bytes that packs may take of the free ones, as the run counts them."""
    shape, method = request.shape, request.method
    trained = trained_numbers(shape, method)
    size = ModelSize(0, trained, state_bytes(shape, method, trained) / trained)
    return usable(max(0, free), size, method.workers, request.strategy)


def _missing(request: Request, gpu: Gpu) -> float:
    """How many bytes more the GPU must have for the run, whose `checkpointing` is decided."""
    missing = 0.0
    if request.tokens is not None:
        missing = _needed(request, gpu, 1.0) - gpu.memory
    if request.untried:
        return missing
    taken = _measure(request, 1.0)(request.largest(0), bool(request.checkpointing))
    nothing = _room(request, 0)  # below 0 by what is left for gradients and optimizer
    share = (_room(request, gpu.memory) - nothing) / gpu.memory
    return max(missing, (taken - nothing) / share - _free(request, gpu))


def _needed(request: Request, gpu: Gpu, law: float) -> float:
    """Bytes of the whole device for a micro-batch that is given."""
    tokens, checkpointing = request.given
    method = replace(request.method, checkpointing=checkpointing)
    parts = _parts(request, method, request.worst(request.largest(tokens)), gpu)
    return total(parts) - parts["slack"] + (law - 1) * _moving(parts)


def _measure(request: Request, law: float) -> Callable[[int, bool], int]:
    def measure(tokens: int, checkpointing: bool) -> int:
        method = replace(request.method, checkpointing=checkpointing)
        return int(law * _moving(_computed(request, method, request.worst(tokens))))

    return measure


def total(parts: dict[str, float]) -> float:
    """All parts together: the layer and the head never work at the same time."""
    return sum(parts.values()) - min(parts["layer"], parts["head"])


def _moving(parts: dict[str, float]) -> float:
    """Bytes that come and go with a micro-batch."""
    return parts["activations"] + max(parts["layer"], parts["head"])


def _computed(request: Request, method: Method, batch: MicroBatch) -> dict[str, float]:
    """Bytes that a micro-batch adds, after what earlier runs have shown."""
    work = computed(request.shape, method, batch)
    return {name: request.learnt * size for name, size in work.items()}


def _parts(request: Request, method: Method, batch: MicroBatch, gpu: Gpu) -> dict[str, float]:
    """Bytes by part; the larger of `layer` and `head` is part of the peak."""
    work = _computed(request, method, batch)
    return {
        **held(request.shape, method),
        **work,
        "workspace": float(CUBLAS_WORKSPACE),
        "slack": _SLACK[1] * _moving(work),
        "context": float(context_bytes(gpu.name, method.workers)),
    }


def _device(parts: dict[str, float], moving: float, gpu: Gpu, *, fits: bool) -> Interval:
    """Bytes of the whole device. torch gives its slack back before memory runs out."""
    fixed = total(parts) - moving - parts["slack"]
    ends = [fixed + (law + slack) * moving for law, slack in zip(_LAW, _SLACK, strict=True)]
    most = float(gpu.memory) if fits else float("inf")
    return Interval(*(min(end, most) for end in ends))
