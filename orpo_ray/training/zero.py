"""Settings of DeepSpeed for our steps; reads whole tensors out of shards and writes them back.

A shard is the part of a tensor that one worker holds.
"""

import math
import os
from typing import Any

import torch
from torch import Tensor, nn

_MOMENTS = ("exp_avg", "exp_avg_sq")


def deepspeed_config(stage: int, max_grad_norm: float) -> dict[str, Any]:
    """The settings that DeepSpeed gets.

    It does not decide the number format: trained weights are float32, and the model uses autocast.
    """
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_grad_norm,
        "zero_optimization": {"stage": stage, "contiguous_gradients": True, "overlap_comm": False},
        "zero_allow_untested_optimizer": True,
        # DeepSpeed's own AdamW for CPUs needs a compiler at its first use.
        "zero_force_ds_cpu_optimizer": False,
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": 2**31,
    }


def prepare_deepspeed(device: str) -> None:
    """Have DeepSpeed run on a CPU without a compiler.

    Call this before accelerate is imported, because accelerate imports DeepSpeed.
    """
    if device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def is_sharded(optimizer: Any) -> bool:
    """Whether an optimizer is one of ZeRO's, whose tensors are flat shards.

    Stage 0 uses torch's own optimizer.
    """
    return hasattr(optimizer, "single_partition_of_fp32_groups") or hasattr(
        optimizer, "fp32_partitioned_groups_flat"
    )


def full_parameter(parameter: nn.Parameter) -> Tensor:
    """The whole float32 value of a sharded parameter. Every rank must ask, in the same order."""
    from deepspeed.utils import safe_get_full_fp32_param

    value = safe_get_full_fp32_param(parameter)
    assert value is not None, "the parameter is not one that ZeRO trains"
    return value


def link_state(optimizer: Any) -> None:
    """Have ZeRO-1/2 find the moments of every parameter group.

    It looks for them only once, and at that time only the first group has any.
    """
    if hasattr(optimizer, "single_partition_of_fp32_groups"):
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()


def full_state(optimizer: Any, parameter: nn.Parameter) -> dict[str, Tensor]:
    """Adam's whole state of a sharded parameter, under torch's names.

    Every rank must ask, in the same order.
    """
    from deepspeed.utils import safe_get_full_optimizer_state

    step = next(iter(optimizer.optimizer.state.values()))["step"]
    moments = {key: safe_get_full_optimizer_state(parameter, key) for key in _MOMENTS}
    return {"step": torch.as_tensor(step, dtype=torch.float32), **moments}


def make_state(optimizer: Any, step: float) -> None:
    """Give ZeRO's inner Adam the state that it would otherwise make at its first step."""
    stage_3 = hasattr(optimizer, "fp32_partitioned_groups_flat")
    shards = (
        optimizer.fp32_partitioned_groups_flat
        if stage_3
        else optimizer.single_partition_of_fp32_groups
    )
    for shard in shards:
        moments = {key: torch.zeros_like(shard) for key in _MOMENTS}
        # The step can be set only here. torch keeps it on the CPU.
        optimizer.optimizer.state[shard] = {
            "step": torch.tensor(step, dtype=torch.float32),
            **moments,
        }
    if not stage_3:
        optimizer._lazy_init_hp_params_optimizer_state()


def fill_state(
    parameter: nn.Parameter, moments: dict[str, Tensor], rank: int, world_size: int
) -> None:
    """Put whole moments into this rank's shard of a parameter."""
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    for key in _MOMENTS:
        value = moments[key].to(parameter.device)
        if hasattr(parameter, "ds_id"):
            # ZeRO-3 cuts flat tensors into equal parts and pads the last one. Its own setter does
            # not pad.
            part = math.ceil(value.numel() / world_size)
            padded = nn.functional.pad(value.flatten(), (0, part * world_size - value.numel()))
            safe_set_local_optimizer_state(parameter, padded[rank * part : (rank + 1) * part], key)
        else:
            safe_set_full_optimizer_state(parameter, value, key)
