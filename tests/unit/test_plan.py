"""The plan: which pairs a step trains on depends on the seed alone, and how it is cut loses or repeats none."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
from numpy.typing import NDArray

from orpo_ray.config import RunConfig, build
from orpo_ray.training.loop import plan_run
from orpo_ray.training.plan import Step, pack_cost, plan

CASES = 300


@dataclass(frozen=True)
class Case:
    """The arguments of one plan."""

    lengths: NDArray[np.int64]
    pairs_per_step: int
    world_size: int
    token_budget: int
    seed: int
    epoch: int = 0

    @property
    def steps(self) -> list[Step]:
        return plan(self.lengths, self.pairs_per_step, self.world_size, self.token_budget, self.seed, self.epoch)


def random_cases() -> Iterator[Case]:
    """Few and many pairs, all of one length or heavy-tailed, budgets from below one pair to above a whole step."""
    rng = np.random.default_rng(20240311)
    for number in range(CASES):
        count = int(rng.integers(1, 120))
        spread = [rng.integers(1, 400, count), np.full(count, 17), np.ceil(rng.lognormal(4, 1, count))][number % 3]
        yield Case(
            lengths=spread.astype(np.int64),
            pairs_per_step=int(rng.integers(1, 40)),
            world_size=int(rng.integers(1, 9)),
            token_budget=int(rng.choice([1, 100, 700, 3000, 100_000])),
            seed=int(rng.integers(0, 2**32)),
        )


def real_packs(step: Step) -> list[NDArray[np.int64]]:
    return [pack.pairs for rank in step.packs for pack in rank if pack.weight]


def test_the_pairs_of_a_step_depend_on_neither_world_size_nor_budget() -> None:
    for case in random_cases():
        other = replace(case, world_size=case.world_size + 3, token_budget=case.token_budget * 7 + 13)
        assert len(case.steps) == len(other.steps)
        for one, two in zip(case.steps, other.steps, strict=True):
            np.testing.assert_array_equal(one.pairs, two.pairs)


def test_every_pair_is_trained_exactly_once_an_epoch() -> None:
    for case in random_cases():
        everything = np.arange(len(case.lengths))
        np.testing.assert_array_equal(np.sort(np.concatenate([step.pairs for step in case.steps])), everything)
        for step in case.steps:
            np.testing.assert_array_equal(np.sort(np.concatenate(real_packs(step))), np.sort(step.pairs))


def test_steps_are_full_and_the_last_partial_one_is_kept() -> None:
    for case in random_cases():
        whole, rest = divmod(len(case.lengths), case.pairs_per_step)
        assert [len(step.pairs) for step in case.steps] == [case.pairs_per_step] * whole + [rest] * bool(rest)


def test_a_pack_exceeds_the_budget_only_if_it_is_a_single_pair() -> None:
    for case in random_cases():
        for step in case.steps:
            for pairs in real_packs(step):
                assert len(pairs) == 1 or pack_cost(pairs, case.lengths) <= case.token_budget


def test_every_rank_runs_the_same_number_of_packs() -> None:
    for case in random_cases():
        for step in case.steps:
            assert len(step.packs) == case.world_size
            assert len({len(rank) for rank in step.packs}) == 1


def test_weight_zero_stands_only_where_the_work_cannot_be_shared_out() -> None:
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
                assert all(len(pairs) == 1 for pairs in real_packs(step)), "a pack could have been split instead"
    assert seen, "the cases never leave a rank without work, so this test showed nothing"


def test_ranks_differ_by_no_more_than_one_pack() -> None:
    for case in random_cases():
        for step in case.steps:
            loads = rank_costs(step, case.lengths)
            assert max(loads) - min(loads) <= max(pack_cost(pairs, case.lengths) for pairs in real_packs(step))


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_the_slowest_rank_of_a_usual_step_has_little_more_than_the_mean(world_size: int) -> None:
    lengths = np.random.default_rng(1).integers(200, 1200, 256)
    for step in plan(lengths, pairs_per_step=64, world_size=world_size, token_budget=4096, seed=0, epoch=0):
        loads = rank_costs(step, lengths)
        assert max(loads) / np.mean(loads) < 1.2


def rank_costs(step: Step, lengths: NDArray[np.int64]) -> list[int]:
    return [sum(pack_cost(pack.pairs, lengths) for pack in rank if pack.weight) for rank in step.packs]


def test_packing_wastes_little_on_padding() -> None:
    lengths = np.random.default_rng(2).integers(50, 1000, 512)
    steps = plan(lengths, pairs_per_step=128, world_size=1, token_budget=8192, seed=0, epoch=0)
    occupied = sum(pack_cost(pairs, lengths) for step in steps for pairs in real_packs(step))
    assert occupied / (2 * lengths.sum()) < 1.1


def test_the_order_is_the_same_for_the_same_seed_and_epoch_and_another_for_others() -> None:
    case = Case(np.arange(1, 101), pairs_per_step=10, world_size=2, token_budget=400, seed=7)

    def order(seed: int, epoch: int) -> list[int]:
        return np.concatenate([step.pairs for step in replace(case, seed=seed, epoch=epoch).steps]).tolist()

    orders = {(seed, epoch): tuple(order(seed, epoch)) for seed in (7, 8) for epoch in (0, 1)}
    assert len(set(orders.values())) == 4
    assert tuple(order(7, 1)) == orders[7, 1]


HAND_LENGTHS = np.array([10, 40, 30, 20, 10, 50, 10])
"""NumPy's default_rng([3, 0]).permutation(7) is 5 6 2 1 4 3 0; were it to change, no run could be resumed."""


def test_a_plan_written_by_hand() -> None:
    """Budget 120, so a pack of k pairs may be 60 / k long.

    Step 0, pairs 5 6 2 1 of lengths 50 10 30 40: 5 alone, 1 alone, 2 with 6. Three packs for two ranks, so the one
    that has two pairs is halved. Costs 100, 80, 60, 20: 5 to rank 0, 1 and then 2 to rank 1, which is full; 6 to 0.
    Step 1, pairs 4 3 0 of lengths 10 20 10: one pack 3 4 0, halved for two ranks.
    """
    first, second = plan(HAND_LENGTHS, pairs_per_step=4, world_size=2, token_budget=120, seed=3, epoch=0)
    assert first.pairs.tolist() == [5, 6, 2, 1]
    assert as_lists(first) == [[([5], 1.0), ([6], 1.0)], [([1], 1.0), ([2], 1.0)]]
    assert second.pairs.tolist() == [4, 3, 0]
    assert as_lists(second) == [[([3], 1.0)], [([4, 0], 1.0)]]


def test_a_plan_written_by_hand_for_more_ranks_than_pairs() -> None:
    """The last step's three pairs on four ranks: one each, and the fourth repeats the last one without weight."""
    _, second = plan(HAND_LENGTHS, pairs_per_step=4, world_size=4, token_budget=120, seed=3, epoch=0)
    assert as_lists(second) == [[([3], 1.0)], [([4], 1.0)], [([0], 1.0)], [([0], 0.0)]]


def as_lists(step: Step) -> list[list[tuple[list[int], float]]]:
    return [[(pack.pairs.tolist(), pack.weight) for pack in rank] for rank in step.packs]


# --- the whole run ----------------------------------------------------------------------------------------------


def config(**training: int) -> RunConfig:
    tree = {
        "name": "planned",
        "model": {"base": "somewhere"},
        "data": {"train": [{"source": "pairs.jsonl"}]},
        "training": {"pairs_per_step": 8, "seed": 5, **training},
    }
    return build(RunConfig, tree, {(): "test"})


TABLE = SimpleNamespace(lengths=np.random.default_rng(0).integers(3, 60, (36, 3)))
LONGER = TABLE.lengths[:, 0] + TABLE.lengths[:, 1:].max(axis=1)


def pairs_of(steps: list[Step]) -> list[list[int]]:
    return [step.pairs.tolist() for step in steps]


def test_two_epochs_are_two_plans_one_after_the_other() -> None:
    steps = plan_run(config(epochs=2), TABLE, 1, 512)
    expected = [step for epoch in (0, 1) for step in plan(LONGER, 8, 1, 512, 5, epoch)]
    assert [len(step.pairs) for step in steps] == [8, 8, 8, 8, 4] * 2
    assert pairs_of(steps) == pairs_of(expected)


@pytest.mark.parametrize(("max_steps", "sizes"), [(3, [8, 8, 8]), (5, [8, 8, 8, 8, 4]), (7, [8, 8, 8, 8, 4, 8, 8])])
def test_max_steps_cuts_the_run_or_goes_on_into_further_epochs(max_steps: int, sizes: list[int]) -> None:
    steps = plan_run(config(max_steps=max_steps), TABLE, 1, 512)
    assert [len(step.pairs) for step in steps] == sizes
    assert pairs_of(steps) == pairs_of(plan_run(config(epochs=2), TABLE, 1, 512)[:max_steps])


def test_a_run_without_either_is_one_epoch() -> None:
    assert pairs_of(plan_run(config(), TABLE, 1, 512)) == pairs_of(plan_run(config(epochs=1), TABLE, 1, 512))


def test_budget_and_world_size_leave_the_whole_run_as_it_is() -> None:
    assert pairs_of(plan_run(config(epochs=3), TABLE, 1, 64)) == pairs_of(plan_run(config(epochs=3), TABLE, 4, 4096))
