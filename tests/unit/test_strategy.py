"""How workers share a model: the choice, its reason, and the arithmetic behind it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import BASE, run_config
from transformers import AutoModelForCausalLM

from orpo_ray.config import AdapterConfig, ModelConfig, RunConfig
from orpo_ray.errors import ConfigError
from orpo_ray.models.adapter import attach_adapter
from orpo_ray.models.hardware import CPU, Hardware
from orpo_ray.models.size import Parameters, count_parameters
from orpo_ray.training.setup import decide
from orpo_ray.training.strategy import ModelSize, Strategy, Workers, bytes_of_stage, choose_strategy

SINGLE, DDP = Strategy.SINGLE, Strategy.DDP
GIB = 2**30
FULL: dict[str, Any] = {"adapter": {"kind": "none"}, "model": {"quantization": "none"}}
PLAIN: dict[str, Any] = {"model": {"quantization": "none"}}
EIGHT_BIT: dict[str, Any] = {"training": {"optimizer": "adamw-8bit"}}
ADAPTER_OF_7B = ModelSize(frozen_bytes=4 * GIB, trained=40_000_000)
BASE_OF_7B = ModelSize(frozen_bytes=14 * GIB, trained=40_000_000)
ALL_OF_1B = ModelSize(frozen_bytes=0, trained=GIB)
"""16 GiB of weights, gradients and moments; on two workers 12, 10 and 8 GiB under ZeRO-1, 2 and 3.
"""


def workers(count: int, memory: float | None = None, nodes: int = 1) -> Workers:
    """`memory` in GiB."""
    return Workers(count, nodes, None if memory is None else int(memory * GIB))


def chosen(
    place: Workers,
    size: ModelSize,
    dtype: str = "bfloat16",
    deepspeed: Any = "auto",
    **sections: Any,
) -> Any:
    config = run_config(Path("unused"), scale={"deepspeed": deepspeed}, **sections)
    return choose_strategy(config, place, dtype, size)


@pytest.mark.parametrize(
    ("place", "size", "sections", "name", "reason"),
    [
        (workers(1), ADAPTER_OF_7B, {}, SINGLE, "one worker has nothing to share"),
        (workers(1, 8), ALL_OF_1B, FULL, SINGLE, "one worker has nothing to share"),
        (workers(2), ADAPTER_OF_7B, {}, "deepspeed-zero-2", "the base fits on each worker"),
        (workers(8, 24), ADAPTER_OF_7B, {}, "deepspeed-zero-2", "the base fits on each worker"),
        (
            workers(8, 24, nodes=2),
            ADAPTER_OF_7B,
            {},
            DDP,
            "152.6 MiB of gradients cross the network once a step",
        ),
        (workers(2, 24), BASE_OF_7B, PLAIN, "deepspeed-zero-2", "the base fits on each worker"),
        (
            workers(2, 16),
            BASE_OF_7B,
            PLAIN,
            "deepspeed-zero-3",
            "the base takes 14.0 GiB, more than the 11.2 GiB",
        ),
        (workers(4, 16, nodes=2), BASE_OF_7B, PLAIN, "deepspeed-zero-3", "the base takes 14.0 GiB"),
        # Quantised weights are never sharded, so ZeRO-3 would not help.
        (
            workers(2, 4),
            ADAPTER_OF_7B,
            {},
            "deepspeed-zero-2",
            "each worker loads the whole of a quantised base",
        ),
        (
            workers(2),
            ALL_OF_1B,
            FULL,
            DDP,
            "weights, gradients and optimizer state take 16.0 GiB on each worker",
        ),
        (workers(2, 24), ALL_OF_1B, FULL, DDP, "take 16.0 GiB on each worker, within the 16.8 GiB"),
        (
            workers(2, 20),
            ALL_OF_1B,
            FULL,
            "deepspeed-zero-1",
            "take 12.0 GiB on each worker, within the 14.0 GiB",
        ),
        (
            workers(2, 16),
            ALL_OF_1B,
            FULL,
            "deepspeed-zero-2",
            "take 10.0 GiB on each worker, within the 11.2 GiB",
        ),
        (
            workers(2, 12),
            ALL_OF_1B,
            FULL,
            "deepspeed-zero-3",
            "take 8.0 GiB on each worker, within the 8.4 GiB",
        ),
        (
            workers(2, 11),
            ALL_OF_1B,
            FULL,
            "deepspeed-zero-3",
            "more than the 7.7 GiB that it has for them; trying it anyway",
        ),
        (
            workers(16, 8),
            ALL_OF_1B,
            FULL,
            "deepspeed-zero-2",
            "take 4.8 GiB on each worker, within the 5.6 GiB",
        ),
        (
            workers(2),
            ADAPTER_OF_7B,
            EIGHT_BIT,
            DDP,
            "adamw-8bit keeps its state in 8-bit blocks, which ZeRO cannot split",
        ),
        (
            workers(2, 11),
            ALL_OF_1B,
            {**FULL, **EIGHT_BIT},
            DDP,
            "adamw-8bit keeps its state in 8-bit",
        ),
    ],
)
def test_auto_shares_what_does_not_fit_and_says_why(
    place: Workers, size: ModelSize, sections: dict[str, Any], name: str, reason: str
) -> None:
    choice = chosen(place, size, **sections)
    assert choice.strategy == name
    assert reason in choice.reason


def test_float16_is_not_given_to_deepspeed() -> None:
    choice = chosen(workers(2, 24), ADAPTER_OF_7B, "float16")
    assert choice.strategy == DDP
    assert "float16" in choice.reason


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("count", [1, 2])
def test_a_stage_that_is_asked_for_is_taken_even_by_one_worker(stage: int, count: int) -> None:
    choice = chosen(workers(count, 24), ADAPTER_OF_7B, deepspeed={"stage": stage})
    assert (choice.strategy, choice.reason) == (f"deepspeed-zero-{stage}", "as configured")


def test_without_deepspeed_several_workers_are_ddp() -> None:
    assert chosen(workers(2, 4), BASE_OF_7B, deepspeed="none", **PLAIN).strategy == DDP
    assert chosen(workers(1, 4), BASE_OF_7B, deepspeed="none", **PLAIN).strategy == SINGLE


def test_names_of_strategies_hold_their_stage() -> None:
    assert [Strategy.zero(stage).stage for stage in range(4)] == [0, 1, 2, 3]
    assert [Strategy(f"deepspeed-zero-{stage}") for stage in range(4)] == [
        Strategy.zero(n) for n in range(4)
    ]
    assert DDP.stage is None
    assert SINGLE.stage is None


# --- arithmetic -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "by_hand"),
    [
        (0, 1000 + 100 * (4 + 4 + 8)),
        (1, 1000 + 100 * (4 + 4 + 8 / 4)),
        (2, 1000 + 100 * (4 + 4 / 4 + 8 / 4)),
        (3, 1000 / 4 + 100 * (4 + 4 + 8) / 4),
    ],
)
def test_bytes_of_a_stage_by_hand(stage: int, by_hand: float) -> None:
    assert (
        bytes_of_stage(ModelSize(frozen_bytes=1000, trained=100), workers=4, stage=stage) == by_hand
    )


def test_alone_every_stage_takes_the_same() -> None:
    assert {bytes_of_stage(ModelSize(1000, 100), 1, stage) for stage in range(4)} == {2600}


# --- counts of a real base ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(BASE)


@pytest.fixture(scope="module")
def parameters() -> Parameters:
    return count_parameters(ModelConfig(base=str(BASE)))


def test_the_total_is_that_of_the_loaded_model(
    parameters: Parameters, model: torch.nn.Module
) -> None:
    assert parameters.total == sum(parameter.numel() for parameter in model.parameters())
    assert parameters.linear == 4 * (4 * 128 * 128 + 3 * 128 * 256), (
        "four layers of attention and MLP"
    )
    assert parameters.others == 1024 * 128 + (2 * 4 + 1) * 128, (
        "embedding, which is the head too, and the norms"
    )


@pytest.mark.parametrize("rank", [1, 8, 16])
def test_an_adapter_has_as_many_as_peft_trains(rank: int, parameters: Parameters) -> None:
    base = AutoModelForCausalLM.from_pretrained(BASE).requires_grad_(False)
    adapted = attach_adapter(base, AdapterConfig(r=rank), lambda line: None)
    trained = sum(
        parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad
    )
    assert parameters.adapter(rank) == trained > 0


def test_bytes_by_quantisation_and_format(parameters: Parameters) -> None:
    linear, others = parameters.linear, parameters.others
    assert parameters.bytes("none", "float32") == 4 * (linear + others)
    assert parameters.bytes("none", "bfloat16") == 2 * (linear + others)
    assert parameters.bytes("int8", "bfloat16") == linear + 2 * others
    assert parameters.bytes("nf4", "bfloat16") == linear // 2 + linear // 64 + 2 * others


def test_counting_an_absent_base_is_a_mistake_of_the_user(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^model\.base: "):
        count_parameters(ModelConfig(base=str(tmp_path)))


# --- as a run decides it --------------------------------------------------------------------------


def decided(config: RunConfig, hardware: Hardware, count: int, nodes: int = 1) -> tuple[str, str]:
    """The strategy, and the last line that was announced."""
    said: list[str] = []
    return decide(
        config, np.array([[5, 3, 5]]), {}, said.append, hardware, count, nodes
    ).strategy, said[-1]


def test_the_size_of_the_real_base_decides_and_the_reason_is_announced(tmp_path: Path) -> None:
    trained = 16 * count_parameters(ModelConfig(base=str(BASE))).total
    small = Hardware(
        device="cuda",
        name="a small GPU",
        bfloat16=True,
        flash_attention=False,
        memory=int(trained / 0.7) - 4096,
    )
    large = Hardware(
        device="cuda",
        name="a larger GPU",
        bfloat16=True,
        flash_attention=False,
        memory=int(trained / 0.7) + 4096,
    )
    full = run_config(tmp_path, **FULL)
    assert decided(full, large, 2)[0] == DDP
    strategy, said = decided(full, small, 2)
    assert strategy == "deepspeed-zero-1"
    assert said.startswith(
        "2 workers, deepspeed-zero-1: weights, gradients and optimizer state take "
    )
    assert decided(run_config(tmp_path), CPU, 2) == (
        "deepspeed-zero-2",
        "2 workers, deepspeed-zero-2: the base fits on each worker; the workers share optimizer "
        "state and gradients",
    )


def test_one_worker_announces_no_strategy(tmp_path: Path) -> None:
    strategy, said = decided(run_config(tmp_path), CPU, 1)
    assert strategy == SINGLE
    assert "worker" not in said


def test_float16_with_a_stage_is_refused(tmp_path: Path) -> None:
    gpu = Hardware(
        device="cuda", name="a GPU", bfloat16=False, flash_attention=False, memory=8 * GIB
    )
    config = run_config(tmp_path, scale={"deepspeed": {"stage": 0}})
    with pytest.raises(
        ConfigError, match=r"^scale\.deepspeed: float16 works only without DeepSpeed"
    ):
        decided(config, gpu, 2)
