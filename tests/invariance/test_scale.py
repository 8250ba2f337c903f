"""Number of workers, packs and strategy change nothing but speed: one curve, however it is computed, and one resume."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from ranks import Job, run_jobs
from safetensors.torch import load_file
from support import BASE, demo_pairs, layout_of, read_metrics, settings, train_locally, write_pairs
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from orpo_ray.config import RunConfig, build
from orpo_ray.data.store import Artifact
from orpo_ray.training.plan import PACKED, PADDED
from orpo_ray.training.run_plan import plan_run, steps_of_run

pytestmark = pytest.mark.slow

TRAIN, EVAL, PAIRS_PER_STEP, STEPS = 16, 4, 8, 10
TOLERANCE = 1e-6
CLOCKS = ("train/seconds", "train/pairs_per_second")
"""Metrics that no two runs share."""
PLANTS = Path(__file__).with_name("plants.py")
STRATEGIES = ("ddp", "zero-0", "zero-1", "zero-2", "zero-3")
PLAIN: dict[str, Any] = {"model": {"quantization": "none"}}
FULL: dict[str, Any] = {**PLAIN, "adapter": {"kind": "none"}}
DPO: dict[str, Any] = {**PLAIN, "objective": {"kind": "dpo", "beta": 0.5}, "training": {"max_grad_norm": 2.0}}
"""Its gradients are between 1 and 6: clipped at first, then no more."""
BFLOAT16: dict[str, Any] = {"model": {"quantization": "none", "dtype": "bfloat16"}}
UNCLIPPED: dict[str, Any] = {**FULL, "training": {"max_grad_norm": 0.0}}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The lower half of the demo's base: as good as the whole for sums that must agree, and twice as fast."""
    folder = tmp_path_factory.mktemp("base")
    model = AutoModelForCausalLM.from_pretrained(BASE)
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(BASE).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return write_pairs(tmp_path_factory.mktemp("prepared"), demo_pairs("train", TRAIN), demo_pairs("h1", EVAL))


@dataclass
class Lab:
    """Runs jobs together, in processes that are forks of one, and keeps what came of them by the name of the run."""

    root: Path
    base: Path
    artifact: Artifact
    jobs: list[Job] = field(default_factory=list)
    raised: dict[str, list[list[str]]] = field(default_factory=dict)
    """By run, what the processes of each of its parts raised."""

    def config(
        self, name: str, workers: int = 1, strategy: str = "ddp", packs: int = 1, steps: int = STEPS, **sections: Any
    ) -> RunConfig:
        """A run that takes `packs` packs a rank in every step; no dropout unless it is asked for."""
        training = {"pairs_per_step": PAIRS_PER_STEP, "max_steps": steps, "eval_every": 5, "checkpoint_every": 1.0}
        deepspeed = {"stage": int(strategy[-1])} if strategy.startswith("zero") else "none"
        tree = settings(
            self.root,
            name,
            model={"base": str(self.base), **sections.get("model", {})},
            adapter={"dropout": 0.0, **sections.get("adapter", {})},
            objective=sections.get("objective", {"kind": "orpo"}),
            training={**training, **sections.get("training", {})},
            scale={"workers": workers, "deepspeed": deepspeed},
        )
        if tree["adapter"].get("kind") == "none":
            tree["adapter"] = {"kind": "none"}
        config = build(RunConfig, tree, {(): "test"})
        tree["training"]["tokens_per_microbatch"] = budget_of(config, self.artifact, workers, packs)
        return build(RunConfig, tree, {(): "test"})

    def add(self, name: str, workers: int = 1, *args: Any, **kwargs: Any) -> str:
        """Ask for a run, or for its next part; takes what `config` and Job take."""
        job = {key: kwargs.pop(key) for key in ("stop_at", "plant") if key in kwargs}
        if "plant" in job:
            job["plant"] = f"{PLANTS}:{job['plant']}"
        config = self.config(name, workers, *args, **kwargs)
        path = self.root / f"{len(self.jobs)}-{name}.yaml"
        path.write_text(yaml.safe_dump(config.model_dump(mode="json", by_alias=True)), encoding="utf-8")
        self.jobs.append(Job(str(path), str(self.artifact.path), workers, **job))
        return name

    def add_grid(self, **options: Any) -> list[str]:
        """Ask for a run in every cell of the grid, that of one process and one pack first."""
        return [self.add(f"{w}x{p}-{strategy}", w, strategy, p, **options) for w, p, strategy in GRID]

    def run(self, may_fail: Iterable[str] = ()) -> None:
        """Run what was asked for; every process must end as its job says."""
        wrong: dict[str, list[str]] = {}
        for job, raised in zip(self.jobs, run_jobs(self.jobs, self.root), strict=True):
            name = Path(job.config).stem.partition("-")[2]
            self.raised.setdefault(name, []).append(raised)
            stopped = f"StoppedError: stopped at step {job.stop_at} of" if job.stop_at else ""
            as_asked = all(text.startswith(stopped) and bool(text) == bool(stopped) for text in raised)
            if not as_asked and name not in may_fail:
                wrong[Path(job.config).stem] = raised
        assert not wrong
        self.jobs.clear()

    def path(self, name: str, file: str) -> Path:
        return self.root / name / file

    def curves(self, name: str) -> dict[str, list[float]]:
        """Every metric that does not tell the time, by name, in order of steps."""
        curves: dict[str, list[float]] = {}
        for line in read_metrics(self.root / name):
            for key, value in line.items():
                curves.setdefault("steps" if key == "step" else key, []).append(value)
        return {key: values for key, values in curves.items() if key not in CLOCKS}

    def noted(self, name: str, workers: int) -> list[Any]:
        """What a plant saw, by rank."""
        return [json.loads(self.path(name, f"noted-{rank}.json").read_text("utf-8")) for rank in range(workers)]

    def result(self, name: str) -> dict[str, Any]:
        result: dict[str, Any] = json.loads(self.path(name, "result.json").read_text(encoding="utf-8"))
        return result

    def state(self, name: str, step: int = STEPS) -> dict[str, Tensor]:
        return load_file(self.path(name, f"checkpoints/step-{step:06d}/state.safetensors"))


def budget_of(config: RunConfig, artifact: Artifact, workers: int, packs: int) -> int:
    """The largest token budget whose plan gives every rank so many packs in each of the first steps.

    In forty steps of other pairs each time no budget does so in all; then a few of the later ones have another number.
    """
    for budget in (100_000, *range(2000, 16, -4)):
        steps = plan_run(config, artifact.train, workers, budget, layout_of(config))
        if {len(rank) for step in steps[:STEPS] for rank in step.packs} == {packs}:
            return budget
    raise AssertionError(f"no budget gives {workers} workers {packs} packs each")


def difference(one: dict[str, list[float]], other: dict[str, list[float]]) -> float:
    """The largest difference between two runs, over all metrics and steps; they must have the same ones.

    Of numbers beyond 1, as DPO's gradient norms are, it is the relative difference.
    """
    assert one.keys() == other.keys()
    assert all(len(one[key]) == len(other[key]) for key in one)
    assert one["steps"] == other["steps"]
    return max(abs(a - b) / max(1.0, abs(b)) for key in one for a, b in zip(one[key], other[key], strict=True))


def largest(
    lab: Lab, reference: str, names: Iterable[str], only: Iterable[str] = (), besides: Iterable[str] = ()
) -> float:
    """The largest difference of some runs from another one, in all metrics but some or in some; printed for the log."""
    only, besides = set(only), set(besides)

    def curves(name: str) -> dict[str, list[float]]:
        kept = {key: values for key, values in lab.curves(name).items() if key not in besides}
        return {key: values for key, values in kept.items() if not only or key in {"steps", *only}}

    expected = curves(reference)
    found = {name: difference(curves(name), expected) for name in names}
    print("largest differences from", reference, found)
    assert found
    return max(found.values())


@pytest.fixture(scope="module")
def make_lab(base: Path, prepared: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Lab]:
    return lambda: Lab(tmp_path_factory.mktemp("runs"), base, prepared)


# --- one curve ------------------------------------------------------------------------------------------------------

GRID = [
    (workers, packs, strategy)
    for workers in (1, 2)
    for packs in (1, 3)
    for strategy in ("ddp", "zero-1", "zero-2", "zero-3")
]
OTHER_LAYOUTS = [
    (workers, strategy, layout)
    for layout in (PADDED, PACKED)
    for workers, strategy in ((1, "ddp"), (2, "ddp"), (2, "zero-2"), (2, "zero-3"))
]
ALONE, IN_STAGE_0 = "1x1-ddp", "2x3-zero-0"
CLIPPED = {"max_grad_norm": 0.3}
"""Below the gradient norm of most steps, so that clipping must be the same everywhere too."""


@pytest.fixture(scope="module")
def grid(make_lab: Callable[[], Lab]) -> Lab:
    """All of the grid, counted; and runs that must differ."""
    lab = make_lab()
    options = {**PLAIN, "training": CLIPPED}
    lab.add_grid(plant="count_updates", **options)
    lab.add(IN_STAGE_0, 2, "zero-0", 3, plant="count_updates", **options)
    for workers, strategy, layout in OTHER_LAYOUTS:
        own = {**PLAIN, "training": {**CLIPPED, "layout": layout}}
        lab.add(f"{layout}-{workers}-{strategy}", workers, strategy, 3, plant="count_updates", **own)
    lab.add("other-rate", 2, "zero-2", 3, **PLAIN, training={**CLIPPED, "learning_rate": 1.001e-3})
    for plant, strategy in (("update_at_every_pack", "zero-2"), ("reduce_at_every_pack", "ddp")):
        lab.add(plant, 2, strategy, 3, plant=plant, **options)
    lab.run()
    return lab


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_curve_is_that_of_one_process_alone(strategy: str, grid: Lab) -> None:
    """Loss, gradient norm and every other metric; the reference has no process group and no wrapper."""
    trained = train_locally(grid.config("alone", **PLAIN, training=CLIPPED), grid.artifact)
    assert trained.result["strategy"] == "single-process"
    names = [f"{w}x{p}-{strategy}" for w in (1, 2) for p in (1, 3) if grid.path(f"{w}x{p}-{strategy}", "").exists()]
    assert len(names) == (1 if strategy == "zero-0" else 4)
    for name in names:
        assert grid.result(name)["strategy"] == strategy.replace("zero", "deepspeed-zero")
        assert len(grid.result(name)["workers"]) == len(set(grid.result(name)["workers"])) == int(name[0])
    curves = grid.curves("alone")
    assert curves["steps"] == [0, *range(1, 6), 5, *range(6, 11), 10]
    assert {"train/loss", "train/grad_norm", "eval/margin", "eval/nll"} <= curves.keys()
    assert sum(norm > 0.3 for norm in curves["train/grad_norm"]) > STEPS / 2, "nothing is clipped"
    assert curves["train/loss"][0] - curves["train/loss"][-1] > 0.05, "nothing is learned"
    assert largest(grid, "alone", names) < TOLERANCE


@pytest.mark.parametrize(("workers", "strategy", "layout"), OTHER_LAYOUTS)
def test_the_curve_is_that_of_every_layout(workers: int, strategy: str, layout: str, grid: Lab) -> None:
    name = f"{layout}-{workers}-{strategy}"
    assert (grid.result(ALONE)["layout"], grid.result(name)["layout"]) == ("shared-prefix", layout)
    assert grid.noted(name, workers)[0]["packs"] == 3 * STEPS
    assert largest(grid, ALONE, [name]) < TOLERANCE


def test_the_comparison_would_notice_a_rate_that_is_a_thousandth_off(grid: Lab) -> None:
    assert largest(grid, ALONE, ["other-rate"]) > 10 * TOLERANCE


def test_the_trained_weights_are_the_same_too(grid: Lab) -> None:
    expected = load_file(grid.path(ALONE, "adapter/adapter_model.safetensors"))
    for workers, packs, strategy in GRID:
        found = load_file(grid.path(f"{workers}x{packs}-{strategy}", "adapter/adapter_model.safetensors"))
        assert found.keys() == expected.keys()
        assert max((found[name] - expected[name]).abs().max().item() for name in expected) < 1e-4, (workers, strategy)
    assert any((tensor.abs().max() > 1e-3) for name, tensor in expected.items() if "lora_B" in name)


@pytest.mark.parametrize(("workers", "packs", "strategy"), [*GRID, (2, 3, "zero-0")])
def test_a_step_is_one_optimizer_step_and_one_reduction(grid: Lab, workers: int, packs: int, strategy: str) -> None:
    name = f"{workers}x{packs}-{strategy}"
    for counts in grid.noted(name, workers):
        assert (counts["steps"], counts["packs"]) == (STEPS, STEPS * packs)
        assert counts["updates"] == STEPS
        if workers > 1:  # alone there is nothing to reduce, and accelerate does not hold it back
            assert counts["reductions"] == (STEPS if strategy == "ddp" else 0)
    counted = [tensor.item() for key, tensor in grid.state(name).items() if key.endswith("/step")]
    assert set(counted) == {STEPS}, "as Adam counts"


def test_the_counts_would_notice_a_sync_at_every_pack(grid: Lab) -> None:
    """And an update a pack changes the curve, while a reduction a pack only costs traffic."""
    assert [counts["updates"] for counts in grid.noted("update_at_every_pack", 2)] == [3 * STEPS] * 2
    assert largest(grid, ALONE, ["update_at_every_pack"]) > 1e-2
    assert [counts["reductions"] for counts in grid.noted("reduce_at_every_pack", 2)] == [3 * STEPS] * 2
    assert largest(grid, ALONE, ["reduce_at_every_pack"]) < TOLERANCE


# --- formats and kinds ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """What is trained in which format, and under which strategies beside one worker."""

    sections: dict[str, Any]
    strategies: tuple[str, ...]
    steps: int = 5


KINDS = {
    "nf4": Kind({}, ("ddp", "zero-1", "zero-2", "zero-3"), steps=STEPS),
    "bfloat16": Kind(BFLOAT16, STRATEGIES),
    "dora": Kind({**PLAIN, "adapter": {"dora": True}}, ("ddp", "zero-2", "zero-3")),
    "full": Kind(FULL, ("ddp", "zero-1", "zero-2", "zero-3")),
    # At this rank the matrices are large enough for bitsandbytes to keep 8-bit state.
    "adamw-8bit": Kind({**PLAIN, "adapter": {"r": 32}, "training": {"optimizer": "adamw-8bit"}}, ("ddp", "zero-0")),
    "int8": Kind({"model": {"quantization": "int8"}}, ("ddp", "zero-2")),
    "trl": Kind({**DPO, "training": {**DPO["training"], "engine": "trl"}}, ("ddp", "zero-0", "zero-2", "zero-3")),
    # Its baseline is a mean over a pack, so that it has no one curve.
    "kto": Kind({**PLAIN, "objective": {"kind": "kto", "beta": 0.5}, "training": {"engine": "trl"}}, ("ddp", "zero-2")),
}


@pytest.fixture(scope="module")
def kinds(make_lab: Callable[[], Lab]) -> Lab:
    """Each kind with one worker, and with two workers and three packs under its strategies."""
    lab = make_lab()
    for name, kind in KINDS.items():
        options = {"steps": kind.steps, "plant": "count_updates", **kind.sections}
        lab.add(name, **options)
        for strategy in kind.strategies:
            lab.add(f"{name}-{strategy}", 2, strategy, 3, **options)
    lab.run()
    return lab


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_learns(kind: str, kinds: Lab) -> None:
    losses = kinds.curves(kind)["train/loss"]
    assert len(losses) == KINDS[kind].steps
    assert abs(losses[0] - losses[-1]) > 0.05


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"full", "bfloat16", "kto"}))
def test_every_kind_has_one_curve(kind: str, kinds: Lab) -> None:
    names = [f"{kind}-{strategy}" for strategy in KINDS[kind].strategies]
    # DPO's gradient norms, which TRL's head sums up in tiles that depend on the pack.
    assert largest(kinds, kind, names) < (2 * TOLERANCE if kind == "trl" else TOLERANCE)


def test_a_whole_model_has_one_curve(kinds: Lab) -> None:
    """The norm of so many gradients is a sum of as many float32 numbers, which ZeRO adds in another order."""
    names = [f"full-{strategy}" for strategy in KINDS["full"].strategies]
    assert largest(kinds, "full", names, besides=["train/grad_norm"]) < TOLERANCE
    assert largest(kinds, "full", names, only=["train/grad_norm"]) < 10 * TOLERANCE
    assert max(kinds.curves("full")["train/grad_norm"]) > 1, "nothing is clipped"


def test_losses_in_bfloat16_agree_within_a_thousandth(tmp_path: Path) -> None:
    """A weight that differs by 1e-8 may round to another bfloat16 number, so a loss is the mean of many pairs here."""
    lab = Lab(tmp_path, BASE, write_pairs(tmp_path, demo_pairs("train", 36), demo_pairs("h1", EVAL)))
    options = {**BFLOAT16, "training": {"pairs_per_step": 36}}
    reference, *names = lab.add_grid(**options)
    names.append(lab.add(IN_STAGE_0, 2, "zero-0", 3, **options))
    lab.run()
    assert largest(lab, reference, names, only=["train/loss"]) < 1e-3
    losses = lab.curves(reference)["train/loss"]
    assert abs(losses[0] - losses[-1]) > 0.03


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_trained_is_float32_under_every_strategy(kind: str, kinds: Lab) -> None:
    for strategy in KINDS[kind].strategies:
        name = f"{kind}-{strategy}"
        assert [counts["formats"] for counts in kinds.noted(name, 2)] == [["torch.float32"]] * 2, name
        state = kinds.state(name, KINDS[kind].steps)
        assert {tensor.dtype for key, tensor in state.items() if key.endswith("/master")} == {torch.float32}
        (weights,) = kinds.path(name, "adapter").glob("*.safetensors")
        assert {tensor.dtype for tensor in load_file(weights).values()} == {torch.float32}, name


def test_8_bit_state_is_8_bit_under_deepspeed_too(kinds: Lab) -> None:
    for strategy in KINDS["adamw-8bit"].strategies:
        state = kinds.state(f"adamw-8bit-{strategy}", KINDS["adamw-8bit"].steps)
        assert {tensor.dtype for key, tensor in state.items() if key.endswith("state1")} == {torch.uint8}


@pytest.mark.parametrize("strategy", KINDS["full"].strategies)
def test_a_whole_model_is_saved_whole_and_judges_as_was_reported(strategy: str, kinds: Lab) -> None:
    name = f"full-{strategy}"
    model = AutoModelForCausalLM.from_pretrained(kinds.path(name, "adapter"))
    shapes = {
        key: tensor.shape for key, tensor in AutoModelForCausalLM.from_pretrained(kinds.base).state_dict().items()
    }
    assert {key: tensor.shape for key, tensor in model.state_dict().items()} == shapes
    means = [mean_log_prob(model, pair.prompt, pair.chosen) for pair in kinds.artifact.eval]
    reported = kinds.result(name)["metrics"]["eval/chosen_logp"]
    assert reported == pytest.approx(np.mean(means), rel=1e-5)
    assert reported != pytest.approx(kinds.curves(name)["eval/chosen_logp"][0], rel=1e-3), "nothing is learned"


@torch.no_grad()
def mean_log_prob(model: torch.nn.Module, prompt: np.ndarray, answer: np.ndarray) -> float:
    """Log-prob per token of an answer from full logits."""
    ids = torch.from_numpy(np.concatenate([prompt, answer]).astype(np.int64))
    log_probs = model(input_ids=ids[None]).logits[0].log_softmax(-1)
    return log_probs[len(prompt) - 1 : -1].gather(-1, ids[len(prompt) :, None]).mean().item()


# --- another number of workers at a resume --------------------------------------------------------------------------


@dataclass(frozen=True)
class Chain:
    """A run in parts, each with its workers, its strategy, and the step it stops at."""

    parts: tuple[tuple[int, str, int | None], ...]
    sections: dict[str, Any]
    steps: int


CHAINS = {
    "lora": Chain(((2, "zero-2", 3), (1, "ddp", 5), (2, "zero-3", 7), (3, "zero-2", None)), PLAIN, STEPS),
    "full": Chain(
        ((2, "zero-1", 2), (3, "zero-3", 3), (1, "ddp", 4), (3, "zero-2", 5), (2, "zero-3", None)), UNCLIPPED, 6
    ),
    "dpo": Chain(((2, "zero-2", 2), (1, "zero-3", 3), (2, "zero-0", None)), DPO, 5),
}


@pytest.fixture(scope="module")
def chains(make_lab: Callable[[], Lab]) -> Lab:
    lab = make_lab()
    for name, chain in CHAINS.items():
        lab.add(f"{name}-unbroken", steps=chain.steps, **chain.sections)
        for workers, strategy, stop_at in chain.parts:
            lab.add(name, workers, strategy, stop_at=stop_at, steps=chain.steps, **chain.sections)
    lab.run()
    return lab


@pytest.mark.parametrize("name", CHAINS)
def test_a_run_goes_on_under_another_strategy_and_number_of_workers(name: str, chains: Lab) -> None:
    chain = CHAINS[name]
    expected = chains.curves(f"{name}-unbroken")["train/loss"]
    assert len(set(expected[1:])) == len(expected[1:]) == chain.steps - 1, "the first step only warms up"
    assert largest(chains, f"{name}-unbroken", [name], besides=["train/grad_norm"]) < TOLERANCE
    assert largest(chains, f"{name}-unbroken", [name], only=["train/grad_norm"]) < 10 * TOLERANCE
    clipped_at = chain.sections.get("training", {}).get("max_grad_norm")
    if clipped_at is not None:
        assert max(chains.curves(name)["train/grad_norm"]) > max(clipped_at, 1.0)
    numbers = [line["step"] for line in read_metrics(chains.root / name) if "train/loss" in line]
    assert numbers == list(range(1, chain.steps + 1)), "each step once"
    workers, strategy, _ = chain.parts[-1]
    assert chains.result(name)["strategy"] == f"deepspeed-{strategy}"
    assert len(chains.result(name)["workers"]) == workers


@pytest.mark.parametrize("name", CHAINS)
def test_the_optimizer_state_goes_along(name: str, chains: Lab) -> None:
    steps = CHAINS[name].steps
    state, expected = chains.state(name, steps), chains.state(f"{name}-unbroken", steps)
    assert state.keys() == expected.keys()
    for key, tensor in state.items():
        assert tensor.shape == expected[key].shape, key
        if key.endswith("/step"):
            assert tensor.item() == steps
        elif not key.endswith("/master"):
            assert (tensor - expected[key]).abs().max() <= 1e-4 * expected[key].abs().max() + 1e-9, key


@pytest.mark.parametrize("name", ["lora", "full"])
def test_some_sizes_do_not_divide_by_the_workers(name: str, chains: Lab) -> None:
    state = chains.state(name, CHAINS[name].steps)
    assert any(tensor.numel() % 3 for key, tensor in state.items() if key.endswith("/master"))


def test_the_reference_is_computed_once_for_the_whole_chain(chains: Lab) -> None:
    """And for the unbroken run as well."""
    assert len(list((chains.root / "references").iterdir())) == 1
    assert chains.curves("dpo")["train/loss"][0] == pytest.approx(np.log(2), abs=1e-6)


# --- dropout --------------------------------------------------------------------------------------------------------

DROPOUT = {**PLAIN, "adapter": {"dropout": 0.3}}


@pytest.fixture(scope="module")
def dropout(make_lab: Callable[[], Lab]) -> Lab:
    lab = make_lab()
    for strategy in ("ddp", "zero-2"):
        lab.add(f"{strategy}-unbroken", 2, strategy, 3, steps=4, plant="note_dropout", **DROPOUT)
        for stop_at in (2, None):
            lab.add(strategy, 2, strategy, 3, steps=4, stop_at=stop_at, **DROPOUT)
    lab.add("without", 2, "ddp", 3, steps=4, plant="note_fetches", **PLAIN)
    lab.run()
    return lab


@pytest.mark.parametrize("strategy", ["ddp", "zero-2"])
def test_with_dropout_a_resume_on_as_many_workers_is_exact(strategy: str, dropout: Lab) -> None:
    for file in ("adapter/adapter_model.safetensors", "checkpoints/step-000004/state.safetensors"):
        assert dropout.path(strategy, file).read_bytes() == dropout.path(f"{strategy}-unbroken", file).read_bytes()
    assert dropout.curves(strategy) == dropout.curves(f"{strategy}-unbroken")
    assert largest(dropout, "without", [strategy]) > 1e-2, "there is no dropout"


@pytest.mark.parametrize("strategy", ["ddp", "zero-2"])
def test_each_rank_draws_its_own_dropout(strategy: str, dropout: Lab) -> None:
    masks = [tuple(mask) for rank in dropout.noted(f"{strategy}-unbroken", 2) for mask in rank.values()]
    assert len(masks) == 2 * 4
    assert len(set(masks)) == len(masks), "nor twice in the run"


def test_the_base_is_fetched_once_a_server_and_not_loaded_before(dropout: Lab) -> None:
    """Both processes are on this one."""
    nobody_early = {"loads_too_early": 0}
    assert dropout.noted("without", 2) == [{"fetches": 1, **nobody_early}, {"fetches": 0, **nobody_early}]


def test_an_adapted_head_is_refused_where_workers_could_not_stay_in_step(make_lab: Callable[[], Lab]) -> None:
    lab = make_lab()
    adapter = {"targets": ["q_proj", "lm_head"]}
    lab.add("head", 2, "zero-3", steps=2, **PLAIN, adapter=adapter)
    lab.run(may_fail=["head"])
    (raised,) = lab.raised["head"]
    assert all(text.startswith("ConfigError: adapter.targets: an adapted or quantised head") for text in raised)


# --- numbers that are not finite ------------------------------------------------------------------------------------

FAULTS = ("loss_is_nan", "gradient_is_nan")


@pytest.fixture(scope="module")
def faults(make_lab: Callable[[], Lab]) -> Lab:
    lab = make_lab()
    names = [
        lab.add(f"{plant}-{strategy}", 2, strategy, 3, steps=4, plant=plant, **PLAIN, training={"checkpoint_every": 1})
        for plant in FAULTS
        for strategy in STRATEGIES
    ]
    lab.run(may_fail=names)
    return lab


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_number_that_is_not_finite_on_one_rank_ends_the_run_on_all(fault: str, strategy: str, faults: Lab) -> None:
    name = f"{fault}-{strategy}"
    config = faults.config(name, 2, strategy, 3, steps=4, **PLAIN)
    third = steps_of_run(config, len(faults.artifact.train))[2]
    pairs = ", ".join(faults.artifact.train.pair_ids[index] for index in third)
    ((first, second),) = faults.raised[name]
    what = "loss|gradient" if fault == "loss_is_nan" else "gradient"
    for raised in (first, second):
        assert raised.startswith("NonFiniteError: the ")
        assert raised.split()[2] in what.split("|")
        assert " of step 3 is not finite; no weight was changed by it." in raised
        assert f"Its pairs: {pairs}." in raised
    assert [folder.name for folder in sorted(faults.path(name, "checkpoints").iterdir())] == [
        "step-000001",
        "step-000002",
    ]
    assert faults.curves(name)["steps"] == [0, 1, 2]
    for noted in faults.noted(name, 2):
        assert noted["same_names"]
        assert noted["compared"] > 4 * 28 / 2
        assert noted["changed"] == []


# --- fewer pairs than workers ---------------------------------------------------------------------------------------


def test_a_step_with_fewer_pairs_than_workers_is_as_on_one_worker(
    base: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    few = write_pairs(tmp_path_factory.mktemp("few"), demo_pairs("train", 8), demo_pairs("h1", 2))
    lab = Lab(tmp_path_factory.mktemp("runs"), base, few)
    options = {**PLAIN, "steps": 4, "training": {"pairs_per_step": 6, "eval_every": 2}}
    lab.add("alone", **options)
    names = [lab.add(strategy, 3, strategy, **options) for strategy in ("ddp", "zero-2", "zero-3")]
    config = lab.config("unused", 3, **options)
    steps = plan_run(config, few.train, 3, config.training.tokens_per_microbatch, layout_of(config))
    assert [len(step.pairs) for step in steps] == [6, 2, 6, 2]
    assert [sorted(pack.weight for rank in step.packs for pack in rank) for step in steps[:2]] == [[1, 1, 1], [0, 1, 1]]
    lab.run()
    assert largest(lab, "alone", names) < TOLERANCE


# --- TRL inside -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", [{"kind": "dpo"}, {"kind": "orpo", "nll_on": "full"}, {"kind": "kto"}])
def test_trl_trains_where_workers_have_packs_of_other_sizes(
    objective: dict[str, Any], make_lab: Callable[[], Lab]
) -> None:
    """Seven pairs for two workers, and two in the last step: what TRL gathers for its metrics wants equal ones."""
    lab = make_lab()
    options = {**PLAIN, "objective": objective, "training": {"engine": "trl", "pairs_per_step": 7}, "steps": 4}
    names = [lab.add(strategy, 2, strategy, **options) for strategy in ("ddp", "zero-2")]
    lab.add("alone", **options)
    lab.run()
    assert largest(lab, names[0], names[1:]) < 2 * TOLERANCE
    if objective["kind"] == "dpo":  # a mean over pairs, whatever the micro-batches
        assert largest(lab, "alone", names) < 2 * TOLERANCE


# --- forty steps ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_the_curve_is_still_one_after_forty_steps(quantization: str, make_lab: Callable[[], Lab]) -> None:
    lab = make_lab()
    alone, *names = lab.add_grid(model={"quantization": quantization}, steps=40, training={"eval_every": 20})
    lab.run()
    losses = lab.curves(alone)["train/loss"]
    assert len(losses) == 40
    assert losses[0] - losses[-1] > 0.3
    assert largest(lab, alone, names) < TOLERANCE
