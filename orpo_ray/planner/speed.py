"""How many tokens a second a GPU trains: the time of a micro-batch, part by part, as an interval.

Matrix products go at the rate that the GPU sustains, all work between them (norms, activations,
adapters' sums) at the rate of its memory, and so does dequantisation. If the micro-batch has few
tokens, Python cannot start kernels as fast as the GPU runs them. Utilisation is a result: it falls
with fewer tokens, a smaller base, quantised weights and a float32 stream.
"""

from dataclasses import dataclass

from orpo_ray.planner.hardware import Gpu
from orpo_ray.planner.stock import FLOAT, HALF, Training

# What large matrix products reach in 16 bits, in flops a second. A maker's figure does not tell: it
# is for a clock that the power limit does not allow (T4, RTX 6000 Ada), or it is half of what the
# chip can do (L40, RTX 4090). Fitted once for each GPU on published rows of several bases, methods
# and lengths: fms and Qwen (A100), fms (L40), fsdp_qlora (RTX 4090, RTX 3090), fitcheck (T4).
_SUSTAINED = {
    "a100": 220e12,
    "l40": 230e12,
    "rtx4090": 163e12,
    "rtx3090": 46e12,
    "t4": 18.4e12,
}
# fsdp_qlora has one to three rows each of these, all of one base.
_SUSTAINED_ONCE = {"h100": 460e12, "rtx6000ada": 117e12, "rtxa5000": 74e12}
# Of a GPU that nobody measured: those above reach 0.3 to 1.3 of their makers' figures.
_USUAL_SHARE = 0.6
# An interval goes this factor up and down from its middle: what rows of one GPU scatter by.
_SPREAD, _SPREAD_ONCE, _SPREAD_UNKNOWN = 1.2, 1.35, 1.7
# FlashAttention's and SDPA's kernels reach less than large products do (FlashAttention-2,
# arXiv 2307.08691: 0.5 to 0.7 of the peak forward, less backward).
_ATTENTION_SHARE = 0.6
_BANDWIDTH_SHARE = 0.8
# Bytes that the kernels between matrix products read and write in one pass of a layer, for each
# hidden number and each number of the MLP of a token. Two norms of seven kernels each, rotary
# positions, two residual sums, and LoRA's scaling and sum on the projections; silu and product. A
# float32 stream doubles them, and converts before and after each 16-bit layer.
TRAFFIC = {HALF: (150, 10), FLOAT: (260, 38)}
# Mask, softmax, its 16-bit copy and their gradients: 20 bytes a score. The loss: 40 a logit.
_SCORE_TRAFFIC, LOGIT_TRAFFIC = 20, 40
# Dequantisation reads half a byte and writes two. bitsandbytes' kernel and its two levels of scales
# reach a fifth of the bandwidth, GPTQ's a tenth.
DEQUANTISED_BYTES = 2.5
DEQUANTISATION_SHARE = {"bitsandbytes": 0.19, "gptq": 0.11, "torch": 1.0}
# Python, PEFT and the CUDA launches of one pass of one layer. Qwen's README has 0.12 s for 24
# layers and four passes where the GPU has next to nothing to do.
_LAUNCH_SECONDS = 1.6e-3
# FSDP waits for a layer's weights: part of a link's rate, at most this. The rows scatter from all
# hidden behind computing (fms, GPTQ on L40) to twice as long and more (fsdp_qlora, RTX 3090).
_LINK_SHARE, _MOST_GATHERED, _GATHER_SPREAD = 0.7, 62e9, 2.0


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one GPU does for one micro-batch.

    `half_flops` are those of matrix products in 16 bits, `float_flops` those in float32. `traffic`
    is in bytes of memory, `dequantised` too; `dequantisation` is the share of the bandwidth that
    its kernel reaches. `launches` counts passes of layers. `gathered` is in bytes over the link.
    """

    tokens: int
    half_flops: float
    float_flops: float
    attention_flops: float
    traffic: float
    dequantised: float
    dequantisation: float
    launches: int
    gathered: float


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Tokens a second of one GPU, as an interval with its reason.

    `seconds` has the parts of a micro-batch; where `launch` is more than all that the GPU computes,
    the GPU waits. `is_uncertain`: nobody has measured the GPU.
    """

    low: float
    middle: float
    high: float
    seconds: dict[str, float]
    reason: str
    is_uncertain: bool


def count_work(training: Training) -> Work:
    """What a stock engine computes and moves for one micro-batch."""
    base, tokens = training.base, training.tokens
    passes = 4 if training.checkpointing else 3
    head, adapters = 4 * base.head * tokens, _adapter_flops(training, passes)
    body = (2 * (passes - 1) * base.active + _weight_gradients(training)) * tokens
    # Without autocast, float32 weights are multiplied in float32.
    floats = 0.0 if training.autocast else _float_flops(training, head, adapters)
    return Work(
        tokens=tokens,
        half_flops=body + head + adapters - floats,
        float_flops=floats,
        attention_flops=_attention_flops(training),
        traffic=_traffic(training, passes),
        dequantised=_dequantised(training, passes),
        dequantisation=DEQUANTISATION_SHARE[training.weights.kind],
        launches=passes * base.layers,
        gathered=_gathered(training, passes),
    )


def predict_speed(work: Work, gpu: Gpu, link_rate: float) -> Speed:
    """The throughput of a GPU, whose link to the other GPUs has `link_rate` bytes a second."""
    rate, spread, reason = _sustained(gpu)
    if work.gathered:
        reason += f"; gathering may hide behind computing, or take {_GATHER_SPREAD:g} times as long"
    share = min(rate / gpu.half_flops, 0.9)
    bandwidth = gpu.bandwidth
    seconds = {
        "matrices": work.half_flops / rate + work.float_flops / (gpu.float_flops * share),
        "attention": work.attention_flops / (rate * _ATTENTION_SHARE),
        "between": work.traffic / (bandwidth * _BANDWIDTH_SHARE),
        "dequantisation": work.dequantised / (bandwidth * work.dequantisation),
        "launch": work.launches * _LAUNCH_SECONDS,
        "gather": work.gathered / min(link_rate * _LINK_SHARE, _MOST_GATHERED),
    }
    computing = sum(seconds[part] for part in ("matrices", "attention", "between"))
    busy = max(computing + seconds["dequantisation"], seconds["launch"])
    return Speed(
        low=work.tokens / (spread * busy + _GATHER_SPREAD * seconds["gather"]),
        middle=work.tokens / (busy + seconds["gather"]),
        high=work.tokens / (busy / spread),
        seconds=seconds,
        reason=reason,
        is_uncertain=spread == _SPREAD_UNKNOWN,
    )


def _sustained(gpu: Gpu) -> tuple[float, float, str]:
    """Flops a second of large products in 16 bits, the factor of the interval, and the reason."""
    for known, spread, often in (
        (_SUSTAINED, _SPREAD, "published rows of this GPU"),
        (_SUSTAINED_ONCE, _SPREAD_ONCE, "very few published rows of this GPU"),
    ):
        for name, rate in known.items():
            if gpu.name == name or gpu.name.startswith(f"{name}-"):
                return rate, spread, f"{often} scatter by a factor of {spread} either way"
    share = f"{_USUAL_SHARE:.0%} of its maker's figure"
    return (
        _USUAL_SHARE * gpu.half_flops,
        _SPREAD_UNKNOWN,
        f"uncertain: nobody has published a measurement of this GPU; taken as {share}",
    )


def _weight_gradients(training: Training) -> float:
    """Flops a token for the gradients of all weights, where no adapter takes their place."""
    return 0.0 if training.rank else 2 * (training.base.active + training.base.head)


def _adapter_flops(training: Training, passes: int) -> float:
    """Each pass of an adapter is a product; the backward pass has two."""
    base = training.base
    if not training.rank:
        return 0.0
    widths = sum((m.inputs + m.outputs) * m.active for m in base.targeted(training.targets))
    return 2.0 * passes * training.rank * widths * base.layers * training.tokens


def _float_flops(training: Training, head: float, adapters: float) -> float:
    floats = head if training.stream == FLOAT else 0.0
    return floats + (adapters if training.trained_bytes == FLOAT else 0.0)


def _attention_flops(training: Training) -> float:
    """Scores and their product with the values, for tokens before: half of them, but in eager
    attention. The backward pass of fused kernels is 2.5 of a forward pass.
    """
    base = training.base
    forward = 2.0 * training.sequence * base.heads * base.head_size * base.layers
    times = 3.5 + (1 if training.checkpointing else 0)
    return forward * times * training.tokens * (2 if training.attention == "eager" else 1)


def _traffic(training: Training, passes: int) -> float:
    """Bytes that kernels between matrix products read and write."""
    base = training.base
    hidden, inner = TRAFFIC[training.stream]
    width = hidden * base.hidden + inner * base.intermediate * base.active_experts
    traffic = passes * base.layers * training.tokens * width
    traffic += LOGIT_TRAFFIC * training.tokens * base.vocabulary
    if training.attention == "eager":
        scores = training.batch * base.heads * training.sequence**2
        traffic += passes * base.layers * scores * _SCORE_TRAFFIC
    return float(traffic)


def _dequantised(training: Training, passes: int) -> float:
    """Bytes for making 16 bits of all weights: in each pass, and once in the backward pass."""
    if not training.weights.is_quantised:
        return 0.0
    return (passes - 1) * training.base.linear * DEQUANTISED_BYTES


def _gathered(training: Training, passes: int) -> float:
    """Bytes of weights that come from other GPUs."""
    if not training.sharded:
        return 0.0
    others = (training.gpus - 1) / training.gpus
    return (passes - 1) * training.weights.packed * training.base.linear * others
