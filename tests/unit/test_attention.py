"""Attention over the runs of one row, compared with one dense mask."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from orpo_ray.errors import ConfigError
from orpo_ray.training import runs as runs_module
from orpo_ray.training.attention import attend
from orpo_ray.training.attention_kernels import SDPA, Scores, adapt, attention_path
from orpo_ray.training.runs import Reach, Runs, blocks_of

RUNS = {
    "one run": Runs.of([(5, 0)]),
    "packed": Runs.of([(5, 0), (4, 0), (1, 0), (7, 0)]),
    "shared": Runs.of([(6, 0), (3, 4), (2, 0), (5, 1)]),
    "one-token answers": Runs.of([(4, 0), (1, 3), (2, 0), (1, 1)]),
    "a whole run shared": Runs.of([(4, 0), (3, 4)]),
    "few tokens shared": Runs.of([(20, 0), (18, 2)]),
    "a beginning in common": Runs.of([(3, 0), (6, 3), (2, 5), (4, 3), (1, 3), (1, 3)], common=3),
    "one token in common": Runs.of([(1, 0), (9, 1), (4, 3), (9, 1)], common=1),
}
HEADS, DIM = 4, 8


def dense_mask(runs: Runs, window: int = 99, chunk: int = 99) -> Tensor:
    """Whether token i sees token j, [T, T], by the places that they have in their text."""
    total = sum(runs.lengths)
    mask = torch.zeros(total, total, dtype=torch.bool)
    start = before = 0
    for length, shared in zip(runs.lengths, runs.shared, strict=True):
        beginning = range(min(runs.common, shared))
        of_prompt = range(before, before + shared - len(beginning))
        text = [*beginning, *of_prompt, *range(start, start + length)]
        for place in range(shared, len(text)):
            for other in range(place + 1):
                sees = place - other < window and place // chunk == other // chunk
                mask[text[place], text[other]] = sees
        before, start = start, start + length
    return mask


def states(total: int, heads: int) -> Tensor:
    return torch.randn(1, heads, total, DIM, requires_grad=True)


@pytest.mark.parametrize("key_heads", [HEADS, 2, 1])
@pytest.mark.parametrize("runs", RUNS.values(), ids=RUNS.keys())
def test_values_and_gradients_are_those_of_a_dense_mask(runs: Runs, key_heads: int) -> None:
    torch.manual_seed(0)
    total, scaling = sum(runs.lengths), 0.3
    query, key, value = states(total, HEADS), states(total, key_heads), states(total, key_heads)
    weights = torch.randn(1, total, HEADS, DIM)
    found, _ = attend(nn.Identity(), query, key, value, None, runs=runs, scaling=scaling)
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


class Layer(nn.Module):
    """A layer that says in its configuration how far its tokens see."""

    def __init__(self, kind: str | None = None, **config: Any) -> None:
        super().__init__()
        self.config = SimpleNamespace(**config)
        self.layer_idx = 1
        if kind is not None:
            self.config.layer_types = ["full_attention", kind]


LIMITS: dict[str, tuple[Layer, dict[str, int], dict[str, int]]] = {
    "a window as an argument": (Layer(), {"sliding_window": 3}, {"window": 3}),
    "a window of one token": (Layer(), {"sliding_window": 1}, {"window": 1}),
    "a window of the layer's kind": (
        Layer("sliding_attention", sliding_window=4),
        {},
        {"window": 4},
    ),
    "a window of the whole model": (Layer(sliding_window=2), {}, {"window": 2}),
    "a window that is off": (Layer(sliding_window=2, use_sliding_window=False), {}, {}),
    "another layer's window": (Layer("full_attention", sliding_window=2), {}, {}),
    "chunks": (Layer("chunked_attention", attention_chunk_size=3), {}, {"chunk": 3}),
    "a window of all tokens of some rows": (Layer(), {"sliding_window": 7}, {"window": 7}),
}


@pytest.mark.parametrize("block", [1, 2, 256])
@pytest.mark.parametrize("runs", RUNS.values(), ids=RUNS.keys())
@pytest.mark.parametrize("limit", LIMITS)
def test_tokens_see_as_far_back_as_their_layer_says(
    limit: str, runs: Runs, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever blocks of queries are computed together."""
    monkeypatch.setattr(runs_module, "_BLOCK", block)
    torch.manual_seed(0)
    layer, asked, expected = LIMITS[limit]
    total = sum(runs.lengths)
    query, key, value = states(total, HEADS), states(total, 2), states(total, 2)
    found, _ = attend(layer, query, key, value, None, runs=runs, scaling=0.3, **asked)
    by_mask = scaled_dot_product_attention(
        query, key, value, attn_mask=dense_mask(runs, **expected), scale=0.3, enable_gqa=True
    ).transpose(1, 2)
    torch.testing.assert_close(found, by_mask, rtol=1e-5, atol=1e-6)
    weights = torch.randn_like(found)
    for one, other in zip(
        torch.autograd.grad((found * weights).sum(), (query, key, value)),
        torch.autograd.grad((by_mask * weights).sum(), (query, key, value)),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("cap", [None, 0.7])
@pytest.mark.parametrize("has_sinks", [False, True])
def test_caps_and_sinks_are_those_of_one_dense_mask(
    window: int | None, cap: float | None, has_sinks: bool
) -> None:
    torch.manual_seed(0)
    runs = RUNS["shared"]
    total = sum(runs.lengths)
    query, key, value = states(total, HEADS), states(total, 2), states(total, 2)
    sinks = torch.randn(HEADS, requires_grad=True) if has_sinks else None
    asked: dict[str, Any] = {"scaling": 0.9, "sliding_window": window}
    found, _ = attend(
        nn.Identity(), query, key, value, None, runs, softcap=cap, s_aux=sinks, **asked
    )
    scores = 0.9 * query @ key.repeat_interleave(2, 1).transpose(2, 3)
    scores = scores if cap is None else cap * torch.tanh(scores / cap)
    shares = scores.exp() * dense_mask(runs, window or 99)
    nothing = 0.0 if sinks is None else sinks.exp()[None, :, None, None]
    weights = shares / (shares.sum(3, keepdim=True) + nothing)
    expected = (weights @ value.repeat_interleave(2, 1)).transpose(1, 2)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    inputs = [query, key, value, *([] if sinks is None else [sinks])]
    for one, other in zip(
        torch.autograd.grad(found.square().sum(), inputs),
        torch.autograd.grad(expected.square().sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(("length", "shared"), [(1000, 0), (700, 300), (1, 999)])
def test_a_short_window_computes_few_scores(length: int, shared: int) -> None:
    """A window of 64 in 1,000 tokens: blocks of 256 queries with at most 319 keys each."""
    blocks = list(blocks_of(length, shared, Reach(window=64)))
    assert [block.start for block in blocks[1:]] == [block.stop for block in blocks[:-1]]
    assert blocks[0].start == 0 and blocks[-1].stop == length
    assert all(shared + block.stop - block.first <= 256 + 63 for block in blocks)


def test_what_it_does_not_compute_is_refused() -> None:
    query = states(9, 1)
    with pytest.raises(
        ConfigError,
        match=r"^training\.layout: Identity computes attention with position_bias; use padded",
    ):
        attend(
            nn.Identity(),
            query,
            query,
            query,
            None,
            runs=Runs.of([(6, 0), (3, 4)]),
            position_bias=torch.ones(1),
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
@pytest.mark.parametrize("window", [99, 3])
@pytest.mark.parametrize("runs", RUNS.values(), ids=RUNS.keys())
def test_on_a_gpu_it_is_the_same_within_its_format(runs: Runs, window: int) -> None:
    device, total = torch.device("cuda"), sum(runs.lengths)
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, total, 64, device=device) for heads in (HEADS, 2, 2))
    half = [s.bfloat16().requires_grad_() for s in (query, key, value)]
    found, _ = attend(nn.Identity(), *half, None, runs=runs.to(device), sliding_window=window)
    full = [s.detach().float().requires_grad_() for s in half]
    expected = scaled_dot_product_attention(
        *full, attn_mask=dense_mask(runs, window).to(device), enable_gqa=True
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
    q: Tensor, k: Tensor, v: Tensor, ends: Tensor, key_ends: Tensor, scale: float, back: int = -1
) -> Tensor:
    """What a kernel of any version computes: causal attention, aligned at the ends of runs."""
    outputs = []
    for i in range(len(ends) - 1):
        queries = q[ends[i] : ends[i + 1]].transpose(0, 1)
        keys, values = (states[key_ends[i] : key_ends[i + 1]].transpose(0, 1) for states in (k, v))
        ahead = keys.shape[1] - queries.shape[1]
        mask = torch.ones(queries.shape[1], keys.shape[1], dtype=torch.bool).tril(ahead)
        mask = mask if back < 0 else mask.triu(ahead - back)
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
    assert enable_gqa and window_size[1] == 0
    assert (max_q, max_k) == (6, 7)
    return reference_kernel(query, key, value, cu_seq_q, cu_seq_k, scale, window_size[0])


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
    kernel = adapt(kernel)
    assert kernel is not None
    torch.testing.assert_close(kernel(*rows, runs, Scores(0.3)), expected[0], rtol=1e-5, atol=1e-6)


def test_windows_are_given_to_a_kernel_that_knows_them() -> None:
    torch.manual_seed(0)
    runs = Runs.of([(6, 0), (3, 4), (2, 0)])
    query, key, value = states(11, HEADS), states(11, 2), states(11, 2)
    expected, _ = attend(nn.Identity(), query, key, value, None, runs, 0.3, sliding_window=3)
    rows = [s[0].transpose(0, 1) for s in (query, key, value)]
    kernel = adapt(with_windows, has_window=True)
    assert kernel is not None and adapt(with_a_flag, has_window=True) is None
    found = kernel(*rows, runs, Scores(0.3, Reach(window=3)))
    torch.testing.assert_close(found, expected[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("asked", ["position_bias", "sinks", "indices", "block_indices"])
def test_a_layer_that_asks_for_more_is_refused(asked: str) -> None:
    """Such as the sinks of Inkling 2, and the chosen keys of DeepSeek V3.2 and MiniMax M3."""
    states = torch.randn(1, 2, 4, 8)
    with pytest.raises(ConfigError, match=f"computes attention with {asked}; use padded"):
        attend(
            torch.nn.Identity(),
            states,
            states,
            states,
            None,
            runs=Runs.of([(4, 0)]),
            **{asked: torch.ones(1)},
        )
