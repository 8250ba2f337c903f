"""Forward and backward passes of one optimizer step, ours and stock TRL's, on the same model."""

import os
import tempfile
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from peft import PeftModel
from torch import Tensor
from transformers import AutoTokenizer

from orpo_ray.bench.models import PAD_ID
from orpo_ray.config.objectives.dpo import DpoConfig
from orpo_ray.config.objectives.orpo import OrpoConfig
from orpo_ray.data.pairs import TokenPair
from orpo_ray.objectives import Objective, build_objective
from orpo_ray.training.metrics import StepMetrics
from orpo_ray.training.pair_model import PairModel
from orpo_ray.training.plan import Layout
from orpo_ray.training.steps import pack_loss, step_of_one_pack
from orpo_ray.training.trl_engine import to_labelled_rows, to_rows

OBJECTIVES: dict[str, Objective] = {
    # TRL's ORPO takes its NLL over prompt and response.
    "orpo": build_objective(OrpoConfig(lambda_=0.1, nll_on="full")),
    "dpo": build_objective(DpoConfig(beta=0.1)),
}
_REFERENCE = (-100.0, -120.0)
"""Summed reference log-probs of every pair. Both sides read them, and neither computes them."""


class Side(Protocol):
    """One way to compute steps."""

    tokens: int
    """Tokens that go through the model, summed over all steps."""

    def step(self, number: int) -> Tensor:
        """Forward and backward passes of one step; leaves gradients and returns the loss."""
        ...


class Ours:
    """Our steps in a layout. Each step is one pack, as each of TRL's is one micro-batch."""

    def __init__(
        self, model: PairModel, steps: Sequence[Sequence[TokenPair]], objective: str, layout: Layout
    ) -> None:
        self._model, self._layout, self._objective = model, layout, OBJECTIVES[objective]
        self._steps = [
            step_of_one_pack(list(pairs), layout, PAD_ID, self._objective, _REFERENCE)
            for pairs in steps
        ]
        self.tokens = sum(step.packs[0].batch.input_ids.numel() for step in self._steps)

    def step(self, number: int) -> Tensor:
        """As in training: forward, loss, backward, and metrics, which are read only once."""
        model, device, step = self._model, self._model.device, self._steps[number]
        model.train()
        model.use_layout(self._layout)
        metrics = StepMetrics(self._objective, device)
        for pack in step.packs:
            pairs, parts = pack_loss(model, self._objective, pack, step, device)
            parts.total.backward()
            metrics.add(pairs, parts, pack.weight)
        metrics.means(metrics.sums.tolist(), step.pair_count, step.token_count)
        return parts.total.detach()


class TrlTrainer:
    """A trainer of TRL, ready for steps. `rows` turns pairs into its own form."""

    def __init__(self, model: PeftModel, objective: str, device: str) -> None:
        if device == "cpu":
            # Otherwise DeepSpeed, if it is installed, looks for other devices.
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        self._folder = tempfile.TemporaryDirectory(prefix="orpo-ray-bench-")
        build, self.rows = {
            "orpo": (_orpo_trainer, to_labelled_rows),
            "dpo": (_dpo_trainer, to_rows),
        }[objective]
        self.trainer = build(model, Path(self._folder.name), device == "cpu")
        # Trainer.train() does the same before its first step.
        self.model = self.trainer.accelerator.prepare(self.trainer.model)
        self.trainer.model_wrapped = self.model
        self.trainer.current_gradient_accumulation_steps = 1


class Stock:
    """Steps of TRL's unchanged trainer, on rows of token ids."""

    def __init__(self, trainer: "TrlTrainer", steps: Sequence[Sequence[TokenPair]]) -> None:
        self._trainer, self._model = trainer.trainer, trainer.model
        reference = [np.array([_REFERENCE] * len(pairs)) for pairs in steps]
        rows = (
            trainer.rows(list(pairs), scores, pairs[-1])
            for pairs, scores in zip(steps, reference, strict=True)
        )
        self._batches = [self._trainer.data_collator(batch) for batch in rows]
        self.tokens = sum(self._count(batch) for batch in self._batches)

    def step(self, number: int) -> Tensor:
        """The trainer's own step, with attention by torch."""
        self._trainer.model.set_attn_implementation("sdpa")
        loss: Tensor = self._trainer.training_step(self._model, dict(self._batches[number]))
        return loss.detach()

    def forward(self, model: Any, number: int) -> Any:
        """What the trainer computes from logits: log-probs and logits of both answers, and NLL."""
        return self._trainer.concatenated_forward(model, dict(self._batches[number]))

    @staticmethod
    def _count(batch: dict[str, Any]) -> int:
        if "chosen_input_ids" not in batch:
            return int(batch["input_ids"].numel())
        rows, width = 0, 0
        for side in ("chosen", "rejected"):
            rows += batch[f"{side}_input_ids"].shape[0]
            width = max(width, batch[f"{side}_input_ids"].shape[1])
        return rows * width


def _arguments(folder: Path, on_cpu: bool) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "use_cpu": on_cpu,
        "bf16": not on_cpu,
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "report_to": "none",
    }


def _placeholder() -> tuple[Any, Any]:
    """A dataset of one row and a tokenizer. A trainer needs them, but the benchmark has own ids."""
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    rows = [{"prompt": "a", "chosen": " b", "rejected": " c"}]
    return Dataset.from_list(rows), AutoTokenizer.from_pretrained(
        str(files("orpo_ray") / "demo" / "base")
    )


def _orpo_trainer(model: PeftModel, folder: Path, on_cpu: bool) -> Any:
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    rows, tokenizer = _placeholder()
    arguments = ORPOConfig(**_arguments(folder, on_cpu), max_length=2**20, beta=0.1)
    return ORPOTrainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer)


def _dpo_trainer(model: PeftModel, folder: Path, on_cpu: bool) -> Any:
    from trl import DPOConfig, DPOTrainer

    rows, tokenizer = _placeholder()
    arguments = DPOConfig(**_arguments(folder, on_cpu), max_length=None, beta=0.1)
    trainer = DPOTrainer(
        model=model, args=arguments, train_dataset=rows, processing_class=tokenizer
    )
    trainer.precompute_ref_logps = True  # they are in the rows
    return trainer
