"""The kernels that a step is made of, each alone: attention over runs of tokens, and NF4 layers."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from orpo_ray.bench.measure import ratio_of, time_in_turns
from orpo_ray.bench.models import in_nf4, number_format
from orpo_ray.bench.pairs import Shape
from orpo_ray.bench.step import describe, refuse_device
from orpo_ray.runs.console import Announce
from orpo_ray.training.attention import attend
from orpo_ray.training.attention_kernels import SDPA, VARLEN, Scores, find_varlen, per_run
from orpo_ray.training.runs import Reach, Runs

_HEAD_SIZE = 128
_GROUP = 4
"""Query heads that share a key head, as in Llama 3 8B and Mistral 7B."""
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class KernelCase:
    """Pairs of a shape in one row, for layers as wide as `hidden`."""

    shape: Shape
    pairs: int
    hidden: int
    window: int
    device: str


def bench_kernels(case: KernelCase, turns: int, announce: Announce) -> dict[str, Any]:
    """Forward and backward passes of each kernel, timed in turns with what it stands for.

    `ratio` is padded rows / our kernel for attention, and a 16-bit layer / NF4 for a layer (on a
    CPU: float32). Differences are relative norms.
    """
    refuse_device(case.device)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    for window in (None, case.window):
        announce(f"attention, {_called(window)}: {turns} turns")
        rows.append(_attention(case, window, turns))
    announce(f"a layer in NF4: {turns} turns")
    rows.append(_nf4(case, turns))
    return {"name": "kernels", "rows": rows, "turns": turns, **describe(case.device)}


def _attention(case: KernelCase, window: int | None, turns: int) -> dict[str, Any]:
    """Our attention over one row, and transformers' over padded rows of the same pairs."""
    runs, index = _places(case)
    device, dtype = torch.device(case.device), number_format(case.device)
    runs, index = runs.to(device), index.to(device)
    heads = max(_GROUP, case.hidden // _HEAD_SIZE)
    total = sum(runs.lengths)
    row = [
        torch.randn(1, count, total, _HEAD_SIZE, device=device, dtype=dtype, requires_grad=True)
        for count in (heads, heads // _GROUP, heads // _GROUP)
    ]
    padded = [states[0][:, index].transpose(0, 1).detach().requires_grad_() for states in row]
    scores = Scores(_HEAD_SIZE**-0.5, Reach(window))

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(nn.Identity(), q, k, v, None, runs=runs, sliding_window=window)[0]

    def by_run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return per_run(q, k, v, runs, scores).transpose(1, 2)

    def stock(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _padded_rows(q, k, v, window)

    sides = {"padded": (stock, padded), "per_run": (by_run, row), "ours": (ours, row)}
    taken = time_in_turns([_pass(*side) for side in sides.values()], turns, case.device)
    found = dict(zip(sides, taken, strict=True))
    varlen = find_varlen(device, dtype, _GROUP, _HEAD_SIZE, window is not None)
    output, gradient = _difference(ours, stock, row, index)
    return {
        "what": f"attention, {_called(window)}",
        "path": VARLEN if varlen else SDPA,
        "seconds": {side: statistics.median(seconds) for side, seconds in found.items()},
        "ratio": ratio_of(found["padded"], found["ours"]),
        "output_difference": output,
        "gradient_difference": gradient,
    }


def _called(window: int | None) -> str:
    return "no window" if window is None else f"window {window}"


def _places(case: KernelCase) -> tuple[Runs, Tensor]:
    """The runs of a row of pairs, and where each token of the padded rows stands in it.

    The second is [2 * pairs, longest]; what pads a row is any later token.
    """
    prompt, *answers = case.shape
    longest = prompt + max(answers)
    runs: list[tuple[int, int]] = []
    rows: list[Tensor] = []
    for pair in range(case.pairs):
        begin = pair * sum(case.shape)
        runs += [(prompt + answers[0], 0), (answers[1], prompt)]
        for start, length in zip((prompt, prompt + answers[0]), answers, strict=True):
            places = torch.cat([torch.arange(prompt), torch.arange(start, start + length)])
            rows.append(begin + nn.functional.pad(places, (0, longest - len(places))))
    return Runs.of(runs), torch.stack(rows)


def _padded_rows(query: Tensor, key: Tensor, value: Tensor, window: int | None) -> Tensor:
    """What transformers computes with sdpa for padded rows, [rows, T, heads, D]."""
    mask, width = None, query.shape[2]
    if window is not None:
        mask = torch.ones(width, width, dtype=torch.bool, device=query.device)
        mask = mask.tril().triu(1 - window)[None, None].expand(len(query), 1, width, width)
    layer: Any = nn.Module()
    layer.num_key_value_groups, layer.is_causal = _GROUP, True
    return sdpa_attention_forward(layer, query, key, value, mask, is_causal=mask is None)[0]


def _pass(attention: Attention, states: list[Tensor]) -> Callable[[], None]:
    def run() -> None:
        output = attention(*states)
        torch.autograd.grad(output, states, torch.ones_like(output))

    return run


def _difference(
    ours: Attention, stock: Attention, row: list[Tensor], index: Tensor
) -> tuple[float, float]:
    """How far our output and gradients are from those of the padded rows, in their format."""
    found = ours(*row)[0]
    theirs = stock(*(states[0][:, index].transpose(0, 1) for states in row))
    total = found.shape[0]
    # A prompt stands in two padded rows, and here in one: its chosen row is compared.
    first = torch.full((total,), index.numel(), device=index.device)
    order = torch.arange(index.numel(), device=index.device)
    first.scatter_reduce_(0, index.flatten(), order, "amin")
    expected = theirs.flatten(0, 1)[first]
    weight = torch.randn_like(found)
    mine = torch.autograd.grad(found, row, weight)
    other = torch.autograd.grad(expected, row, weight)
    return _relative([found], [expected]), _relative(mine, other)


def _relative(found: Any, expected: Any) -> float:
    one, other = (
        torch.cat([each.float().flatten() for each in some]) for some in (found, expected)
    )
    return float((one - other).norm() / other.norm())


def _nf4(case: KernelCase, turns: int) -> dict[str, Any]:
    """A layer in NF4, and one whose weights are the same numbers in the computing format."""
    dtype = number_format(case.device)
    wide = nn.Linear(case.hidden, 3 * case.hidden, bias=False, dtype=dtype)
    quantised = in_nf4(wide, case.device).requires_grad_(False)
    plain = nn.Linear(case.hidden, 3 * case.hidden, bias=False, device=case.device, dtype=dtype)
    held: Any = quantised.weight
    weights = dequantize_4bit(held.data, held.quant_state)
    plain.weight = nn.Parameter(weights.to(dtype), requires_grad=False)
    tokens = case.pairs * sum(case.shape)
    states = [torch.randn(tokens, case.hidden, device=case.device, dtype=dtype, requires_grad=True)]
    sides = {"half": plain, "nf4": quantised}
    taken = time_in_turns([_pass(side, states) for side in sides.values()], turns, case.device)
    outputs = [side(*states) for side in sides.values()]
    weight = torch.randn_like(outputs[0])
    gradients = [torch.autograd.grad(output, states, weight) for output in outputs]
    return {
        "what": f"a layer of {case.hidden} x {3 * case.hidden} in NF4, {tokens} tokens",
        "seconds": {side: statistics.median(s) for side, s in zip(sides, taken, strict=True)},
        "ratio": ratio_of(*taken),
        "output_difference": _relative(outputs[1:], outputs[:1]),
        "gradient_difference": _relative(gradients[1], gradients[0]),
    }
