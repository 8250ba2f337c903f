"""Attention over the runs of one row, compared with one dense mask."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from orpo_ray.errors import ConfigError
from orpo_ray.training.attention import SDPA, Runs, _adapt, attend, attention_path

RUNS = {
    "one run": [(5, 0)],
    "packed": [(5, 0), (4, 0), (1, 0), (7, 0)],
    "shared": [(6, 0), (3, 4), (2, 0), (5, 1)],
    "one-token answers": [(4, 0), (1, 3), (2, 0), (1, 1)],
    "a whole run shared": [(4, 0), (3, 4)],
}
HEADS, DIM = 4, 8


def dense_mask(runs: list[tuple[int, int]]) -> Tensor:
    """Whether token i sees token j, [T, T]."""
    total = sum(length for length, _ in runs)
    mask = torch.zeros(total, total, dtype=torch.bool)
    start = before = 0
    for length, shared in runs:
        mask[start : start + length, start : start + length] = (
            torch.ones(length, length).tril().bool()
        )
        mask[start : start + length, before : before + shared] = True
        before, start = start, start + length
    return mask


def states(total: int, heads: int) -> Tensor:
    return torch.randn(1, heads, total, DIM, requires_grad=True)


@pytest.mark.parametrize("key_heads", [HEADS, 2, 1])
@pytest.mark.parametrize("runs", RUNS.values(), ids=RUNS.keys())
def test_values_and_gradients_are_those_of_a_dense_mask(
    runs: list[tuple[int, int]], key_heads: int
) -> None:
    torch.manual_seed(0)
    total, scaling = sum(length for length, _ in runs), 0.3
    query, key, value = states(total, HEADS), states(total, key_heads), states(total, key_heads)
    weights = torch.randn(1, total, HEADS, DIM)
    found, _ = attend(nn.Identity(), query, key, value, None, runs=Runs.of(runs), scaling=scaling)
    expected = scaled_dot_product_attention(
        query, key, value, attn_mask=dense_mask(runs), scale=scaling, enable_gqa=True
    ).transpose(1, 2)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    ours = torch.autograd.grad((found * weights).sum(), (query, key, value))
    theirs = torch.autograd.grad((expected * weights).sum(), (query, key, value))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_without_a_scale_it_is_that_of_the_head() -> None:
    query = states(4, 1)
    plain, _ = attend(nn.Identity(), query, query, query, None, runs=Runs.of([(4, 0)]))
    scaled, _ = attend(
        nn.Identity(), query, query, query, None, runs=Runs.of([(4, 0)]), scaling=DIM**-0.5
    )
    assert torch.equal(plain, scaled)


@pytest.mark.parametrize(
    ("asked", "complaint"),
    [
        ({"softcap": 50.0}, "Identity computes attention with softcap"),
        ({"s_aux": torch.ones(1)}, "Identity computes attention with s_aux"),
        ({"sliding_window": 6}, "Identity computes attention with a window of 6"),
    ],
)
def test_what_it_does_not_compute_is_refused(asked: dict[str, object], complaint: str) -> None:
    query = states(9, 1)
    with pytest.raises(ConfigError, match=rf"^training\.layout: {complaint}; use padded"):
        attend(
            nn.Identity(),
            query,
            query,
            query,
            None,
            runs=Runs.of([(6, 0), (3, 4)]),
            **({"scaling": 1.0} | asked),
        )


def test_a_window_that_no_run_exceeds_is_none() -> None:
    """The longest run has 6 tokens.

    The last token of the other run sees 7: 4 of the prompt and 3 of its own.
    """
    query, runs = states(9, 1), Runs.of([(6, 0), (3, 4)])
    windowed, _ = attend(nn.Identity(), query, query, query, None, runs=runs, sliding_window=7)
    plain, _ = attend(nn.Identity(), query, query, query, None, runs=runs)
    assert torch.equal(windowed, plain)


def test_a_cpu_goes_run_by_run() -> None:
    assert attention_path(torch.device("cpu"), torch.bfloat16, 1, 64) == SDPA


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU here: CUDA's attention over runs is not compared"
)
@pytest.mark.parametrize("runs", RUNS.values(), ids=RUNS.keys())
def test_on_a_gpu_it_is_the_same_within_its_format(runs: list[tuple[int, int]]) -> None:
    device, total = torch.device("cuda"), sum(length for length, _ in runs)
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, total, 64, device=device) for heads in (HEADS, 2, 2))
    half = [s.bfloat16().requires_grad_() for s in (query, key, value)]
    found, _ = attend(nn.Identity(), *half, None, runs=Runs.of(runs).to(device))
    full = [s.detach().float().requires_grad_() for s in half]
    expected = scaled_dot_product_attention(
        *full, attn_mask=dense_mask(runs).to(device), enable_gqa=True
    ).transpose(1, 2)
    torch.testing.assert_close(found.float(), expected, rtol=0.03, atol=0.03)
    for one, other in zip(
        torch.autograd.grad(found.float().square().sum(), half),
        torch.autograd.grad(expected.square().sum(), full),
        strict=True,
    ):
        torch.testing.assert_close(one.float(), other, rtol=0.05, atol=0.1)


# --- the signatures that torch's varlen attention has had -----------------------------------------


def reference_kernel(
    q: Tensor, k: Tensor, v: Tensor, ends: Tensor, key_ends: Tensor, scale: float
) -> Tensor:
    """What a kernel of any version computes: causal attention, aligned at the ends of runs."""
    outputs = []
    for i in range(len(ends) - 1):
        queries = q[ends[i] : ends[i + 1]].transpose(0, 1)
        keys, values = (states[key_ends[i] : key_ends[i + 1]].transpose(0, 1) for states in (k, v))
        mask = torch.ones(queries.shape[1], keys.shape[1], dtype=torch.bool).tril(
            keys.shape[1] - queries.shape[1]
        )
        out = scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, scale=scale, enable_gqa=True
        )
        outputs.append(out.transpose(0, 1))
    return torch.cat(outputs)


def with_windows(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    scale=None,
    window_size=(-1, -1),
    enable_gqa=False,
):
    assert window_size == (-1, 0) and enable_gqa
    assert (max_q, max_k) == (6, 7)
    return reference_kernel(query, key, value, cu_seq_q, cu_seq_k, scale)


def with_a_flag(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False):
    assert is_causal and query.shape[1] == key.shape[1]
    return reference_kernel(query, key, value, cu_seq_q, cu_seq_k, DIM**-0.5)


@pytest.mark.parametrize("kernel", [with_windows, with_a_flag])
def test_every_signature_is_given_what_it_takes(kernel: object) -> None:
    torch.manual_seed(0)
    runs = Runs.of([(6, 0), (3, 4), (2, 0)])
    query, key, value = states(11, HEADS), states(11, 2), states(11, 2)
    expected, _ = attend(nn.Identity(), query, key, value, None, runs=runs, scaling=0.3)
    rows = [s[0].transpose(0, 1) for s in (query, key, value)]
    torch.testing.assert_close(_adapt(kernel)(*rows, runs, 0.3), expected[0], rtol=1e-5, atol=1e-6)
