"""At the start of a run, compares the layout's log-probs with those of padded rows."""

import torch
from torch import Tensor

from orpo_ray.data.held import Pairs
from orpo_ray.data.pairs import TokenPair
from orpo_ray.errors import on_one_line
from orpo_ray.runs.console import Announce
from orpo_ray.training.decisions import Decisions
from orpo_ray.training.layout import collate
from orpo_ray.training.memory import is_out_of_memory
from orpo_ray.training.pair_model import PairModel
from orpo_ray.training.plan import PADDED, Layout, longer_side
from orpo_ray.training.world import ALONE, World

TOLERANCE = {"float32": 1e-3, "bfloat16": 0.3, "float16": 0.1}
"""The largest difference in a token's log-prob, by the format that the model computes in."""
_PAIRS = 4
_GPU_FAILED = "CUDA error"
"""After such an error the device computes nothing more in this process, in any layout."""


def settle_layout(
    model: PairModel,
    decisions: Decisions,
    table: Pairs,
    pad_id: int,
    announce: Announce,
    world: World = ALONE,
) -> None:
    """Give the model the layout that was decided, or padded rows if that layout is wrong for it.

    A few pairs of a table are compared, and falling back is announced with a warning. All
    processes of a world take the same layout. The model is in evaluation mode afterwards.
    """
    layout = decisions.layout
    if not layout.pads:
        problems = world.gather(_problem(model, decisions, _some_pairs(table, decisions), pad_id))
        problem = next((found for found in problems if found), None)
        if problem:
            announce(
                f"WARNING: layout {layout} is not right for this model, falling back to padded "
                f"rows: {problem}"
            )
            layout = PADDED
    model.use_layout(layout)


def _some_pairs(table: Pairs, decisions: Decisions) -> list[TokenPair]:
    """The longest pair and the first ones, as many as fit into one micro-batch.

    The longest one looks back furthest. The memory is not measured yet.
    """
    lengths = longer_side(table.lengths)
    longest = int(lengths.argmax())
    rows = [longest, *(i for i in range(min(_PAIRS, len(table))) if i != longest)]
    fit = decisions.tokens_per_microbatch // (2 * int(lengths[longest]))
    return [table[i] for i in rows[: max(1, min(fit, _PAIRS))]]


def _problem(
    model: PairModel, decisions: Decisions, pairs: list[TokenPair], pad_id: int
) -> str | None:
    expected = _log_probs(model, PADDED, pairs, pad_id)
    try:
        found = _log_probs(model, decisions.layout, pairs, pad_id)
    except Exception as error:
        if is_out_of_memory(error) or _GPU_FAILED in str(error):
            raise
        return on_one_line(error) or type(error).__name__
    difference = (found - expected).abs().max().item()
    if difference <= TOLERANCE[decisions.dtype]:
        return None
    return f"log-probs of some pairs differ by {difference:.2g}"


@torch.no_grad()
def _log_probs(model: PairModel, layout: Layout, pairs: list[TokenPair], pad_id: int) -> Tensor:
    """Log-probs of the pairs' tokens, in the same order for every layout."""
    model.eval()
    model.use_layout(layout)
    batch = collate(pairs, layout, pad_id, score_prompt=False).to(model.device)
    order = torch.argsort(batch.part * len(pairs) + batch.pair, stable=True)
    log_probs: Tensor = model(batch)[order]
    return log_probs
