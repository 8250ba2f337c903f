"""Kernels that a run depends on, tried on small tensors and compared with plain floats."""

from typing import Any

from orpo_ray.doctor.facts import Attention, Nf4

_HEAD = 128
"""The size of a head in most bases of 7 billion parameters."""
_ROWS, _IN, _OUT, _BLOCK = 32, 512, 256, 64


def try_attention() -> Attention:
    """The attention that packed rows take on this machine's first GPU, or on its CPU."""
    import torch

    from orpo_ray.training.attention_kernels import VARLEN, attention_path

    device, dtype = _place()
    path = attention_path(torch.device(device), dtype, 1, _HEAD)
    return Attention(path=path, is_flash=path == VARLEN, device=device, dtype=_name(dtype))


def try_nf4() -> Nf4:
    """A layer in NF4, forward and backward, compared with its own weights as 64-bit floats.

    The weights, the product and its sum are each rounded to the dtype, and the product is summed in
    float32: random rounding of n terms grows with the root of n. A kernel that is wrong is off by
    about 1. The rounding to four bits is at most half of the widest gap between two values of NF4
    (0.304, arXiv 2305.14314, appendix E) times the largest weight of the block. Double quantisation
    rounds that largest weight, too.
    """
    import torch
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit, Params4bit

    device, dtype = _place()
    generator = torch.Generator().manual_seed(0)
    weight, rows, gradient = (
        torch.randn(shape, generator=generator)
        for shape in ((_OUT, _IN), (_ROWS, _IN), (_ROWS, _OUT))
    )
    layer: Any = Linear4bit(_IN, _OUT, bias=False, compute_dtype=dtype, quant_type="nf4")
    layer.support_avx512bf16_for_cpu = False  # as models/base.py, which says why
    layer.weight = Params4bit(weight, requires_grad=False, quant_type="nf4")
    layer = layer.to(device)
    plain = dequantize_4bit(layer.weight.data, layer.weight.quant_state).double().cpu()
    inputs = rows.to(device, dtype).requires_grad_()
    output = layer(inputs)
    given = gradient.to(device, dtype)
    output.backward(given)
    assert inputs.grad is not None, "the backward pass has reached the inputs"
    root = float(_IN) ** 0.5
    largest = weight.view(-1, _BLOCK).abs().amax(1, keepdim=True)
    distance = (plain - weight.double()).view(-1, _BLOCK).abs() / largest
    return Nf4(
        device=device,
        dtype=_name(dtype),
        forward=_error(output, inputs.detach().double().cpu() @ plain.T),
        backward=_error(inputs.grad, given.double().cpu() @ plain),
        bound=4 * torch.finfo(dtype).eps + root * torch.finfo(torch.float32).eps,
        rounding=float(distance.max()),
        rounding_bound=0.304 / 2 + 0.05,
    )


def _place() -> tuple[str, Any]:
    """Device and dtype that a run with `dtype: auto` takes."""
    from orpo_ray.config.model import ModelConfig
    from orpo_ray.models.hardware import DTYPES, choose_numerics, probe_hardware

    hardware = probe_hardware()
    return hardware.device, DTYPES[choose_numerics(ModelConfig(base="any"), hardware).dtype]


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _error(found: Any, expected: Any) -> float:
    return float((found.detach().double().cpu() - expected).norm() / expected.norm())
