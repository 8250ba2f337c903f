"""How much of a run its evaluations compute, which its start says."""

import math
from dataclasses import dataclass

from orpo_ray.training.plan import Indices, Layout, pack_costs

_FORWARD_AND_BACKWARD, _FORWARD_AGAIN = 3, 1
"""What training a token costs in forward passes, and what recomputed activations add.

A backward pass costs twice a forward pass (arXiv:2001.08361, section 2.1).
"""


@dataclass(frozen=True)
class EvaluationShare:
    """The evaluations of a run, that before the first step included, and their share of it."""

    count: int
    share: float

    def __str__(self) -> str:
        return (
            f"{self.count} evaluations are about {self.share:.0%} of what the run computes; "
            "training.eval_every says how often"
        )


def evaluation_share(
    steps: int,
    every: int,
    trained: Indices,
    held_out: Indices,
    layout: Layout,
    *,
    with_rejected: bool,
    recomputes: bool,
) -> EvaluationShare:
    """For a run of so many steps that evaluates every so many of them, at its start and at its end.

    `trained` are the lengths of the pairs of all steps and `held_out` those of the held-out pairs,
    each (prompt, chosen, rejected) [n, 3]. Evaluations read rejected answers even if training does
    not. Sample answers are not counted.
    """
    count = 1 + math.ceil(steps / every)
    evaluated = count * float(pack_costs(held_out, layout).tokens.sum())
    cost = _FORWARD_AND_BACKWARD + _FORWARD_AGAIN * recomputes
    computed = cost * float(pack_costs(trained, layout, with_rejected=with_rejected).tokens.sum())
    return EvaluationShare(count, evaluated / (evaluated + computed))
