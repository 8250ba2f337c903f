"""How many bytes a run of our own engine takes on each worker, part by part.

What a layer keeps for its backward pass is counted tensor by tensor, as autograd does for a Llama
with PEFT's LoRA: each count below was read from autograd's saved tensors, and a test measures the
sums. `stock.py` has the law of other engines.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from orpo_ray.planner.shapes import Shape
from orpo_ray.training.plan import Indices, Layout, longer_side

FLOAT, HALF = 4, 2
"""Bytes of a number in float32, and in bfloat16 or float16."""

_NF4 = 0.5 + 1 / 64 + FLOAT / (64 * 256)
"""bitsandbytes: half a byte, an 8-bit scale for 64 numbers, a float32 scale for 256 of those."""

_WEIGHT_BYTES = {"nf4": _NF4, "int8": 1.0}
_MOMENTS = 2 * FLOAT
_LOGITS_PER_CHUNK = 2**24
"""The head's logits of one chunk, as `training/logprobs.py` has them; a test compares both."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """How a run holds its weights, trains them, and computes.

    `rank` is that of LoRA, None if every weight is trained. `half` says whether it computes in 16
    bits, `flash` whether attention over a row is one kernel (flash varlen) or one call for each
    run of tokens. `spread` is the number of workers that share the trained state, by ZeRO stage.
    """

    quantization: str = "nf4"
    half: bool = True
    rank: int | None = 16
    targets: str | tuple[str, ...] = "all-linear"
    dropout: float = 0.0
    checkpointing: bool = True
    on_gpu: bool = True
    flash: bool = True
    layout: Layout = Layout.SHARED_PREFIX

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
    """What memory depends on in a micro-batch.

    `tokens` are those of all rows, padding included. `scored` tokens reach the head. `repeated`
    counts the tokens of prompts that an answer sees beside its own row. `masked` counts the values
    of attention masks of one layer.
    """

    tokens: int
    scored: int
    repeated: int = 0
    masked: int = 0


def micro_batch(
    lengths: Indices, layout: Layout, *, with_rejected: bool = True, score_prompt: bool = False
) -> MicroBatch:
    """The micro-batch of pairs with (prompt, chosen, rejected) lengths [n, 3]."""
    prompt, chosen, rejected = lengths.T
    answers = chosen + (rejected if with_rejected else 0)
    scored = int(answers.sum() + (prompt - 1).sum() * score_prompt)
    if layout.pads:
        width = int(longer_side(lengths).max() if with_rejected else (prompt + chosen).max())
        tokens = len(lengths) * width * (2 if with_rejected else 1)
        return MicroBatch(tokens=tokens, scored=scored, masked=tokens * width)
    if not with_rejected or not layout.shares_prompts:
        sides = 2 if with_rejected else 1
        return MicroBatch(tokens=int((sides * prompt).sum() + answers.sum()), scored=scored)
    return MicroBatch(
        tokens=int((prompt + answers).sum()),
        scored=scored,
        repeated=int(prompt.sum()),
        masked=int((rejected * (prompt + rejected)).sum()),
    )


def held(shape: Shape, method: Method) -> dict[str, float]:
    """Bytes of the weights, and of what is trained with its gradients and optimizer state."""
    number = method.number
    if method.rank is None:
        trained, weights = shape.total, 0.0
    else:
        trained = shape.lora(method.rank, method.targets)
        quantised = _WEIGHT_BYTES.get(method.quantization, float(number))
        weights = shape.linear * quantised + shape.others * number
    return {
        "weights": weights,
        "trained": float(FLOAT * trained),
        "gradients": float(FLOAT * trained),
        "optimizer": float(_MOMENTS * trained),
    }


def computed(shape: Shape, method: Method, batch: MicroBatch) -> dict[str, float]:
    """Bytes that a micro-batch adds: what layers keep, the work in one layer, and the head."""
    kept = kept_by_layer(shape, method, batch)
    stream = shape.hidden * batch.tokens * method.stream
    layer = _work_in_layer(shape, method, batch)
    if method.checkpointing:
        below = shape.layers * stream
        layer += kept - (stream if method.stream == FLOAT else 0.0)
    else:
        below = shape.layers * kept
    head = _work_in_head(shape, method, batch) + 3 * stream  # before, in and after the last norm
    copies = 0
    if method.rank is None and method.half and not method.checkpointing:
        copies = HALF * (shape.linear + shape.head)  # autocast's, kept for the backward pass
    return {"activations": below + copies, "layer": max(layer, 0.0), "head": head}


def peak(shape: Shape, method: Method, batch: MicroBatch) -> float:
    """Bytes of tensors at the worst moment of a step."""
    parts = computed(shape, method, batch)
    work = parts["activations"] + max(parts["layer"], parts["head"])
    return sum(held(shape, method).values()) + work


def kept_by_layer(shape: Shape, method: Method, batch: MicroBatch) -> float:
    """Bytes that one layer keeps for its backward pass."""
    tokens, number = batch.tokens, method.number
    inner, queries = shape.intermediate, shape.heads * shape.head_size
    # A norm keeps its input in float32; if its weight is trained, what it multiplies as well.
    of_norm = FLOAT * (1 if method.rank else 2)
    norms = 2 * tokens * (of_norm * shape.hidden + FLOAT)
    gated = 3 * tokens * inner * number  # the gate, its activation, and what it multiplies
    return norms + gated + _kept_by_adapters(shape, method, tokens) + _kept_by_attention(
        method, batch, queries, shape.kv_heads * shape.head_size, shape.heads
    )


def _kept_by_adapters(shape: Shape, method: Method, tokens: int) -> float:
    """Inputs of the layers that are trained, and what LoRA computes in between."""
    if method.rank is None:
        targeted = shape.linears
    else:
        targeted = shape.targeted(method.targets)
    dropped = method.rank is not None and method.dropout > 0
    own = dropped or method.converts_inputs
    inputs: Mapping[str, int] = {
        each.name if own else f"{each.name.partition('.')[0]} {each.inputs}": each.inputs
        for each in targeted
    }
    count = sum(inputs.values()) * method.number
    if dropped:
        count += sum(each.inputs for each in targeted) * (1 if method.on_gpu else FLOAT)
    between = (method.rank or 0) * len(targeted) * method.number
    return tokens * (count + between)


def _kept_by_attention(
    method: Method, batch: MicroBatch, queries: int, keys: int, heads: int
) -> float:
    """Queries, keys, values and output of a layer's attention, and its masks."""
    tokens, number = batch.tokens, method.number
    sums = tokens * heads * FLOAT
    if method.layout.pads:
        return (4 * tokens * queries + batch.masked) * number + sums
    if method.flash and method.on_gpu:
        return (2 * tokens * queries + 2 * (tokens + batch.repeated) * keys) * number + sums
    shared = 2 * (batch.repeated * 2) * keys + batch.masked
    return (3 * tokens * queries + 2 * tokens * keys + shared) * number + sums


def _work_in_layer(shape: Shape, method: Method, batch: MicroBatch) -> float:
    """What the backward pass of the last linear layer of a block takes besides what is kept."""
    of_inputs = 2 * method.number
    if method.converts_inputs:
        of_inputs = HALF + FLOAT + (FLOAT if method.dropout else 0)
    of_stream = HALF + HALF + FLOAT if method.half else FLOAT
    gradients = (shape.intermediate * of_inputs + shape.hidden * of_stream) * batch.tokens
    largest = max(each.weights for each in shape.linears)
    unpacked = largest * method.number if method.quantization != "none" else 0
    return gradients + unpacked


def _work_in_head(shape: Shape, method: Method, batch: MicroBatch) -> float:
    """Hidden states of scored tokens, their gradients, and the logits of one chunk."""
    rows = min(batch.scored, max(1, _LOGITS_PER_CHUNK // shape.vocabulary))
    of_value = FLOAT + HALF if method.half else FLOAT
    weight = 0
    if method.rank is None:
        of_value = 4 * FLOAT  # autograd's own: logits, their log-probs' parts and gradients
        weight = FLOAT * shape.head
    logits = rows * shape.vocabulary * of_value
    return 2 * batch.scored * shape.hidden * method.number + logits + weight
