"""What every `auto` becomes on made-up machines, and what is refused on them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import run_config

from orpo_ray.config import ModelConfig
from orpo_ray.errors import ResourceError
from orpo_ray.models.hardware import Hardware, choose_numerics, probe_hardware
from orpo_ray.training.setup import decide

CPU = Hardware(device="cpu", name="CPU", bfloat16=False, flash_attention=False)
T4 = Hardware(device="cuda:0", name="Tesla T4", bfloat16=False, flash_attention=False)
L4 = Hardware(device="cuda:0", name="NVIDIA L4", bfloat16=True, flash_attention=False)
H100 = Hardware(device="cuda:0", name="NVIDIA H100", bfloat16=True, flash_attention=True)


def model(dtype: str = "auto", attention: str = "auto") -> ModelConfig:
    return ModelConfig(base="somewhere", dtype=dtype, attention=attention)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("hardware", "dtype", "attention", "chosen"),
    [
        (CPU, "auto", "auto", ("float32", "sdpa")),
        (CPU, "bfloat16", "auto", ("bfloat16", "sdpa")),
        (CPU, "auto", "eager", ("float32", "eager")),
        (T4, "auto", "auto", ("float16", "sdpa")),
        (T4, "float32", "auto", ("float32", "sdpa")),
        (L4, "auto", "auto", ("bfloat16", "sdpa")),
        (L4, "float16", "auto", ("float16", "sdpa")),
        (H100, "auto", "auto", ("bfloat16", "flash_attention_2")),
        (H100, "float16", "auto", ("float16", "flash_attention_2")),
        (H100, "float32", "auto", ("float32", "sdpa")),
        (H100, "auto", "sdpa", ("bfloat16", "sdpa")),
    ],
)
def test_auto_takes_the_best_that_the_machine_has(
    hardware: Hardware, dtype: str, attention: str, chosen: tuple[str, str]
) -> None:
    numerics = choose_numerics(model(dtype, attention), hardware)
    assert (numerics.dtype, numerics.attention) == chosen
    assert [reason.split(":")[0] for reason in numerics.reasons] == [
        f"dtype {chosen[0]}",
        f"attention {chosen[1]}",
    ]
    assert ("as configured" in numerics.reasons[0]) == (dtype != "auto")
    assert ("as configured" in numerics.reasons[1]) == (attention != "auto")


@pytest.mark.parametrize(
    ("hardware", "known", "chosen"),
    [
        (H100, ("flash_attention_2", "eager"), "flash_attention_2"),
        (H100, ("sdpa", "eager"), "sdpa"),
        (L4, ("flash_attention_2", "eager"), "eager"),
        (CPU, ("eager",), "eager"),
    ],
)
def test_auto_takes_an_attention_that_the_base_knows(
    hardware: Hardware, known: tuple[str, ...], chosen: str
) -> None:
    assert choose_numerics(model(), hardware, known).attention == chosen


@pytest.mark.parametrize(
    ("hardware", "dtype", "attention", "complaint"),
    [
        (CPU, "float16", "auto", "model.dtype: float16 trains only on a GPU"),
        (T4, "bfloat16", "auto", "model.dtype: Tesla T4 has no bfloat16"),
        (CPU, "auto", "flash_attention_2", "model.attention: flash_attention_2 needs"),
        (L4, "auto", "flash_attention_2", "model.attention: flash_attention_2 needs"),
        (H100, "float32", "flash_attention_2", "model.attention: flash_attention_2 needs"),
    ],
)
def test_what_the_machine_cannot_do_is_refused_and_not_replaced(
    hardware: Hardware, dtype: str, attention: str, complaint: str
) -> None:
    with pytest.raises(ResourceError, match=f"^{complaint}"):
        choose_numerics(model(dtype, attention), hardware)


def test_the_machine_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert probe_hardware() == CPU


# --- decisions of a run ---------------------------------------------------------------------------


def decisions(
    hardware: Hardware, longest: int = 100, before: dict[str, Any] | None = None, **training: Any
) -> Any:
    """The decisions, and what was announced with them."""
    said: list[str] = []
    config = run_config(Path("unused"), training={"tokens_per_microbatch": "auto", **training})
    lengths = np.array([[longest // 2, longest // 4, longest // 4], [2, 2, 3]])
    return decide(config, lengths, before or {}, said.append, hardware), said


@pytest.mark.parametrize(
    ("hardware", "longest", "tokens", "checkpointing"),
    [
        (CPU, 100, 8192, False),
        (CPU, 12_000, 12_000, False),
        (L4, 100, 4096, True),
        (L4, 8192, 8192, True),
    ],
)
def test_auto_memory_settings_are_found_where_the_run_is_and_hold_the_longest_pair_before(
    hardware: Hardware, longest: int, tokens: int, checkpointing: bool
) -> None:
    decided, said = decisions(hardware, longest)
    assert (decided.tokens_per_microbatch, decided.gradient_checkpointing) == (
        tokens,
        checkpointing,
    )
    assert decided.find_budget
    assert (decided.device, decided.layout) == (hardware.device, "shared-prefix")
    assert len(said) == 3, "dtype, attention and layout are announced"


@pytest.mark.parametrize(
    ("training", "is_open"),
    [
        ({"tokens_per_microbatch": 50, "gradient_checkpointing": False}, False),
        ({"tokens_per_microbatch": 50}, True),
        ({"gradient_checkpointing": True}, True),
    ],
)
def test_what_was_asked_for_is_taken_and_a_tight_budget_announced(
    training: dict[str, Any], is_open: bool
) -> None:
    decided, said = decisions(L4, longest=100, **training)
    assert decided.tokens_per_microbatch == training.get("tokens_per_microbatch", 4096)
    assert decided.gradient_checkpointing == training.get("gradient_checkpointing", True)
    assert decided.find_budget == is_open
    tight = "tokens per micro-batch 50: the longest pair alone takes 100 and runs by itself"
    assert (tight in said) == ("tokens_per_microbatch" in training)


def test_a_resumed_run_keeps_the_numbers_it_began_with() -> None:
    before = {
        "dtype": "bfloat16",
        "attention": "eager",
        "layout": "padded",
        "tokens_per_microbatch": 777,
        "gradient_checkpointing": False,
    }
    decided, said = decisions(H100, before=before)
    assert (decided.dtype, decided.attention, decided.tokens_per_microbatch) == (
        "bfloat16",
        "eager",
        777,
    )
    assert decided.layout == "padded"
    assert not decided.find_budget
    same = "the same as at the start of the run"
    assert {
        f"dtype bfloat16 and attention eager: {same}",
        f"layout padded: {same}",
        f"tokens per micro-batch 777, gradient checkpointing off: {same}",
    } <= set(said)


def test_a_run_is_not_resumed_if_its_numbers_cannot_be_computed() -> None:
    with pytest.raises(ResourceError, match=r"^model\.dtype: float16 trains only on a GPU"):
        decisions(CPU, before={"dtype": "float16", "attention": "sdpa"})
