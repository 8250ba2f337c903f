"""How many bytes a run of our own engine takes on each worker, part by part.

What a layer keeps for its backward pass is counted tensor by tensor, as autograd's saved tensors of
a Llama with PEFT's LoRA show it, and a test measures the sums. `stock.py` has the law of other
engines.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from orpo_ray.config.optimizers import OPTIMIZERS
from orpo_ray.planner.layers import Layer, Linear
from orpo_ray.planner.shapes import Shape
from orpo_ray.planner.stock import FLOAT, HALF, NF4_DOUBLE
from orpo_ray.training.plan import Indices, Layout, longer_side

_WEIGHT_BYTES = {"nf4": NF4_DOUBLE.packed + NF4_DOUBLE.scales, "int8": 1.0}
LOGITS_PER_TILE = 2**24
"""Logits that exist at the same time, as `training/logprobs.py` has them."""
_GRADIENT = FLOAT


@dataclass(frozen=True, kw_only=True)
class Method:
    """How a run holds its weights, trains them, and computes.

    `rank` is that of LoRA, None if every weight is trained. `half` says whether it computes in 16
    bits, `flash` whether attention over a row is one kernel (flash varlen) or one call for each
    run of tokens. `workers` share the trained state by ZeRO's `stage`; None is no DeepSpeed.
    `optimizer` names one of OPTIMIZERS; `galore` is the rank to which GaLore projects the body.
    `full_logits` is the bytes that TRL's trainers hold for each logit; 0 is our own head.
    """

    quantization: str = "nf4"
    half: bool = True
    rank: int | None = 16
    targets: str | tuple[str, ...] = "all-linear"
    dora: bool = False
    dropout: float = 0.0
    checkpointing: bool = True
    on_gpu: bool = True
    flash: bool = True
    layout: Layout = Layout.SHARED_PREFIX
    workers: int = 1
    stage: int | None = None
    optimizer: str = "adamw"
    galore: int = 128
    full_logits: float = 0.0

    @property
    def number(self) -> int:
        """Bytes of a number that is computed."""
        return HALF if self.half else FLOAT

    @property
    def stream(self) -> int:
        """Bytes of a number that layers add to: float32 weights keep it in float32."""
        return HALF if self.half and self.rank is not None else FLOAT

    @property
    def converts_inputs(self) -> bool:
        """Whether each trained layer has its own converted copy of its input.

        PEFT converts it to the adapter's float32, but not for a quantised layer under CUDA's
        autocast. Without an adapter, autocast converts the input for float32 weights.
        """
        return self.half and not (
            self.rank is not None and self.quantization != "none" and self.on_gpu
        )


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """What memory and time depend on in a micro-batch.

    `tokens` are those of all rows, padding included. `scored` tokens reach the head. `repeated`
    counts the tokens of prompts that answers see beside their own row. `masked` counts the values
    of attention masks of one layer, `seen` the pairs of tokens of which one sees the other (the
    mean of the layers), and `scores` those of which attention in plain torch computes a score.
    """

    tokens: int
    scored: int
    repeated: int = 0
    masked: int = 0
    seen: int = 0
    scores: int = 0


def micro_batch(
    lengths: Indices,
    layout: Layout,
    *,
    with_rejected: bool = True,
    score_prompt: bool = False,
    windows: Sequence[int | None] = (None,),
) -> MicroBatch:
    """The micro-batch of pairs with (prompt, chosen, rejected) lengths [n, 3].

    `windows` says how many tokens each layer looks back, which only `seen` depends on.
    """
    prompt, chosen, rejected = lengths.T
    if not with_rejected:
        rejected = 0 * rejected
    scored = int((chosen + rejected).sum() + (prompt - 1).sum() * score_prompt)
    sides = 2 if with_rejected else 1
    first, second = prompt + chosen, (prompt + rejected) * (sides - 1)
    seen = _mean_seen(first, windows) + _mean_seen(second, windows)
    if layout.pads:
        width = int(longer_side(lengths).max() if with_rejected else first.max())
        tokens = sides * len(lengths) * width
        return MicroBatch(
            tokens=tokens,
            scored=scored,
            masked=tokens * width,
            seen=round(seen),
            scores=tokens * width,
        )
    if not with_rejected or not layout.shares_prompts:
        return MicroBatch(
            tokens=int((first + second).sum()),
            scored=scored,
            seen=round(seen),
            scores=int((first**2 + second**2).sum()),
        )
    of_rejected = int((rejected * (prompt + rejected)).sum())
    return MicroBatch(
        tokens=int((prompt + chosen + rejected).sum()),
        scored=scored,
        repeated=int(prompt.sum()),
        masked=of_rejected,
        seen=round(seen - _mean_seen(prompt, windows)),
        scores=int((first**2).sum()) + of_rejected,
    )


def _mean_seen(lengths: Indices, windows: Sequence[int | None]) -> float:
    """The pairs of tokens in causal texts [n] of which one sees the other, the mean of the layers.

    A text of n tokens has half a square of them, less those that are further apart than a window.
    """
    of_layers = sum(
        layers
        * (lengths**2 - (0 if window is None else np.maximum(lengths - window, 0) ** 2)).sum()
        for window, layers in Counter(windows).items()
    )
    return float(of_layers) / 2 / len(windows)


def trained_numbers(shape: Shape, method: Method) -> int:
    """How many numbers a run trains."""
    if method.rank is None:
        return shape.total
    return shape.lora(method.rank, method.targets, dora=method.dora)


def held(shape: Shape, method: Method) -> dict[str, float]:
    """Bytes on one worker of the weights, and of the trained state that ZeRO shares out."""
    trained, stage = trained_numbers(shape, method), method.stage or 0
    weights = 0.0
    if method.rank is not None:
        quantised = _WEIGHT_BYTES.get(method.quantization, float(method.number))
        weights = shape.linear * quantised + shape.others * method.number
    share = method.workers if stage == 3 else 1
    # Quantised weights cannot be divided: every worker holds the whole.
    of_weights = share if method.quantization == "none" else 1
    optimizer = state_bytes(shape, method, trained) / (method.workers if stage >= 1 else 1)
    gradients = _GRADIENT * trained / (method.workers if stage >= 2 else 1)
    buckets = _GRADIENT * trained if method.stage is None and method.workers > 1 else 0
    return {
        "weights": weights / of_weights,
        "adapter": FLOAT * trained / share,
        "gradients": gradients + buckets,
        "optimizer": optimizer,
    }


def state_bytes(shape: Shape, method: Method, trained: int) -> float:
    """Bytes of the optimizer's state on all workers together."""
    kind = OPTIMIZERS[method.optimizer]
    projected, state = 0, 0.0
    for layer in shape.body if kind.is_galore else ():
        for each in layer.linears:
            projected += each.weights
            state += each.copies * kind.projected_bytes(each.inputs, each.outputs, method.galore)
    embeddings = shape.head if method.rank is None else 0  # as large as the head
    return state + kind.whole_bytes(trained - projected, embeddings)


def computed(shape: Shape, method: Method, batch: MicroBatch) -> dict[str, float]:
    """Bytes that a micro-batch adds.

    `activations` is what layers keep, `layer` and `head` is the work in the largest layer and in
    the head, which never meet.
    """
    stream = shape.hidden * batch.tokens * method.stream
    kept = [_kept_by_layer(shape, method, batch, index) for index in _kinds(shape)]
    work = max(_work_in_layer(shape, method, batch, layer) for layer in _kinds(shape).values())
    if method.checkpointing:
        below = float(shape.layers * stream)
        work += max(kept) - (stream if method.stream == FLOAT else 0)
    else:
        counts = _count_kinds(shape)
        below = sum(each * count for each, count in zip(kept, counts, strict=True))
        if method.rank is None and method.half:
            below += HALF * (shape.linear + shape.head)  # autocast's copies of the weights
    head = _work_in_head(shape, method, batch) + 3 * stream  # before, in and after the last norm
    return {"activations": below, "layer": max(work, 0.0), "head": head}


def bytes_of_batch(shape: Shape, method: Method, batch: MicroBatch) -> float:
    """Bytes that a micro-batch takes at its worst moment."""
    parts = computed(shape, method, batch)
    return parts["activations"] + max(parts["layer"], parts["head"])


def _kinds(shape: Shape) -> dict[int, Layer]:
    """The different layers of a base, by the index of the first of each kind."""
    found: dict[tuple[Linear, ...], int] = {}
    for index, layer in enumerate(shape.body):
        found.setdefault(layer.linears, index)
    return {index: shape.body[index] for index in found.values()}


def _count_kinds(shape: Shape) -> list[int]:
    return [
        sum(layer.linears == kind.linears for layer in shape.body)
        for kind in _kinds(shape).values()
    ]


def _kept_by_layer(shape: Shape, method: Method, batch: MicroBatch, index: int) -> float:
    """Bytes that one layer keeps for its backward pass."""
    # A norm keeps its input in float32; if its weight is trained, what it multiplies as well.
    of_norm = FLOAT * (1 if method.rank else 2)
    linears = shape.body[index].linears
    return (
        of_norm * batch.tokens * shape.normed
        + _kept_by_mlp(linears, shape.hidden) * batch.tokens * method.number
        + _kept_by_trained(shape, method, batch.tokens, index)
        + _kept_by_attention(shape, method, batch)
    )


def _kept_by_mlp(linears: tuple[Linear, ...], hidden: int) -> float:
    """Numbers a token: the input of the activation and, with a gate, what it is multiplied by."""
    inner = _inner(linears)
    written = sum(
        each.outputs * each.active_copies
        for each in linears
        if each.inputs == hidden and each.outputs in (inner, 2 * inner) and "mlp" in each.name
    )
    experts = max(each.active_copies for each in linears)
    return written + (inner * experts if written > inner * experts else 0)


def _inner(linears: tuple[Linear, ...]) -> int:
    """The width inside of the MLP: the input size of its last matrix."""
    return linears[-1].inputs


def _kept_by_trained(shape: Shape, method: Method, tokens: int, index: int) -> float:
    """Inputs of the layers that are trained, and what LoRA computes in between."""
    layer = shape.body[index]
    trains_all = method.rank is None
    targeted = list(layer.linears) if trains_all else shape.adapted(index, method.targets)
    dropped = method.rank is not None and method.dropout > 0
    inputs: dict[str, int] = {}
    for each in targeted:
        shared = f"{each.name.partition('.')[0]} {each.inputs}"
        inputs[each.name if dropped or method.converts_inputs else shared] = (
            each.inputs * each.active_copies
        )
    count = sum(inputs.values()) * method.number
    if dropped:
        mask = 1 if method.on_gpu else FLOAT
        count += mask * sum(each.inputs * each.active_copies for each in targeted)
    between = (method.rank or 0) * sum(each.ranks > 0 for each in targeted) * method.number
    if method.dora:  # its magnitudes scale what the base and the adapter give, which both stay
        between += 2 * sum(each.outputs for each in targeted) * method.number
    return tokens * (count + between)


def _kept_by_attention(shape: Shape, method: Method, batch: MicroBatch) -> float:
    """Queries, keys, values and output of a layer's attention, and its masks."""
    tokens, number = batch.tokens, method.number
    queries, keys = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    sums = tokens * shape.heads * FLOAT
    if shape.caps_scores:
        return (3 * tokens * queries + 2 * tokens * keys) * number + _kept_scores(
            shape, method, batch
        )
    if method.layout.pads:
        return (4 * tokens * queries + batch.masked) * number + sums
    if method.flash and method.on_gpu:
        return (2 * tokens * queries + 2 * (tokens + batch.repeated) * keys) * number + sums
    shared = 4 * batch.repeated * keys + batch.masked
    return (3 * tokens * queries + 2 * tokens * keys + shared) * number + sums


def _kept_scores(shape: Shape, method: Method, batch: MicroBatch) -> float:
    """What plain torch keeps of capped scores: those bent, their softmax, and it as a factor."""
    of_score = 2 * FLOAT + (HALF if method.half else 0)
    return float(of_score * shape.heads * batch.scores)


def _work_in_layer(shape: Shape, method: Method, batch: MicroBatch, layer: Layer) -> float:
    """What the backward pass of a layer's last matrix takes besides what is kept."""
    of_inputs = 2 * method.number
    if method.rank is not None and method.converts_inputs:
        of_inputs = HALF + FLOAT + (FLOAT if method.dropout else 0)
    of_stream = HALF + HALF + FLOAT if method.half else FLOAT
    inner = _inner(layer.linears) * layer.linears[-1].active_copies
    work = float((inner * of_inputs + shape.hidden * of_stream) * batch.tokens)
    modules = [each.weights for each in layer.linears if each.is_module]
    if method.dora:
        work += 3 * max(modules) * FLOAT  # the adapted weights, for their norm
    if method.quantization != "none":
        work += max(modules) * method.number  # the weights, made numbers again
    elif method.stage == 3:
        work += shape.largest_layer * method.number  # gathered from the other workers
    return work


def _work_in_head(shape: Shape, method: Method, batch: MicroBatch) -> float:
    """Hidden states of scored tokens, their gradients, and the logits of one tile."""
    if method.full_logits:
        return method.full_logits * batch.tokens * shape.vocabulary
    rows = min(batch.scored, max(1, LOGITS_PER_TILE // shape.vocabulary))
    of_value, weight = FLOAT + HALF if method.half else FLOAT, 0
    if method.rank is None:
        # Autograd's own: logits, what it makes of them, and the gradients of both.
        of_value, weight = 4 * FLOAT, FLOAT * shape.head
    elif shape.caps_logits:
        of_value += FLOAT  # how far each is bent
    logits = rows * shape.vocabulary * of_value
    return float(2 * batch.scored * shape.hidden * method.number + logits + weight)
