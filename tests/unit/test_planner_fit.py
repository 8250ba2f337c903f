"""Whether a run fits: the planner decides as the run does, and what it says of a lack is true."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from test_shapes import SMALL

from orpo_ray.config import RunConfig, build
from orpo_ray.planner.fit import Request, fit, total
from orpo_ray.planner.hardware import Gpu, find_gpus, find_network
from orpo_ray.planner.lengths import Lengths
from orpo_ray.planner.memory import Method, bytes_of_batch, held
from orpo_ray.planner.plan import Paper, Place
from orpo_ray.planner.shapes import Shape, known_shape, read_shape
from orpo_ray.planner.stock import CUBLAS_WORKSPACE, context_bytes
from orpo_ray.training.budget import MOST_TOKENS, Sizes, find_budget, sample_pack, usable
from orpo_ray.training.strategy import ModelSize, Strategy

GIB = 2**30
L4 = find_gpus("l4")[0]


def shape_of(base: str) -> Shape:
    found = known_shape(base)
    assert found is not None
    return found


SMALLER, LARGER = shape_of("Qwen/Qwen2.5-0.5B"), shape_of("meta-llama/Llama-3.1-8B")


def request(**changes: Any) -> Request:
    """A QLoRA run of pairs of 40 to 1,000 tokens, in steps of 20,000."""
    sizes = np.linspace(40, 1000, 200).astype(np.int64)
    defaults: dict[str, Any] = {
        "shape": LARGER,
        "method": Method(),
        "strategy": Strategy.SINGLE,
        "lengths": np.stack([sizes // 4, sizes // 2, sizes // 4], axis=1),
        "step": 20_000,
        "tokens": None,
        "checkpointing": None,
    }
    return Request(**{**defaults, **changes})


def with_memory(gib: float) -> Gpu:
    return replace(L4, memory=int(gib * GIB))


def paper(base: str = "meta-llama/Llama-3.1-8B", longest: int = 1024, **sections: Any) -> Paper:
    tree = {
        "name": "p",
        "model": {"base": base, **sections.pop("model", {})},
        "data": {"train": ["owner/pairs"], "max_length": longest},
        **sections,
    }
    lengths = np.array([[longest // 2, longest // 2, longest // 4]] * 40, dtype=np.int64)
    return Paper(
        config=build(RunConfig, tree, {(): "tests"}),
        shape=shape_of(base),
        lengths=Lengths(lengths=lengths, pairs=40, held_out=4, source="tests"),
        place=Place(network=find_network("1gbit")),
    )


@pytest.mark.parametrize("gib", [9, 12, 16, 24, 80])
@pytest.mark.parametrize("checkpointing", [None, True, False])
def test_the_decision_is_that_of_a_run_which_measures_the_same(gib, checkpointing):
    asked, gpu = request(checkpointing=checkpointing), with_memory(gib)
    shape, method = asked.shape, asked.method

    def measure(tokens: int, recomputed: bool) -> int:
        pack = asked.batch(sample_pack(asked.costs, tokens))
        return int(bytes_of_batch(shape, replace(method, checkpointing=recomputed), pack))

    parts = held(shape, method)
    free = gpu.memory - context_bytes(gpu.name, 1) - CUBLAS_WORKSPACE
    free -= int(parts["weights"] + parts["adapter"])
    trained = shape.lora(16, "all-linear")
    room = usable(free, ModelSize(0, trained, 8.0), 1, Strategy.SINGLE)
    another = asked.costs.of(sample_pack(asked.costs, 2000))
    wanted = find_budget(measure, room, Sizes(1000, another, 20_000, MOST_TOKENS), checkpointing)
    found = fit(asked, gpu)
    assert wanted is not None or gib == 9 or checkpointing is False
    assert found.tokens == (wanted and wanted.tokens)
    if wanted is not None:
        assert found.method.checkpointing == wanted.checkpointing


@pytest.mark.parametrize("checkpointing", [True, False])
def test_more_memory_never_gives_fewer_tokens(checkpointing):
    asked = request(checkpointing=checkpointing)
    tokens = [fit(asked, with_memory(gib)).tokens or 0 for gib in range(4, 96, 4)]
    assert tokens == sorted(tokens)
    assert tokens[0] == 0 < tokens[-1]


def test_a_larger_base_never_fits_where_a_smaller_one_does_not():
    for gib in np.arange(1, 20, 0.5):
        large, small = (
            fit(request(shape=shape), with_memory(gib)).tokens for shape in (LARGER, SMALLER)
        )
        assert large is None or small is not None, gib


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tokens": 8000, "checkpointing": True},
        {"checkpointing": False},
        {"learnt": 1.2},
        {"method": Method(quantization="none")},
        {"untried": True, "tokens": 8000, "checkpointing": True},
    ],
)
@pytest.mark.parametrize("gib", [1, 4, 6.5])
def test_the_run_fits_once_the_missing_memory_is_there_and_not_before(changes, gib):
    asked, gpu = request(**changes), with_memory(gib)
    found = fit(asked, gpu)
    assert found.tokens is None and found.missing > 0
    assert fit(asked, with_memory(200)).missing == 0
    enough = replace(gpu, memory=gpu.memory + int(found.missing) + 2**20)
    assert fit(asked, enough).tokens is not None
    assert fit(asked, enough).missing == 0
    short = replace(gpu, memory=gpu.memory + int(found.missing) - 2**20)
    assert fit(asked, short).tokens is None


def test_tokens_that_are_set_are_kept_or_do_not_fit():
    """The run takes what is set, and ends if the largest pack does not fit."""
    gpu = with_memory(12)
    own = fit(request(checkpointing=True), gpu).tokens
    assert own is not None and 2000 < own < 20_000
    assert fit(request(checkpointing=True, tokens=own - 500), gpu).tokens == own - 500
    assert fit(request(checkpointing=True, tokens=own + 5000), gpu).tokens is None
    # No pack is larger than a step.
    small = request(checkpointing=True, tokens=50_000, step=own - 1000)
    assert fit(small, gpu).tokens == 50_000


@pytest.mark.parametrize("learnt", [0.5, 1.0, 1.2])
def test_what_runs_have_taken_scales_micro_batches_and_no_weights(learnt):
    given = {"tokens": 8000, "checkpointing": True}
    by_law, found = (fit(request(**given, learnt=each), L4).parts for each in (1.0, learnt))
    for name in ("activations", "layer", "head"):
        assert found[name] == pytest.approx(learnt * by_law[name])
    for name in ("weights", "adapter", "gradients", "optimizer", "context"):
        assert found[name] == by_law[name]


@pytest.mark.parametrize("learnt", [0.3, 0.8, 1.5])
def test_no_calibration_makes_a_peak_beyond_the_card(learnt):
    """70 billion weights do not fit into a card that is smaller than they are."""
    large = request(shape=shape_of("meta-llama/Llama-3.1-70B"), learnt=learnt)
    assert fit(large, with_memory(30)).tokens is None
    for gib in (8, 16, 24):
        found = fit(request(learnt=learnt), with_memory(gib))
        assert found.tokens is not None
        assert total(found.parts) <= gib * GIB * 1.001


def test_the_peak_is_within_a_card_that_it_fits_into_and_has_its_middle_between_its_ends():
    for gib in (4, 12, 24, 80):
        gpu = with_memory(gib)
        found = fit(request(), gpu)
        assert found.peak.low <= found.peak.middle <= found.peak.high
        assert found.tokens is None or found.peak.high <= gpu.memory


def test_it_is_uncertain_where_the_error_of_the_law_decides():
    asked = request()
    border = L4.memory  # half the way between fitting and not, to a few bytes
    low, high = GIB, L4.memory
    while high - low > 2**16:
        border = (low + high) // 2
        if fit(asked, replace(L4, memory=border)).tokens is None:
            low = border
        else:
            high = border
    assert fit(asked, replace(L4, memory=low)).is_uncertain
    assert fit(asked, replace(L4, memory=high)).is_uncertain
    assert not fit(asked, with_memory(2)).is_uncertain
    assert not fit(asked, with_memory(80)).is_uncertain


CHANGES = {
    "training.gradient_checkpointing=true": (
        paper(training={"gradient_checkpointing": False, "tokens_per_microbatch": 4096}),
        16.0,
    ),
    "training.tokens_per_microbatch=auto": (
        paper(training={"gradient_checkpointing": True, "tokens_per_microbatch": 32768}),
        10.0,
    ),
    "model.quantization=nf4": (paper(model={"quantization": "none"}), 12.0),
    "training.optimizer=adamw-8bit": (
        paper("Qwen/Qwen2.5-0.5B", adapter={"kind": "none"}, model={"quantization": "none"}),
        9.0,
    ),
    "adapter.kind=lora": (
        paper("Qwen/Qwen2.5-0.5B", adapter={"kind": "none"}, model={"quantization": "none"}),
        6.0,
    ),
}


@pytest.mark.parametrize("wanted", CHANGES)
def test_the_change_that_is_named_makes_it_fit(wanted):
    planned, gib = CHANGES[wanted]
    gpu = with_memory(gib)
    found = planned.on(gpu)
    assert not found.fits
    assert found.change == wanted
    tree = planned.config.model_dump(mode="json")
    for change in found.change.split():
        key, _, value = change.partition("=")
        section, name = key.split(".")
        tree[section][name] = {"true": True}.get(value, value)
    changed = build(RunConfig, tree, {(): "tests"})
    assert replace(planned, config=changed).on(gpu).fits


def test_a_shorter_length_is_named_only_if_pairs_are_left_that_fit():
    long = paper(longest=8192)
    lengths = np.array([[100, 100, 100], [4096, 4096, 4096]], dtype=np.int64)
    long = replace(long, lengths=replace(long.lengths, lengths=lengths))
    gpu = with_memory(7.5)
    found = long.on(gpu)
    assert found.change.startswith("data.max_length="), found.change
    shorter = int(found.change.partition("=")[2].split()[0])
    left = lengths[lengths[:, 0] + lengths[:, 1:].max(axis=1) <= shorter]
    assert replace(long, lengths=replace(long.lengths, lengths=left)).on(gpu).fits


def test_else_the_smallest_known_gpu_that_it_fits_into_is_named():
    found = paper().on(with_memory(4))
    name = found.change.removeprefix("--gpu ").partition(":")[0]
    (other,) = find_gpus(name)
    assert paper().on(other).fits


def test_what_fits_into_no_gpu_says_so():
    config = {"model_type": "llama", **SMALL, "hidden_size": 2**14, "intermediate_size": 2**16}
    huge = replace(paper(), shape=read_shape({**config, "num_hidden_layers": 200}))
    found = huge.on(L4)
    assert (found.fits, found.change) == (False, "no single change is enough")
