"""Memory settings do not change the result.

The curve is the same for every way to cut, recompute or order a step.
"""

from collections.abc import Iterable, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support import (
    BASE,
    Trained,
    decided,
    demo_pairs,
    layout_of,
    make_artifact,
    run_config,
    train_locally,
    write_pairs,
)
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile

from orpo_ray.config import ModelConfig
from orpo_ray.config.objectives.orpo import OrpoConfig
from orpo_ray.config.run import RunConfig
from orpo_ray.data.store import Artifact
from orpo_ray.models.base import count_quantized, load_base
from orpo_ray.objectives import build_objective, loss_parts
from orpo_ray.training.layout import collate
from orpo_ray.training.load import load_pair_model
from orpo_ray.training.logprobs import pair_logps
from orpo_ray.training.metrics import score_pairs
from orpo_ray.training.pair_model import PairModel
from orpo_ray.training.plan import PACKED, PADDED, SHARED_PREFIX
from orpo_ray.training.run_plan import plan_run
from orpo_ray.training.trainer import PreferenceTrainer

STEPS, PAIRS_PER_STEP, PAIRS = 6, 5, 22
"""The fifth step is smaller than the others and ends the first epoch."""

LOSS, TENSOR = 1e-6, 1e-5
"""The largest relative difference of a loss, and of other values as whole vectors.

These are the adapter's change and the moving means of its gradients.
"""

BUDGETS = (100, 160, 10_000)
OBJECTIVES: dict[str, Mapping[str, Any]] = {
    "orpo-response": {"kind": "orpo", "lambda": 0.5, "nll_on": "response"},
    "orpo-full": {"kind": "orpo", "lambda": 0.5, "nll_on": "full"},
    "dpo": {"kind": "dpo", "nll_weight": 0.2},
    "simpo": {"kind": "simpo"},
}
QUANTIZATIONS = ("none", "nf4")


def cases(first: Iterable[str], *kept: tuple[str, str]) -> list[Any]:
    """Every case with every quantisation; most of them run in `make test-long` only."""
    return [
        pytest.param(*case, marks=() if case in kept else pytest.mark.long)
        for case in product(first, QUANTIZATIONS)
    ]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Few pairs, so that STEPS steps go into the second epoch."""
    return make_artifact(tmp_path_factory.mktemp("few"), train=PAIRS)


def train(
    storage: Path, artifact: Artifact, name: str, quantization: str = "none", **sections: Any
) -> Trained:
    """STEPS steps without dropout; activations are kept, so that no memory is measured."""
    own = {
        "max_steps": STEPS,
        "pairs_per_step": PAIRS_PER_STEP,
        "eval_every": STEPS,
        "checkpoint_every": STEPS,
    }
    training = {**own, "gradient_checkpointing": False, **sections.pop("training", {})}
    adapter = {"dropout": 0.0, **sections.pop("adapter", {})}
    model = {"quantization": quantization, **sections.pop("model", {})}
    return train_locally(
        run_config(storage, name, model=model, training=training, adapter=adapter, **sections),
        artifact,
    )


def assert_same_curve(one: Trained, other: Trained) -> None:
    """Losses, evaluations, adapter and gradients are equal up to the order of additions."""
    assert len(one.losses) == len(other.losses) == STEPS
    np.testing.assert_allclose(other.losses, one.losses, rtol=LOSS)
    for ours, theirs in zip(one.metrics, other.metrics, strict=True):
        names = [name for name in ours if name.startswith("eval/") or name == "train/grad_norm"]
        np.testing.assert_allclose(
            [theirs[n] for n in names], [ours[n] for n in names], rtol=TENSOR, atol=LOSS
        )
    assert relative_difference(state(one, "exp_avg"), state(other, "exp_avg")) < TENSOR
    assert relative_difference(one.adapter, other.adapter) < TENSOR


def state(trained: Trained, key: str) -> dict[str, Tensor]:
    """One key of the last checkpoint's optimizer state, such as exp_avg, the mean of gradients."""
    tensors = load_file(trained.run_dir / "checkpoints" / f"step-{STEPS:06d}" / "state.safetensors")
    found = {name: tensor for name, tensor in tensors.items() if name.endswith(f"/{key}")}
    assert found and any(tensor.abs().max() > 0 for tensor in found.values())
    return found


def relative_difference(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Length of the difference over the length, all tensors taken as one vector."""
    assert one.keys() == other.keys()
    difference = sum((one[name] - other[name]).double().square().sum() for name in one)
    return float(
        (difference / sum(tensor.double().square().sum() for tensor in one.values())).sqrt()
    )


@pytest.mark.parametrize(
    ("objective", "quantization"),
    cases(
        OBJECTIVES,
        ("orpo-response", "nf4"),
        ("orpo-full", "none"),
        ("dpo", "none"),
        ("simpo", "nf4"),
    ),
)
def test_the_token_budget_does_not_change_the_run(
    objective: str, quantization: str, artifact: Artifact, tmp_path: Path
) -> None:
    """The run is like a user's: memory is measured at the start."""
    runs = [
        train(
            tmp_path,
            artifact,
            f"budget-{budget}",
            quantization,
            objective=OBJECTIVES[objective],
            training={"tokens_per_microbatch": budget, "gradient_checkpointing": "auto"},
        )
        for budget in BUDGETS
    ]
    for other in runs[1:]:
        assert_same_curve(runs[0], other)


def test_the_budgets_do_cut_steps_differently(artifact: Artifact, tmp_path: Path) -> None:
    config = run_config(tmp_path, training={"pairs_per_step": PAIRS_PER_STEP})
    layout = layout_of(config)
    packs = [
        [len(step.packs[0]) for step in plan_run(config, artifact.train, 1, budget, layout)]
        for budget in BUDGETS
    ]
    assert packs[0] == [5, 5, 5, 5, 2] * 2
    assert packs[2] == [1] * 10
    assert all(one < several <= many for many, several, one in zip(*packs, strict=True) if many > 2)


@pytest.mark.parametrize(
    ("objective", "quantization"),
    cases(
        OBJECTIVES,
        ("orpo-response", "none"),
        ("orpo-full", "nf4"),
        ("dpo", "nf4"),
        ("simpo", "none"),
    ),
)
def test_the_layout_does_not_change_the_run(
    objective: str, quantization: str, base: Path, artifact: Artifact, tmp_path: Path
) -> None:
    """DPO's reference is computed in the layout of its run."""
    padded, *others = [
        train(
            tmp_path / layout,
            artifact,
            layout,
            quantization,
            model={"base": str(base)},
            objective=OBJECTIVES[objective],
            training={"tokens_per_microbatch": 400, "layout": layout},
        )
        for layout in (PADDED, PACKED, SHARED_PREFIX)
    ]
    for other in others:
        assert_same_curve(padded, other)


@pytest.mark.parametrize(
    ("layout", "quantization"),
    cases(
        (PADDED, PACKED, SHARED_PREFIX), (PADDED, "none"), (PACKED, "nf4"), (SHARED_PREFIX, "nf4")
    ),
)
def test_recomputed_activations_do_not_change_the_run(
    layout: str, quantization: str, base: Path, artifact: Artifact, tmp_path: Path
) -> None:
    """With dropout: the recomputed forward must draw the same mask."""
    off, on = (
        train(
            tmp_path,
            artifact,
            f"checkpointing-{on}",
            quantization,
            model={"base": str(base)},
            training={"gradient_checkpointing": on, "layout": layout},
            adapter={"dropout": 0.2},
        )
        for on in (False, True)
    )
    assert_same_curve(off, on)


def test_the_order_of_the_pairs_within_a_step_does_not_change_the_run(tmp_path: Path) -> None:
    """Every step takes all pairs; the two artifacts have them in opposite orders."""
    pairs, evaluation = demo_pairs("train", 12), demo_pairs("h1", 4)
    training = {"pairs_per_step": 12, "tokens_per_microbatch": 400}
    forward, backward = (
        train(tmp_path, write_pairs(tmp_path / name, ordered, evaluation), name, training=training)
        for name, ordered in (("forward", pairs), ("backward", pairs[::-1]))
    )
    assert_same_curve(forward, backward)


def test_the_comparison_would_notice_a_wrong_scale(artifact: Artifact, tmp_path: Path) -> None:
    """A change of 0.01 % of the preference term is found, so the tests above can fail."""
    one, other = (
        train(tmp_path, artifact, f"lambda-{weight}", objective={"kind": "orpo", "lambda": weight})
        for weight in (0.5, 0.50005)
    )
    with pytest.raises(AssertionError):
        assert_same_curve(one, other)


# --- what the host waits for ----------------------------------------------------------------------

READS = {
    torch.Tensor.item,
    torch.Tensor.tolist,
    torch.Tensor.cpu,
    torch.Tensor.numpy,
    torch.Tensor.nonzero,
    torch.Tensor.__bool__,
    torch.Tensor.__int__,
    torch.Tensor.__float__,
    torch.Tensor.__index__,
}
"""Calls that make the host wait until a GPU has done all its work."""


class CountReads(TorchFunctionMode):
    """Counts how often the host reads numbers of the device, in Python."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.count += function in READS
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("layout", "quantization"),
    cases((PACKED, SHARED_PREFIX), (PACKED, "none"), (SHARED_PREFIX, "nf4")),
)
def test_the_host_waits_once_a_step_however_many_packs_there_are(
    layout: str,
    quantization: str,
    base: Path,
    artifact: Artifact,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Padded rows are not tested, because transformers reads every mask of theirs."""
    seen: dict[int, tuple[int, int]] = {}
    original = PreferenceTrainer.training_step

    def counted(self: PreferenceTrainer, model: Any, inputs: Any, *args: Any) -> Tensor:
        with CountReads() as reads, profile(activities=[ProfilerActivity.CPU]) as profiled:
            loss = original(self, model, inputs, *args)
        # Reads that C++ makes. On a CPU, `tolist` makes none of them, so CountReads counts it.
        reading = [
            event
            for event in profiled.events()
            if event.name in ("aten::_local_scalar_dense", "aten::nonzero")
        ]
        seen[len(inputs.packs)] = (reads.count, len(reading))
        return loss

    monkeypatch.setattr(PreferenceTrainer, "training_step", counted)
    for budget in (40, 10_000):
        train(
            tmp_path,
            artifact,
            f"budget-{budget}",
            quantization,
            model={"base": str(base)},
            training={
                "tokens_per_microbatch": budget,
                "layout": layout,
                "gradient_checkpointing": True,
                "max_steps": 1,
                "warmup": 0,
                "eval_every": 1,
                "checkpoint_every": 1,
            },
        )
    assert seen == {PAIRS_PER_STEP: (1, 0), 1: (1, 0)}


# --- shares of packs and ranks --------------------------------------------------------------------


@pytest.mark.parametrize("layout", [PADDED, PACKED, SHARED_PREFIX])
@pytest.mark.parametrize("objective", [{"kind": "orpo", "nll_on": "full"}, {"kind": "cpo"}])
def test_the_shares_of_all_ranks_add_up_to_the_loss_of_the_step(
    objective: dict[str, Any], layout: str, artifact: Artifact
) -> None:
    """This holds for any number of ranks, budget and layout. Packs of weight 0 add nothing."""
    config = run_config(Path("unused"), adapter={"dropout": 0.0}, objective=objective)
    model = load_pair_model(config, CPU, print).eval()
    whole = planned_loss(model, config, artifact, PADDED, world_size=1, budget=100_000)
    idle = 0
    for world_size, budget in ((1, 100), (3, 100), (3, 400), (5, 100_000)):
        step = plan_run(config, artifact.train, world_size, budget, layout)[0]
        idle += sum(pack.weight == 0.0 for rank in step.packs for pack in rank)
        assert planned_loss(model, config, artifact, layout, world_size, budget) == pytest.approx(
            whole, rel=LOSS
        )
    assert idle, "no rank was ever without work"


CPU = decided(10_000)


@torch.no_grad()
def planned_loss(
    model: PairModel,
    config: RunConfig,
    artifact: Artifact,
    layout: str,
    world_size: int,
    budget: int,
) -> float:
    """The loss of the first step, as the sum over all packs of all ranks."""
    objective = build_objective(config.objective)
    step = plan_run(config, artifact.train, world_size, budget, layout)[0]
    lengths = artifact.train.lengths[step.pairs]
    tokens = int(lengths[:, 1].sum())
    if objective.nll_on == "full":
        tokens += int((lengths[:, 0] - 1).sum())
    model.use_layout(layout)
    total = 0.0
    for pack in (pack for rank in step.packs for pack in rank):
        batch = collate(
            [artifact.train[i] for i in pack.pairs],
            layout,
            0,
            score_prompt=objective.nll_on == "full",
        )
        parts = loss_parts(objective, pair_logps(model(batch), batch), len(step.pairs), tokens)
        total += pack.weight * float(parts.total)
    return total


# --- evaluation before training -------------------------------------------------------------------


@pytest.fixture
def avx512bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make bitsandbytes believe that this CPU has AVX512-BF16.

    For such a CPU it repacks 4-bit weights at an evaluation.
    """
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: True)


@pytest.mark.usefixtures("avx512bf16")
def test_four_bit_weights_are_never_repacked_by_an_evaluation(artifact: Artifact) -> None:
    """The repacked form has no backward pass and computes in bfloat16, so no CPU may get it."""
    model = load_base(ModelConfig(base=str(BASE)), "cpu", "float32", "sdpa", trainable=False)
    assert count_quantized(model) == 28
    before = {name: weight.clone() for name, weight in four_bit_weights(model).items()}
    score_pairs(PairModel(model.eval()), artifact.eval, 0, 10_000)
    for name, module in four_bit_modules(model).items():
        assert not module.support_avx512bf16_for_cpu, name
        assert not getattr(module.weight.quant_state, "packing_format_for_cpu", False), name
    assert all(
        torch.equal(weight, before[name]) for name, weight in four_bit_weights(model).items()
    )


@pytest.mark.usefixtures("avx512bf16")
def test_gradients_after_an_evaluation_are_those_of_a_model_never_evaluated(
    artifact: Artifact,
) -> None:
    fresh, evaluated = (gradients(artifact, evaluate_first=first) for first in (False, True))
    assert len(fresh) == 28, "lora_B of every linear layer: lora_A has none while B is zero"
    assert relative_difference(fresh, evaluated) == 0.0


def gradients(artifact: Artifact, evaluate_first: bool) -> dict[str, Tensor]:
    """The adapter gradients of ORPO over a few pairs, without those that are zero."""
    config = run_config(Path("unused"), adapter={"dropout": 0.0})
    model = load_pair_model(config, CPU, print)
    if evaluate_first:
        score_pairs(model, artifact.eval, 0, 10_000)
    model.train()
    batch = collate([artifact.train[i] for i in range(4)], PADDED, 0, score_prompt=False)
    pairs = pair_logps(model(batch), batch)
    loss_parts(
        build_objective(OrpoConfig()), pairs, 4, int(batch.chosen_tokens.sum())
    ).total.backward()
    return {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and parameter.grad.abs().max() > 0
    }


def four_bit_modules(model: torch.nn.Module) -> dict[str, bnb.nn.Linear4bit]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, bnb.nn.Linear4bit)
    }


def four_bit_weights(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: module.weight.data for name, module in four_bit_modules(model).items()}
