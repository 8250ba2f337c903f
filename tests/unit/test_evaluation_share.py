"""The share of evaluations is that of arithmetic by hand."""

import numpy as np
import pytest

from orpo_ray.training.evaluation_share import evaluation_share
from orpo_ray.training.plan import PACKED, SHARED_PREFIX, Layout

TRAINED = np.array([[10, 4, 6], [20, 5, 5]])
HELD_OUT = np.array([[8, 1, 1]])


@pytest.mark.parametrize(
    ("layout", "with_rejected", "recomputes", "expected"),
    [
        # Evaluated before step 1 and after steps 2, 4 and 5: four times 10 tokens, or 18 packed.
        (SHARED_PREFIX, True, False, 40 / (40 + 3 * 50)),
        (SHARED_PREFIX, True, True, 40 / (40 + 4 * 50)),
        (PACKED, True, False, 72 / (72 + 3 * 80)),
        # SFT trains on the chosen side alone, and is judged on both.
        (PACKED, False, False, 72 / (72 + 3 * 39)),
    ],
)
def test_forward_passes_are_counted(
    layout: Layout, with_rejected: bool, recomputes: bool, expected: float
) -> None:
    found = evaluation_share(
        5, 2, TRAINED, HELD_OUT, layout, with_rejected=with_rejected, recomputes=recomputes
    )
    assert found.share == pytest.approx(expected)
    assert str(found) == (
        f"4 evaluations are about {expected:.0%} of what the run computes; training.eval_every "
        "says how often"
    )
