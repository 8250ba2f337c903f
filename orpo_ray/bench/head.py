"""The output head alone: our selected log-probs compared with TRL's full logits."""

import statistics
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from orpo_ray.bench.measure import peak_memory, ratio_of, relative_differences, time_in_turns
from orpo_ray.bench.models import PAD_ID, small_llama, with_adapter
from orpo_ray.bench.pairs import Shape, pairs_of_shape
from orpo_ray.bench.sides import Stock, TrlTrainer
from orpo_ray.bench.step import describe
from orpo_ray.runs.console import Announce
from orpo_ray.training.layout import REJECTED, PairBatch, collate
from orpo_ray.training.logprobs import SelectedLogProbs, pair_logps
from orpo_ray.training.plan import PADDED


def bench_head(
    shape: Shape, pairs: int, vocabulary: int, hidden: int, turns: int, announce: Announce
) -> dict[str, Any]:
    """Time log-probs and gradient by our code and TRL's, on the same padded hidden states."""
    torch.set_num_threads(1)
    drawn = pairs_of_shape(shape, pairs, 0.0, vocabulary)
    batch = collate(drawn, PADDED, PAD_ID, score_prompt=True)
    torch.manual_seed(0)
    head = nn.Linear(hidden, vocabulary, bias=False).requires_grad_(False)
    states = torch.randn(*batch.input_ids.shape, hidden, requires_grad=True)
    scorer = SelectedLogProbs(head, vocabulary)
    trainer = Stock(TrlTrainer(with_adapter(small_llama(64, 64, layers=1)), "orpo", "cpu"), [drawn])

    def ours() -> Tensor:
        scored = pair_logps(scorer(states.flatten(0, 1)[batch.positions], batch.targets), batch)
        return _backward(
            scored.chosen_mean, scored.rejected_mean, scored.nll_sum.sum() / _nll_tokens(batch)
        )

    def stock() -> Tensor:
        chosen, rejected, _, _, nll = trainer.forward(
            lambda *_, **__: SimpleNamespace(logits=head(states)), 0
        )
        return _backward(chosen, rejected, nll)

    found: list[tuple[float, Tensor]] = []
    for side in (stock, ours):
        states.grad = None
        loss_of_side = float(side())
        assert states.grad is not None
        found.append((loss_of_side, states.grad.clone()))
    loss, gradient = relative_differences(*found)
    announce(f"timing {turns} turns")
    taken = time_in_turns([stock, ours], turns, "cpu")
    memory = [peak_memory(side, "cpu") for side in (stock, ours)]
    return {
        "name": "head",
        "ratio": ratio_of(*taken),
        "ours": statistics.median(taken[1]),
        "stock": statistics.median(taken[0]),
        "tokens_ours": len(batch.targets),
        "tokens_stock": batch.input_ids.numel(),
        "memory_ratio": memory[1] / memory[0],
        "memory_ours": memory[1],
        "memory_stock": memory[0],
        "max_rel_loss_diff": loss,
        "max_rel_grad_diff": gradient,
        "turns": turns,
        **describe("cpu"),
    }


def _backward(chosen: Tensor, rejected: Tensor, nll: Tensor) -> Tensor:
    loss = nll + (rejected - chosen).sum()
    loss.backward()
    return loss.detach()


def _nll_tokens(batch: PairBatch) -> int:
    return int((batch.part != REJECTED).sum())
