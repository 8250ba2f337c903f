"""Loads the model that training, reference log-probs and evaluation start from."""

from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from peft import PeftModel
from transformers import set_seed

from orpo_ray.config import ModelConfig, RunConfig
from orpo_ray.models.adapter import attach_adapter
from orpo_ray.models.base import load_base
from orpo_ray.models.hardware import DTYPES
from orpo_ray.models.start import Start, start_adapter
from orpo_ray.models.tokenizer import base_location
from orpo_ray.runs.console import Announce
from orpo_ray.training.decisions import Decisions
from orpo_ray.training.engine import engine_of
from orpo_ray.training.pair_model import PairModel

_NOTICED_BYTES = 50_000_000


def load_pair_model(
    config: RunConfig, decisions: Decisions, announce: Announce, resumed: Path | None = None
) -> PairModel:
    """Base and adapter as they are when training starts.

    New weights are seeded, and all that is not trained is frozen. `resumed` is the adapter of the
    checkpoint from which the run resumes.
    """
    full = config.adapter.kind == "none"
    # If workers share the weights, each moves only its part to its GPU, and the whole need not fit
    # there. Quantised weights must fit, because they are quantised on the GPU.
    whole_on_cpu = decisions.strategy.shares_weights and config.model.quantization == "none"
    device = "cpu" if whole_on_cpu else decisions.device
    base = load_base(
        config.model,
        device,
        decisions.dtype,
        decisions.attention,
        trainable=full,
        announce=announce,
    )
    set_seed(config.training.seed)
    model = attach_adapter(base, config.adapter, announce)
    start: Start = {}
    if isinstance(model, PeftModel):
        start = start_adapter(model, config.adapter, config.model, announce, resumed)
    made = engine_of(config).model(model, config, autocast_dtype(decisions))
    made.start = start
    return made


def size_on_disk(config: ModelConfig) -> str:
    """The size of the base's weights, for the end of a message.

    It is empty for small bases, and if the files are not on this machine.
    """
    folder = Path(base_location(config))
    if not folder.is_dir():
        try:
            found = snapshot_download(config.base, revision=config.revision, local_files_only=True)
        except (OSError, ValueError):
            return ""
        folder = Path(found)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return f", {size / 1e9:.1f} GB" if size > _NOTICED_BYTES else ""


def autocast_dtype(decisions: Decisions) -> torch.dtype | None:
    """The 16-bit format that a PairModel computes in; None for float32."""
    return None if decisions.dtype == "float32" else DTYPES[decisions.dtype]
