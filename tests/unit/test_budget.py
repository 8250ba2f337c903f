"""How tokens and checkpointing follow from the free memory, which is made up here."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import decided, make_artifact, run_config

from orpo_ray.config.optimizers import OPTIMIZERS
from orpo_ray.config.training import GaloreConfig, TrainingConfig
from orpo_ray.data.store import Artifact
from orpo_ray.errors import ResourceError
from orpo_ray.objectives import build_objective
from orpo_ray.training.budget import Budget, Sizes, find_budget, sample_pack, smaller, usable
from orpo_ray.training.decisions import Decisions
from orpo_ray.training.load import load_pair_model
from orpo_ray.training.memory import CpuMemory, LimitedMemory, used_memory
from orpo_ray.training.plan import SHARED_PREFIX, PackCosts
from orpo_ray.training.probe import Probe, memory_of, settle_budget
from orpo_ray.training.run_plan import plan_run
from orpo_ray.training.strategy import ModelSize, Strategy
from orpo_ray.training.world import ALONE, World

KEPT, RECOMPUTED = 100, 20
"""Bytes a token, with activations kept and recomputed."""
SIZES = Sizes(longest=100, another=200, step=20_000, most=10_000)


def measure(room: int) -> Callable[[int, bool], int | None]:
    """A device that runs out of memory at `room`."""

    def peak(tokens: int, checkpointing: bool) -> int | None:
        taken = 1000 + tokens * (RECOMPUTED if checkpointing else KEPT)
        return taken if taken <= room else None

    return peak


@pytest.mark.parametrize(
    ("room", "asked", "expected"),
    [
        (10_000_000, None, Budget(10_000, False)),  # more than enough
        (1000 + KEPT * 5000, None, Budget(5000, False)),  # enough tokens to keep a GPU busy
        (1000 + KEPT * 4000, None, Budget(10_000, True)),  # too few of them: recomputed, all fit
        (1000 + RECOMPUTED * 700, None, Budget(700, True)),
        (1000 + RECOMPUTED * 700, False, Budget(100, False)),  # the second pack did not fit
        (10_000_000, True, Budget(10_000, True)),
        (1000 + RECOMPUTED * 150, None, Budget(100, True)),  # the second pack did not fit
        (1000 + RECOMPUTED * 99, None, None),
        (1000 + KEPT * 99, False, None),
    ],
)
def test_the_budget_is_what_fits(room: int, asked: bool | None, expected: Budget | None) -> None:
    assert find_budget(measure(room), room, SIZES, asked) == expected


def test_a_step_that_is_small_needs_no_more_than_its_own_tokens_to_keep_activations() -> None:
    small, room = replace(SIZES, step=300), 1000 + KEPT * 400
    assert find_budget(measure(room), room, small, None) == Budget(400, False)
    assert find_budget(measure(room), room, SIZES, None) == Budget(2000, True)
    assert find_budget(measure(10**9), 10**9, Sizes(100, 100, 100, 5000), None) == Budget(
        100, False
    )


@pytest.mark.parametrize(
    ("workers", "strategy", "held"),
    [
        (1, Strategy.SINGLE, 12),  # bytes a parameter: its gradient, and Adam's two moments
        (2, Strategy.DDP, 16),  # and the copy of the gradient that is exchanged
        (4, Strategy.ZERO_1, 6),
        (4, Strategy.ZERO_2, 3),
        (4, Strategy.ZERO_3, 0),  # 4 in all, and 4 are taken already: the whole weight
    ],
)
def test_optimizer_state_is_kept_room_for_as_the_strategy_shares_it_out(
    workers: int, strategy: Strategy, held: int
) -> None:
    assert usable(1000, ModelSize(0, 0), workers, strategy) == 900
    assert usable(1000, ModelSize(0, 10), workers, strategy) == 900 - 10 * held


def test_an_optimizer_with_more_state_is_kept_more_room_for() -> None:
    """AdEMAMix has three moments, and its gradient."""
    size = ModelSize(0, 10, OPTIMIZERS["ademamix"].state_bytes)
    assert usable(1000, size, 1, Strategy.SINGLE) == 900 - 10 * 16


def test_after_a_failure_less_is_tried_down_to_the_longest_pair() -> None:
    assert [smaller(1000, 100), smaller(120, 100), smaller(100, 100), smaller(90, 100)] == [
        750,
        100,
        None,
        None,
    ]


def test_the_sample_holds_the_longest_pairs() -> None:
    costs = PackCosts(np.array([10, 50, 30, 20]), rectangular=False)
    assert [sample_pack(costs, tokens).tolist() for tokens in (1, 79, 80, 100, 1000)] == [
        [1],
        [1],
        [1, 2],
        [1, 2, 3],
        [1, 2, 3, 0],
    ]


# --- on a model -----------------------------------------------------------------------------------


@dataclass
class FakeMemory:
    """A memory that runs packs and records what they took. `packs` has the tokens of each.

    In the calls `fails`, counted from 0, memory runs out.
    """

    packs: list[int]
    fails: tuple[int, ...] = ()
    size: int = 10**9
    seen: list[int] = field(default_factory=list)

    def free(self) -> int:
        return self.size

    def peak_of(self, run: Callable[[], object]) -> int | None:
        before = len(self.packs)
        run()
        if len(self.packs) == before:
            return 0
        self.seen.append(self.packs[-1])
        return None if len(self.seen) - 1 in self.fails else 1000 * self.packs[-1]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return make_artifact(tmp_path_factory.mktemp("prepared"), train=12, evaluation=2)


DECISIONS = decided(8192, layout=SHARED_PREFIX, find_budget=True)


class Ground:
    """A run on the demo's model with a made-up memory."""

    def __init__(
        self, artifact: Artifact, fails: tuple[int, ...] = (), size: int = 10**9, **training: Any
    ) -> None:
        settings = {"pairs_per_step": 6, "tokens_per_microbatch": "auto", **training}
        self.config = run_config(Path("unused"), training=settings)
        self.artifact = artifact
        self.model = load_pair_model(self.config, DECISIONS, lambda line: None)
        self.model.use_layout(SHARED_PREFIX)
        self.seen: list[int] = []
        self.model.register_forward_pre_hook(
            lambda module, given: self.seen.append(given[0].input_ids.numel())
        )
        self.memory = FakeMemory(self.seen, fails, size)
        self.probe = Probe(
            self.model, build_objective(self.config.objective), artifact.train, 0, self.memory
        )
        self.said: list[str] = []

    def plan(self, tokens: int) -> Any:
        return plan_run(self.config, self.artifact.train, 1, tokens, SHARED_PREFIX)

    def settle(self, decisions: Decisions = DECISIONS, world: World = ALONE) -> Decisions:
        largest = max(self.probe.costs.of(step.pairs) for step in self.plan(10**6))
        return settle_budget(
            self.probe, self.config.training, decisions, self.plan, largest, world, self.said.append
        )


def test_the_largest_pack_of_the_plan_is_tried_last(artifact: Artifact) -> None:
    ground = Ground(artifact)
    decided = ground.settle()
    costs = ground.probe.costs
    steps = [costs.of(step.pairs) for step in ground.plan(10**6)]
    assert decided == replace(
        DECISIONS, tokens_per_microbatch=8192, gradient_checkpointing=False, find_budget=False
    )
    longest, another, tried = ground.memory.seen
    assert (longest, tried) == (costs.tokens.max(), max(steps))
    assert longest < another <= 2 * longest
    trying, found = ground.said
    assert trying == "trying the largest micro-batch"
    assert found.startswith(
        "tokens per micro-batch 8192, activations kept because there is room "
        "(training.memory_limit caps it); the largest micro-batch, "
    )


def test_what_did_not_fit_is_made_smaller_and_tried_again(artifact: Artifact) -> None:
    ground = Ground(artifact, fails=(2, 3))
    decided = ground.settle()
    first, second, third = ground.memory.seen[2:]
    assert first > second > third
    assert third <= decided.tokens_per_microbatch == int(0.75 * second)


def test_not_even_the_longest_pair_is_a_resource_error(artifact: Artifact) -> None:
    with pytest.raises(
        ResourceError,
        match=r"^training\.tokens_per_microbatch: a micro-batch of \d+ tokens does not fit",
    ):
        Ground(artifact, size=10).settle()


def test_what_the_user_fixed_is_not_made_smaller(artifact: Artifact) -> None:
    fixed = replace(DECISIONS, tokens_per_microbatch=150)
    assert Ground(artifact, tokens_per_microbatch=150).settle(fixed).tokens_per_microbatch == 150
    with pytest.raises(
        ResourceError, match=r"lower data\.max_length or training\.tokens_per_microbatch"
    ):
        Ground(artifact, tokens_per_microbatch=150, fails=(2,)).settle(fixed)


def limited(artifact: Artifact, limit: float, used: int = 0, **training: Any) -> Ground:
    """A run that uses `limit` GB at most, of which it uses some bytes already."""
    ground = Ground(artifact, memory_limit=limit, **training)
    whole: Any = ground.memory
    ground.probe._memory = LimitedMemory(whole, int(limit * 1e9), lambda: used)
    return ground


def test_a_limit_makes_packs_smaller(artifact: Artifact) -> None:
    """A token takes 1,000 bytes; the weights that are trained take some of the room."""
    assert Ground(artifact).settle().tokens_per_microbatch == 8192
    trained = 16 * sum(p.numel() for p in Ground(artifact).model.parameters() if p.requires_grad)
    ground = limited(artifact, (trained + 1_000_000) / 1e9, used=500_000)
    room = ground.probe.room(1, Strategy.SINGLE, ground.config.training)
    assert 0 < room < 0.9 * (trained + 500_000)
    found = ground.settle()
    assert ground.probe.costs.tokens.max() <= found.tokens_per_microbatch <= room / 1000
    assert 1000 * max(ground.memory.seen) <= room


def test_a_limit_that_the_base_exceeds_is_named(artifact: Artifact) -> None:
    with pytest.raises(
        ResourceError, match=r"does not fit into training\.memory_limit=0\.001; lower"
    ):
        limited(artifact, 0.001, used=2_000_000).settle()


def test_tokens_that_are_set_are_held_against_the_limit(artifact: Artifact) -> None:
    fixed = replace(DECISIONS, tokens_per_microbatch=400, find_budget=False)
    found = limited(artifact, 1.0, tokens_per_microbatch=400).settle(fixed)
    assert found.tokens_per_microbatch == 400
    with pytest.raises(ResourceError, match=r"training\.memory_limit=0\.0001"):
        limited(artifact, 0.0001, tokens_per_microbatch=400).settle(fixed)


def test_what_a_process_uses_counts() -> None:
    used = used_memory("cpu")
    memory = memory_of("cpu", ALONE, limit=2 * used / 1e9)
    assert memory.free() == pytest.approx(used, rel=0.1)
    assert memory_of("cpu", ALONE).free() > 0


@dataclass(frozen=True)
class WithAnother(World):
    """A world of two processes; the other one has less room."""

    def gather(self, value: Any) -> list[Any]:
        return [value, Budget(90, True) if isinstance(value, Budget) else value]


def test_the_least_of_all_processes_counts(artifact: Artifact) -> None:
    decided = Ground(artifact).settle(world=WithAnother(rank=0, size=2, local_rank=0))
    assert (decided.tokens_per_microbatch, decided.gradient_checkpointing) == (90, True)


def test_a_probe_leaves_everything_as_it_was(artifact: Artifact) -> None:
    ground = Ground(artifact)
    before = {name: parameter.clone() for name, parameter in ground.model.named_parameters()}
    state = torch.get_rng_state()
    ground.settle()
    assert torch.equal(torch.get_rng_state(), state), (
        "dropout was drawn from the run's own random state"
    )
    assert all(
        torch.equal(parameter, before[name]) for name, parameter in ground.model.named_parameters()
    )
    assert all(parameter.grad is None for parameter in ground.model.parameters())


def test_a_pack_is_measured_beside_the_gradients_of_those_before_it(artifact: Artifact) -> None:
    ground = Ground(artifact)
    trained = [each for each in ground.model.parameters() if each.requires_grad]
    seen: list[bool] = []
    ground.model.register_forward_pre_hook(
        lambda module, given: seen.append(all(each.grad is not None for each in trained))
    )
    ground.probe.measure(100, False)
    assert seen == [True]


def test_galore_leaves_more_room_than_adamw(artifact: Artifact) -> None:
    settings = {"adapter": {"kind": "none"}, "model": {"quantization": "none"}}
    config = run_config(Path("unused"), **settings)
    model = load_pair_model(config, DECISIONS, lambda line: None)
    probe = Probe(
        model, build_objective(config.objective), artifact.train, 0, FakeMemory([], size=10**9)
    )
    room = {
        name: probe.room(
            1, Strategy.SINGLE, TrainingConfig(optimizer=name, galore=GaloreConfig(rank=8))
        )
        for name in ("adamw", "galore-adamw")
    }
    saved = 0
    for module in model.body.modules():
        if isinstance(module, torch.nn.Linear):
            shorter, longer = sorted(module.weight.shape)
            saved += 8 * shorter * longer - 8 * (8 * longer + 4 * shorter)
    assert saved > 10**6
    assert room["galore-adamw"] - room["adamw"] == pytest.approx(saved, abs=2)


def test_memory_on_a_cpu_grows_with_tokens_and_shrinks_with_checkpointing(
    artifact: Artifact,
) -> None:
    ground = Ground(artifact)
    probe = Probe(
        ground.model, build_objective(ground.config.objective), artifact.train, 0, CpuMemory()
    )
    small, large, recomputed = (
        probe.measure(*case) for case in ((100, False), (400, False), (400, True))
    )
    assert small is not None and large is not None and recomputed is not None
    assert 2 < large / small < 6
    assert recomputed < large
    assert 0 < CpuMemory(processes=2).free() <= CpuMemory().free()
