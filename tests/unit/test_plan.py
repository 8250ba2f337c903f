"""The plan: the seed alone decides the pairs of a step, and cutting loses and repeats none."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from orpo_ray.config import RunConfig, build
from orpo_ray.training.plan import (
    PACKED,
    PADDED,
    SHARED_PREFIX,
    PackCosts,
    Step,
    cut_packs,
    cut_step,
    longer_side,
    pack_costs,
    step_pairs,
)
from orpo_ray.training.run_plan import plan_run, steps_of_run

CASES = 300


@dataclass(frozen=True)
class Case:
    """The arguments of one plan."""

    costs: PackCosts
    pairs_per_step: int
    world_size: int
    token_budget: int
    seed: int
    epoch: int = 0

    @property
    def steps(self) -> list[Step]:
        """One epoch, cut into packs."""
        steps = step_pairs(len(self.costs.tokens), self.pairs_per_step, self.seed, self.epoch)
        return [cut_step(pairs, self.costs, self.world_size, self.token_budget) for pairs in steps]


def random_cases() -> Iterator[Case]:
    """Few and many pairs, of one length or of very different ones.

    Budgets go from less than one pair to more than a whole step.
    """
    rng = np.random.default_rng(20240311)
    for number in range(CASES):
        count = int(rng.integers(1, 120))
        spread = [
            rng.integers(1, 400, count),
            np.full(count, 17),
            np.ceil(rng.lognormal(4, 1, count)),
        ][number % 3]
        yield Case(
            costs=PackCosts(spread.astype(np.int64), rectangular=bool(rng.integers(2))),
            pairs_per_step=int(rng.integers(1, 40)),
            world_size=int(rng.integers(1, 9)),
            token_budget=int(rng.choice([1, 100, 700, 3000, 100_000])),
            seed=int(rng.integers(0, 2**32)),
        )


def real_packs(step: Step) -> list[NDArray[np.int64]]:
    return [pack.pairs for rank in step.packs for pack in rank if pack.weight]


def test_the_pairs_of_a_step_depend_on_neither_world_size_nor_budget() -> None:
    for case in random_cases():
        other = replace(
            case, world_size=case.world_size + 3, token_budget=case.token_budget * 7 + 13
        )
        assert len(case.steps) == len(other.steps)
        for one, two in zip(case.steps, other.steps, strict=True):
            np.testing.assert_array_equal(one.pairs, two.pairs)


def test_every_pair_is_trained_exactly_once_an_epoch() -> None:
    for case in random_cases():
        everything = np.arange(len(case.costs.tokens))
        np.testing.assert_array_equal(
            np.sort(np.concatenate([step.pairs for step in case.steps])), everything
        )
        for step in case.steps:
            np.testing.assert_array_equal(
                np.sort(np.concatenate(real_packs(step))), np.sort(step.pairs)
            )


def test_steps_are_full_and_the_last_partial_one_is_kept() -> None:
    for case in random_cases():
        whole, rest = divmod(len(case.costs.tokens), case.pairs_per_step)
        assert [len(step.pairs) for step in case.steps] == [case.pairs_per_step] * whole + [
            rest
        ] * bool(rest)


def test_a_pack_exceeds_the_budget_only_if_it_is_a_single_pair() -> None:
    for case in random_cases():
        for step in case.steps:
            for pairs in real_packs(step):
                assert len(pairs) == 1 or case.costs.of(pairs) <= case.token_budget


def test_every_rank_runs_the_same_number_of_packs() -> None:
    for case in random_cases():
        for step in case.steps:
            assert len(step.packs) == case.world_size
            assert len({len(rank) for rank in step.packs}) == 1


def test_weight_zero_comes_only_if_there_are_too_few_pairs() -> None:
    seen = 0
    for case in random_cases():
        for step in case.steps:
            idle = [pack for rank in step.packs for pack in rank if pack.weight != 1.0]
            seen += len(idle)
            assert len(idle) < case.world_size
            for pack in idle:
                assert pack.weight == 0.0
                assert len(pack.pairs) == 1
                assert pack.pairs[0] in step.pairs
            if idle:
                assert all(len(pairs) == 1 for pairs in real_packs(step)), (
                    "a pack could have been split instead"
                )
    assert seen, "the cases never leave a rank without work, so this test showed nothing"


def test_ranks_differ_by_no_more_than_one_pack() -> None:
    for case in random_cases():
        for step in case.steps:
            loads = rank_costs(step, case.costs)
            assert max(loads) - min(loads) <= max(
                case.costs.of(pairs) for pairs in real_packs(step)
            )


@pytest.mark.parametrize("rectangular", [True, False])
@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_the_slowest_rank_of_a_usual_step_has_little_more_than_the_mean(
    world_size: int, rectangular: bool
) -> None:
    tokens = np.random.default_rng(1).integers(400, 2400, 256)
    case = Case(
        PackCosts(tokens, rectangular),
        pairs_per_step=64,
        world_size=world_size,
        token_budget=4096,
        seed=0,
    )
    for step in case.steps:
        loads = rank_costs(step, case.costs)
        assert max(loads) / np.mean(loads) < 1.2


def rank_costs(step: Step, costs: PackCosts) -> list[int]:
    return [sum(costs.of(pack.pairs) for pack in rank if pack.weight) for rank in step.packs]


def test_packing_wastes_little_on_padding() -> None:
    tokens = np.random.default_rng(2).integers(100, 2000, 512)
    costs = PackCosts(tokens, rectangular=True)
    steps = Case(costs, pairs_per_step=128, world_size=1, token_budget=8192, seed=0).steps
    occupied = sum(costs.of(pairs) for step in steps for pairs in real_packs(step))
    assert occupied / tokens.sum() < 1.1


def test_a_single_row_is_filled_up() -> None:
    """First-fit-decreasing makes few packs more than the tokens would fill without a gap."""
    tokens = np.random.default_rng(2).integers(100, 2000, 512)
    packs = cut_packs(np.arange(512), PackCosts(tokens, rectangular=False), 8192)
    assert len(packs) <= 1.03 * tokens.sum() / 8192 + 1


def test_the_order_is_the_same_for_the_same_seed_and_epoch_and_another_for_others() -> None:
    case = Case(
        PackCosts(np.arange(1, 101), rectangular=True),
        pairs_per_step=10,
        world_size=2,
        token_budget=400,
        seed=7,
    )

    def order(seed: int, epoch: int) -> list[int]:
        return np.concatenate(
            [step.pairs for step in replace(case, seed=seed, epoch=epoch).steps]
        ).tolist()

    orders = {(seed, epoch): tuple(order(seed, epoch)) for seed in (7, 8) for epoch in (0, 1)}
    assert len(set(orders.values())) == 4
    assert tuple(order(7, 1)) == orders[7, 1]


HAND_TOKENS = np.array([20, 80, 60, 40, 20, 100, 20])
"""NumPy's default_rng([3, 0]).permutation(7) is 5 6 2 1 4 3 0.

If that changed, no run could be resumed.
"""


def hand_plan(world_size: int, rectangular: bool = True) -> list[Step]:
    return Case(PackCosts(HAND_TOKENS, rectangular), 4, world_size, token_budget=120, seed=3).steps


def test_a_plan_written_by_hand() -> None:
    """Budget 120, so a padded pack of k pairs may hold pairs of 120 / k.

    Step 0, pairs 5 6 2 1 of tokens 100 20 60 80: 5 alone, 1 alone, 2 with 6. Three packs for two
    ranks, so the one that has two pairs is halved. Costs 100, 80, 60, 20: 5 to rank 0, 1 and then 2
    to rank 1, which is full; 6 to 0. Step 1, pairs 4 3 0 of tokens 20 40 20: one pack 3 4 0, halved
    for two ranks.
    """
    first, second = hand_plan(world_size=2)
    assert first.pairs.tolist() == [5, 6, 2, 1]
    assert as_lists(first) == [[([5], 1.0), ([6], 1.0)], [([1], 1.0), ([2], 1.0)]]
    assert second.pairs.tolist() == [4, 3, 0]
    assert as_lists(second) == [[([3], 1.0)], [([4, 0], 1.0)]]


def test_a_plan_of_single_rows_written_by_hand() -> None:
    """Step 0: 5, the longest, leaves 20, which 6 fills; 1 leaves 40; 2 begins a third pack.

    Step 1 fits into one.
    """
    first, second = hand_plan(world_size=1, rectangular=False)
    assert as_lists(first) == [[([5, 6], 1.0), ([1], 1.0), ([2], 1.0)]]
    assert as_lists(second) == [[([3, 4, 0], 1.0)]]


def test_a_plan_written_by_hand_for_more_ranks_than_pairs() -> None:
    """The last step has three pairs for four ranks.

    Three ranks get one each, and the fourth repeats the last one with weight 0.
    """
    _, second = hand_plan(world_size=4)
    assert as_lists(second) == [[([3], 1.0)], [([4], 1.0)], [([0], 1.0)], [([0], 0.0)]]


def as_lists(step: Step) -> list[list[tuple[list[int], float]]]:
    return [[(pack.pairs.tolist(), pack.weight) for pack in rank] for rank in step.packs]


@st.composite
def any_case(draw: Any) -> Case:
    """Any plan that a run could ask for."""
    tokens = draw(st.lists(st.integers(2, 5000), min_size=1, max_size=60))
    return Case(
        costs=PackCosts(np.array(tokens, dtype=np.int64), rectangular=draw(st.booleans())),
        pairs_per_step=draw(st.integers(1, 70)),
        world_size=draw(st.integers(1, 9)),
        token_budget=draw(st.integers(1, 20_000)),
        seed=draw(st.integers(0, 2**32 - 1)),
        epoch=draw(st.integers(0, 3)),
    )


@settings(deadline=None, max_examples=300, derandomize=True)
@given(case=any_case(), world_size=st.integers(1, 9), token_budget=st.integers(1, 20_000))
def test_what_holds_for_any_plan(case: Case, world_size: int, token_budget: int) -> None:
    """What every plan must hold.

    Each pair comes once. A step has the same pairs for every number of ranks. Packs are within the
    budget. All ranks have equally many.
    """
    steps, others = (
        case.steps,
        replace(case, world_size=world_size, token_budget=token_budget).steps,
    )
    trained = np.concatenate([pairs for step in steps for pairs in real_packs(step)])
    np.testing.assert_array_equal(np.sort(trained), np.arange(len(case.costs.tokens)))
    for step, other in zip(steps, others, strict=True):
        np.testing.assert_array_equal(step.pairs, other.pairs)
        np.testing.assert_array_equal(
            np.sort(np.concatenate(real_packs(step))), np.sort(step.pairs)
        )
        assert all(
            len(pairs) == 1 or case.costs.of(pairs) <= case.token_budget
            for pairs in real_packs(step)
        )
        assert len(step.packs) == case.world_size
        assert len({len(rank) for rank in step.packs}) == 1


# --- what pairs cost ------------------------------------------------------------------------------

LENGTHS = np.array([[3, 2, 1], [1, 1, 3], [5, 4, 4]])


def test_the_longer_side_is_prompt_and_longer_answer() -> None:
    assert longer_side(LENGTHS).tolist() == [5, 4, 9]


@pytest.mark.parametrize(
    ("layout", "with_rejected", "tokens"),
    [
        (PADDED, True, [10, 8, 18]),
        (PADDED, False, [5, 2, 9]),
        (PACKED, True, [9, 6, 18]),
        (PACKED, False, [5, 2, 9]),
        (SHARED_PREFIX, True, [6, 5, 13]),
        (SHARED_PREFIX, False, [5, 2, 9]),
    ],
)
def test_tokens_of_a_pair_in_each_layout(
    layout: str, with_rejected: bool, tokens: list[int]
) -> None:
    costs = pack_costs(LENGTHS, layout, with_rejected=with_rejected)
    assert costs.tokens.tolist() == tokens
    together = {True: 3 * max(tokens), False: sum(tokens)}[layout == PADDED]
    assert costs.of(np.arange(3)) == together


# --- the whole run --------------------------------------------------------------------------------


def config(**training: int) -> RunConfig:
    tree = {
        "name": "planned",
        "model": {"base": "somewhere"},
        "data": {"train": [{"source": "pairs.jsonl"}]},
        "training": {"pairs_per_step": 8, "seed": 5, **training},
    }
    return build(RunConfig, tree, {(): "test"})


class _Table(SimpleNamespace):
    def __len__(self) -> int:
        return len(self.lengths)


TABLE = _Table(lengths=np.random.default_rng(0).integers(3, 60, (36, 3)))


def pairs_of(steps: list[NDArray[np.int64]]) -> list[list[int]]:
    return [pairs.tolist() for pairs in steps]


def test_two_epochs_are_two_orders_one_after_the_other() -> None:
    steps = steps_of_run(config(epochs=2), 36)
    assert [len(pairs) for pairs in steps] == [8, 8, 8, 8, 4] * 2
    assert pairs_of(steps) == pairs_of(
        [pairs for epoch in (0, 1) for pairs in step_pairs(36, 8, 5, epoch)]
    )


@pytest.mark.parametrize(
    ("max_steps", "sizes"), [(3, [8, 8, 8]), (5, [8, 8, 8, 8, 4]), (7, [8, 8, 8, 8, 4, 8, 8])]
)
def test_max_steps_cuts_the_run_or_adds_epochs(max_steps: int, sizes: list[int]) -> None:
    steps = steps_of_run(config(max_steps=max_steps), 36)
    assert [len(pairs) for pairs in steps] == sizes
    assert pairs_of(steps) == pairs_of(steps_of_run(config(epochs=2), 36)[:max_steps])


def test_a_run_without_either_is_one_epoch() -> None:
    assert pairs_of(steps_of_run(config(), 36)) == pairs_of(steps_of_run(config(epochs=1), 36))


@pytest.mark.parametrize(
    ("world_size", "budget", "layout"),
    [(1, 64, PADDED), (4, 4096, PADDED), (2, 100, PACKED), (3, 700, SHARED_PREFIX)],
)
def test_budget_world_size_and_layout_leave_the_pairs_of_a_step_as_they_are(
    world_size: int, budget: int, layout: str
) -> None:
    planned = plan_run(config(epochs=3), TABLE, world_size, budget, layout)
    assert pairs_of([step.pairs for step in planned]) == pairs_of(
        steps_of_run(config(epochs=3), 36)
    )
