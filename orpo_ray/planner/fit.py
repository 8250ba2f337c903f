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
    bytes_of_batch,
    computed,
    held,
    micro_batch,
    state_bytes,
    trained_numbers,
)
from orpo_ray.planner.shapes import Shape
from orpo_ray.planner.stock import CUBLAS_WORKSPACE, context_bytes
from orpo_ray.training.budget import Sizes, find_budget, sample_pack, usable
from orpo_ray.training.plan import Indices, PackCosts, pack_costs
from orpo_ray.training.strategy import ModelSize, Strategy

MOST_TOKENS = {"cpu": 8192, "cuda": 65536}
"""The largest micro-batch that `auto` takes (training/probe.py; a test compares both)."""
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
    tried before the first step, so memory may run out in it.
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

    @property
    def costs(self) -> PackCosts:
        """The tokens that pairs take in the layout."""
        return pack_costs(self.lengths, self.method.layout, with_rejected=self.with_rejected)

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
        )


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How a run fits into one GPU.

    `tokens` of a micro-batch is None if not even the longest pair fits; `parts` and `peak` are then
    those of that pair. `peak` is in bytes of the whole device. `missing` is in bytes, 0 if it fits.
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
    longest = int(request.costs.tokens.max())
    tokens, checkpointing = middle or (
        request.tokens or longest,
        request.checkpointing is not False,
    )
    method = replace(request.method, checkpointing=checkpointing)
    batch = request.worst(max(longest, min(tokens, request.step)))
    parts = _parts(request.shape, method, batch, gpu)
    peak = _device(parts, computed(request.shape, method, batch), gpu, fits=middle is not None)
    return Fit(
        tokens=None if middle is None else tokens,
        method=method,
        parts=parts,
        peak=peak,
        missing=0.0 if middle else max(0.0, peak.middle - gpu.memory),
        is_uncertain=(low is None) != (high is None),
    )


def _budget(request: Request, gpu: Gpu, law: float) -> tuple[int, bool] | None:
    """Tokens of a micro-batch and checkpointing, if the law of memory is off by a factor."""
    shape, method = request.shape, request.method
    longest = int(request.costs.tokens.max())
    if request.untried:
        return _given(request, gpu, law)
    device = "cuda" if method.on_gpu else "cpu"
    most = max(longest, request.tokens or MOST_TOKENS[device])
    parts = held(shape, method)
    free = gpu.memory - context_bytes(gpu.name, method.workers) - CUBLAS_WORKSPACE
    free -= int(parts["weights"] + parts["adapter"])
    trained = trained_numbers(shape, method)
    size = ModelSize(0, trained, state_bytes(shape, method, trained) / trained)
    room = usable(max(0, free), size, method.workers, request.strategy)
    another = request.costs.of(sample_pack(request.costs, 2 * longest))
    found = find_budget(
        _measure(request, law),
        room,
        Sizes(longest, another, request.step, most),
        request.checkpointing,
    )
    if found is None:
        return None
    if request.tokens is None:
        return found.tokens, found.checkpointing
    return _given(replace(request, checkpointing=found.checkpointing), gpu, law)


def _given(request: Request, gpu: Gpu, law: float) -> tuple[int, bool] | None:
    """The micro-batch that is set, or that a run takes untried, if the memory is enough for it."""
    assert request.tokens is not None and request.checkpointing is not None
    method = replace(request.method, checkpointing=request.checkpointing)
    largest = max(int(request.costs.tokens.max()), min(request.tokens, request.step))
    parts = _parts(request.shape, method, request.worst(largest), gpu)
    moving = parts["activations"] + max(parts["layer"], parts["head"])
    fixed = sum(parts.values()) - parts["activations"] - parts["layer"] - parts["head"]
    needed = fixed - parts["slack"] + law * moving
    return (request.tokens, request.checkpointing) if needed <= gpu.memory else None


def _measure(request: Request, law: float) -> Callable[[int, bool], int | None]:
    def measure(tokens: int, checkpointing: bool) -> int | None:
        method = replace(request.method, checkpointing=checkpointing)
        taken = bytes_of_batch(request.shape, method, request.worst(tokens))
        return int(law * taken)

    return measure


def _parts(shape: Shape, method: Method, batch: MicroBatch, gpu: Gpu) -> dict[str, float]:
    """Bytes by part; the larger of `layer` and `head` is part of the peak."""
    work = computed(shape, method, batch)
    return {
        **held(shape, method),
        **work,
        "workspace": float(CUBLAS_WORKSPACE),
        "slack": _SLACK[1] * (work["activations"] + max(work["layer"], work["head"])),
        "context": float(context_bytes(gpu.name, method.workers)),
    }


def _device(parts: dict[str, float], work: dict[str, float], gpu: Gpu, *, fits: bool) -> Interval:
    """Bytes of the whole device. torch gives its slack back before memory runs out."""
    moving = work["activations"] + max(work["layer"], work["head"])
    fixed = sum(parts.values()) - sum(work.values()) - parts["slack"]
    ends = [fixed + (law + slack) * moving for law, slack in zip(_LAW, _SLACK, strict=True)]
    most = float(gpu.memory) if fits else float("inf")
    return Interval(*(min(end, most) for end in ends))
