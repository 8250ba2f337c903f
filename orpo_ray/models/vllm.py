"""What vLLM asks of an adapter that it serves beside its base.

The rules are those of its `PEFTHelper` and `LoRAConfig` (vLLM 0.27).
"""

from typing import Any

from orpo_ray.errors import ConfigError

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that --max-lora-rank takes; its default is 16."""


def max_rank(rank: int) -> int:
    """The least --max-lora-rank for an adapter. Raises ConfigError for a rank above all."""
    fitting = [each for each in RANKS if rank <= each]
    if not fitting:
        raise ConfigError(
            f"adapter.r: vLLM serves adapters up to rank {RANKS[-1]}, and this one has {rank}; "
            "export the merged model"
        )
    return fitting[0]


def refuse_unservable(adapter: dict[str, Any], tensors: list[str]) -> None:
    """Raise ConfigError for an adapter that vLLM does not load. `tensors` are those of its file."""
    max_rank(adapter["r"])
    ends = [name for name in tensors if "lora_embedding" in name or "lm_head" in name]
    reasons = {
        "its layers have ranks of their own (rank_pattern)": adapter.get("rank_pattern"),
        "its layers have an alpha of their own (alpha_pattern)": adapter.get("alpha_pattern"),
        "it has biases": adapter.get("bias", "none") != "none",
        "it is a DoRA adapter": adapter.get("use_dora"),
        "it adapts the weights of experts": adapter.get("target_parameters"),
        "it holds whole layers (modules_to_save)": adapter.get("modules_to_save"),
        "it adapts embeddings or the head": ends,
    }
    for reason, holds in reasons.items():
        if holds:
            raise ConfigError(
                f"--adapter-only: vLLM does not serve this adapter, because {reason}; export the "
                "merged model"
            )
