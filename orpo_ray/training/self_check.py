"""At the start of a run: whether the chosen layout gives this very model the log-probs that plain padded rows give."""

import torch
from torch import Tensor

from orpo_ray.data.pairs import TokenPair
from orpo_ray.data.store import PairTable
from orpo_ray.errors import ConfigError
from orpo_ray.training.layout import collate
from orpo_ray.training.pair_model import PairModel
from orpo_ray.training.plan import PADDED
from orpo_ray.training.setup import Announce
from orpo_ray.training.world import ALONE, World

TOLERANCE = {"float32": 1e-3, "bfloat16": 0.3, "float16": 0.1}
"""How far the log-prob of a token may be off, by the format that the model computes in."""
_PAIRS = 4


def settle_layout(
    model: PairModel, layout: str, dtype: str, table: PairTable, pad_id: int, announce: Announce, world: World = ALONE
) -> None:
    """Have the model take `layout`, or padded rows, said loudly, where the first pairs of a table come out otherwise.

    All processes of a world settle on the same; the model evaluates afterwards.
    """
    if layout != PADDED:
        problems = world.gather(
            _problem(model, layout, [table[i] for i in range(min(_PAIRS, len(table)))], pad_id, dtype)
        )
        problem = next((found for found in problems if found), None)
        if problem:
            announce(f"WARNING: layout {layout} is not right for this model, falling back to padded rows: {problem}")
            layout = PADDED
    model.use_layout(layout)


def _problem(model: PairModel, layout: str, pairs: list[TokenPair], pad_id: int, dtype: str) -> str | None:
    try:
        found = _log_probs(model, layout, pairs, pad_id)
    except ConfigError as error:
        return str(error)
    difference = (found - _log_probs(model, PADDED, pairs, pad_id)).abs().max().item()
    return None if difference <= TOLERANCE[dtype] else f"log-probs of the first pairs differ by {difference:.2g}"


@torch.no_grad()
def _log_probs(model: PairModel, layout: str, pairs: list[TokenPair], pad_id: int) -> Tensor:
    """Log-probs of the pairs' tokens, in an order that does not depend on the layout."""
    model.eval()
    model.use_layout(layout)
    batch = collate(pairs, layout, pad_id, score_prompt=False).to(model.device)
    order = torch.argsort(batch.part * len(pairs) + batch.pair, stable=True)
    log_probs: Tensor = model(batch)[order]
    return log_probs
