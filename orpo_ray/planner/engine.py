"""What our own engine computes for a micro-batch, and how long a GPU takes for it.

`speed.py` has the law of time. Here are our counts: each prompt once, no padding, and a head that
sees the scored tokens only.
"""

from dataclasses import replace
from functools import cached_property

from orpo_ray.planner.hardware import Gpu
from orpo_ray.planner.interval import Interval
from orpo_ray.planner.memory import Method, MicroBatch, trained_numbers
from orpo_ray.planner.shapes import Shape
from orpo_ray.planner.speed import (
    DEQUANTISATION_SHARE,
    DEQUANTISED_BYTES,
    LOGIT_TRAFFIC,
    TRAFFIC,
    Work,
    predict_speed,
)

_NO_LINK = 1e12
"""Bytes a second of a link that nothing is gathered over; `network.py` counts what is."""
_BACKWARD_OF_ATTENTION = 2.5
"""FlashAttention-2, arXiv:2307.08691: five products in place of two."""
_OPTIMIZER_BYTES = 28
"""AdamW reads weight, gradient and two moments of a number, and writes all but the gradient."""


class Engine:
    """A base and a method, with the counts that every micro-batch needs."""

    def __init__(self, shape: Shape, method: Method) -> None:
        self.shape, self.method = shape, method

    def seconds(self, batch: MicroBatch, gpu: Gpu, *, training: bool = True) -> Interval:
        """How long one GPU takes for a micro-batch; without `training`, for its forward pass."""
        speed = predict_speed(self.work(batch, training=training), gpu, _NO_LINK)
        return Interval(speed.low, speed.middle, speed.high).under(batch.tokens)

    def step_seconds(self, gpu: Gpu) -> float:
        """How long the optimizer's step takes: the memory's rate decides."""
        shared = self.method.workers if (self.method.stage or 0) >= 1 else 1
        return _OPTIMIZER_BYTES * self._trained / shared / gpu.bandwidth

    def reason(self, gpu: Gpu) -> tuple[str, bool]:
        """Why the time is an interval, and whether the GPU was never measured."""
        batch = MicroBatch(tokens=1024, scored=512, seen=2**19)
        speed = predict_speed(self.work(batch), gpu, _NO_LINK)
        return speed.reason, speed.is_uncertain

    def needed_flops(self, batch: MicroBatch) -> float:
        """Operations of a training pass, without those that are done again in its backward pass.

        Seconds at the peak, as a share of those taken, are the MFU (arXiv:2204.02311).
        """
        once = Engine(self.shape, replace(self.method, checkpointing=False)).work(batch)
        attention = once.attention_flops * 3 / (1 + _BACKWARD_OF_ATTENTION)
        return once.half_flops + once.float_flops + attention

    def work(self, batch: MicroBatch, *, training: bool = True) -> Work:
        """What a GPU computes and moves for a micro-batch."""
        method, tokens = self.method, batch.tokens
        again = training and method.checkpointing
        trains_all = method.rank is None
        products = 1 + training + again
        body = 2.0 * (products + (training and trains_all)) * self._active * tokens
        passes = 1 + 2 * training + again
        adapters = 2.0 * passes * self._adapter * tokens
        head = 2.0 * self._head_products(training) * self.shape.head * batch.scored
        flops = body + adapters + head
        scores = 4.0 * self.shape.heads * self.shape.head_size * self.shape.layers * batch.seen
        attention = scores * (1 + again + _BACKWARD_OF_ATTENTION * training)
        quantised = method.quantization != "none"
        return Work(
            tokens=tokens,
            half_flops=flops if method.half else 0.0,
            float_flops=0.0 if method.half else flops,
            attention_flops=attention,
            traffic=self._traffic(batch, passes),
            dequantised=products * self._linear * DEQUANTISED_BYTES if quantised else 0.0,
            dequantisation=DEQUANTISATION_SHARE["bitsandbytes" if quantised else "torch"],
            launches=passes * self.shape.layers,
            gathered=0.0,
        )

    def _head_products(self, training: bool) -> int:
        """A frozen head has two products of logits; a trained one also makes its logits again."""
        if not training:
            return 1
        return 2 if self.method.rank is not None else 4

    def _traffic(self, batch: MicroBatch, passes: int) -> float:
        """Bytes that kernels between matrix products read and write."""
        hidden, inner = TRAFFIC[self.method.stream]
        experts = max(1, self.shape.active_experts)
        width = hidden * self.shape.hidden + inner * self.shape.intermediate * experts
        layers = passes * self.shape.layers * batch.tokens * width
        return float(layers + LOGIT_TRAFFIC * batch.scored * self.shape.vocabulary)

    @cached_property
    def _active(self) -> int:
        return self.shape.active

    @cached_property
    def _linear(self) -> int:
        return self.shape.linear

    @cached_property
    def _trained(self) -> int:
        return trained_numbers(self.shape, self.method)

    @cached_property
    def _adapter(self) -> int:
        return 0 if self.method.rank is None else self._trained
