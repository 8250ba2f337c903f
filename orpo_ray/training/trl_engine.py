"""`engine: trl`: TRL's own trainers compute the loss; data order, steps and checkpoints stay ours.

TRL's trainer changes the model that it gets: it adds a second adapter or changes number formats. So
it is built with a small stand-in model, and then computes its loss on ours. Its computation is
unchanged: padded rows, each prompt twice, full logits for ORPO and CPO, means over a micro-batch.
The packs of a step are weighted by their number of answers.
"""

import tempfile
from collections.abc import Callable
from copy import deepcopy
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)

from orpo_ray.config import RunConfig
from orpo_ray.config.objectives import InTrl, ObjectiveConfig
from orpo_ray.data.pairs import TokenPair
from orpo_ray.errors import ConfigError
from orpo_ray.models.tokenizer import padding_id
from orpo_ray.training.layout import PairBatch
from orpo_ray.training.metrics import StepMetrics
from orpo_ray.training.pair_model import PairModel
from orpo_ray.training.steps import PackInput, StepDataset, StepInput
from orpo_ray.training.trainer import PreferenceTrainer

_LONGEST = 2**20
"""A length that no pair has, so that TRL cuts none: the preparation handles long pairs."""
_FUSED = ("DPO", "KTO")
"""Trainers that ask their model for log-probs, not for logits."""
_FUSED_OUTPUTS = ("log_probs", "entropy", "mean_logits", "is_top1")
REFERENCE_ADAPTER = "ref"
"""TRL's name for the adapter that KTO compares with, if a run does not start from its base."""

Rows = list[dict[str, Any]]
TrlBatch = dict[str, Any]
"""What a collator of TRL makes from rows."""


def to_rows(pairs: list[TokenPair], reference: np.ndarray | None, _before: TokenPair) -> Rows:
    """Rows for DPO's collator.

    `reference` [n, 2] are the summed reference log-probs of the chosen and rejected answers.
    """
    rows: Rows = []
    for i, pair in enumerate(pairs):
        row = {
            f"{part}_ids": getattr(pair, part).tolist() for part in ("prompt", "chosen", "rejected")
        }
        if reference is not None:
            row |= {
                "ref_chosen_logps": float(reference[i, 0]),
                "ref_rejected_logps": float(reference[i, 1]),
            }
        rows.append(row)
    return rows


def to_labelled_rows(
    pairs: list[TokenPair], reference: np.ndarray | None, _before: TokenPair
) -> Rows:
    """Rows for the collator of ORPO and CPO: two whole sides, with labels for the answers only."""
    rows: Rows = []
    for pair in pairs:
        prompt = pair.prompt.tolist()
        row: dict[str, Any] = {
            "prompt_input_ids": prompt,
            "prompt_attention_mask": [1] * len(prompt),
        }
        for side, answer in (
            ("chosen", pair.chosen.tolist()),
            ("rejected", pair.rejected.tolist()),
        ):
            row[f"{side}_input_ids"] = prompt + answer
            row[f"{side}_attention_mask"] = [1] * (len(prompt) + len(answer))
            row[f"{side}_labels"] = [-100] * len(prompt) + answer
        rows.append(row)
    return rows


def to_unpaired_rows(
    pairs: list[TokenPair], reference: np.ndarray | None, before: TokenPair
) -> Rows:
    """Rows for KTO's collator: all chosen answers, then all rejected ones.

    Each row also has the answer of the row before it, which KTO uses for its baseline. A single
    answer is one row. If it is alone, it has an answer of `before`, another pair of the step.
    """
    rows: Rows = [
        {
            "prompt_ids": pair.prompt.tolist(),
            "completion_ids": getattr(pair, side).tolist(),
            "label": side == "chosen",
        }
        for side in ("chosen", "rejected")
        for pair in pairs
        if len(getattr(pair, side))
    ]
    for i, row in enumerate(rows):
        row["KL_completion_ids"] = rows[i - 1]["completion_ids"]
    if len(rows) == 1:
        other = before.chosen if len(before.chosen) else before.rejected
        rows[0]["KL_completion_ids"] = other.tolist()
    return rows


MakeRows = Callable[[list[TokenPair], np.ndarray | None, TokenPair], Rows]
"""Takes the pairs of a pack, their reference log-probs, and the pair of the step before them."""
_ROWS: dict[str, MakeRows] = {
    "ORPO": to_labelled_rows,
    "CPO": to_labelled_rows,
    "DPO": to_rows,
    "KTO": to_unpaired_rows,
}
_LENGTHS: dict[str, int | None] = {"ORPO": _LONGEST, "CPO": _LONGEST, "DPO": None, "KTO": None}


def _in_trl(objective: ObjectiveConfig) -> InTrl:
    found = objective.in_trl()
    assert isinstance(found, InTrl), (
        "the config refuses an objective whose settings TRL cannot compute"
    )
    return found


def _classes(name: str) -> tuple[Any, Any]:
    """TRL's trainer and config."""
    module = import_module(f"trl.experimental.{name.lower()}" if name in ("ORPO", "CPO") else "trl")
    return getattr(module, f"{name}Trainer"), getattr(module, f"{name}Config")


class TrlModel(PairModel):
    """A model whose forward pass gives TRL's loss for TRL's batches.

    For a batch of pairs it gives log-probs, as every PairModel does.
    """

    def __init__(self, model: Any, autocast: torch.dtype | None) -> None:
        super().__init__(model, autocast)
        self._loss: Callable[[nn.Module, TrlBatch], Tensor] | None = None

    def use_loss(self, loss: Callable[[nn.Module, TrlBatch], Tensor]) -> None:
        """Take the function of a TRL trainer that computes the loss of a pack."""
        self._loss = loss

    def forward(self, batch: PairBatch | TrlBatch) -> Tensor:
        """Log-probs [N] for a batch of pairs, or the loss for a batch of TRL."""
        if isinstance(batch, PairBatch):
            return super().forward(batch)
        assert self._loss is not None
        with torch.autocast(
            self.device.type, dtype=self.autocast, enabled=self.autocast is not None
        ):
            return self._loss(self.model, batch)


class TrlStepDataset(StepDataset):
    """Item i is one rank's share of step `first + i`, made by TRL's collator."""

    def __init__(self, collate: Callable[[Rows], TrlBatch], rows: MakeRows, **share: Any) -> None:
        super().__init__(**share)
        self._collate, self._rows = collate, rows

    def _pack(self, pairs: np.ndarray, weight: float, of_step: np.ndarray) -> PackInput[TrlBatch]:
        """One pack, weighted by its share of the answers of the step."""
        reference, table = self._work.reference, self._work.train
        rows = self._rows(
            [table[i] for i in pairs],
            None if reference is None else reference[pairs],
            table[of_step[np.flatnonzero(of_step == pairs[0])[0] - 1]],
        )
        share = self._answers(pairs) / self._answers(of_step)
        return PackInput(self._collate(rows), weight * share, None)

    def _answers(self, pairs: np.ndarray) -> int:
        """How many answers these pairs have."""
        return int(np.count_nonzero(self._lengths[pairs, 1:]))


class _LossAlone(StepMetrics):
    """The metrics of a step under TRL: the loss and nothing else."""

    def add_loss(self, loss: Tensor) -> None:
        """Count one pack's share of the step's loss."""
        self._sums = self._sums + torch.nn.functional.pad(
            loss.detach()[None], (len(self._sums) - 1, 0)
        )

    def means(self, sums: list[float], pair_count: int, token_count: int) -> dict[str, float]:
        """No metric but the loss, which the trainer logs itself."""
        return {}


class TrlTrainer(PreferenceTrainer):
    """Trains a TrlModel on planned steps, with a trainer of TRL inside."""

    def __init__(
        self,
        model: TrlModel,
        objective_config: ObjectiveConfig,
        tokenizer: PreTrainedTokenizerBase,
        arguments: Callable[..., TrainingArguments],
        **ours: Any,
    ) -> None:
        super().__init__(model=model, **ours)
        self._in_trl = _in_trl(objective_config)
        # After our own trainer: the first Accelerator of a process decides what DeepSpeed does.
        self._inside = _build(self._in_trl, tokenizer, arguments)
        self._inside.model = model.model
        self._inside.accelerator = _Alone(self._inside.accelerator)
        if self._in_trl.trainer in _FUSED:
            _fuse_head(model)
        model.use_loss(self._inside.compute_loss)

    def _dataset(self) -> StepDataset:
        return TrlStepDataset(
            self._inside.data_collator,
            _ROWS[self._in_trl.trainer],
            work=self._work,
            objective=self._objective,
            first=self._start,
            rank=self.args.process_index,
        )

    def _new_metrics(self) -> StepMetrics:
        return _LossAlone(self._objective, self.args.device)

    def _run_pack(
        self, model: nn.Module, pack: PackInput[Any], step: StepInput, metrics: StepMetrics
    ) -> Tensor:
        """Forward and backward of one micro-batch.

        TRL gives the mean loss of the micro-batch.
        """
        batch: TrlBatch = {
            name: _moved(value, self.args.device) for name, value in pack.batch.items()
        }
        share = model(batch) * pack.weight
        assert isinstance(metrics, _LossAlone)
        metrics.add_loss(share)
        # TRL's trainer would log these metrics and then clear them.
        name = "_metrics" if self._in_trl.trainer in _FUSED else "_stored_metrics"
        getattr(self._inside, name)["train"].clear()
        return self._backward(share)


class _Alone:
    """An accelerator that gathers nothing from other processes.

    TRL gathers values for its metrics, which needs packs of equal size on all ranks. It also
    gathers KTO's baseline; here each process computes it from its own micro-batch.
    """

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator

    def __getattr__(self, name: str) -> Any:
        return getattr(self._accelerator, name)

    def gather(self, values: Any) -> Any:
        """The values of this process alone."""
        return values

    gather_for_metrics = gather


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def _build(
    in_trl: InTrl, tokenizer: PreTrainedTokenizerBase, arguments: Callable[..., TrainingArguments]
) -> Any:
    """TRL's trainer with a stand-in model, which is never run, and a data set of one row."""
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    trainer_type, config_type = _classes(in_trl.trainer)
    # A copy: TRL adds a padding token if there is none, and the run's tokenizer must not change.
    tokenizer = deepcopy(tokenizer)
    tokenizer.pad_token_id = padding_id(tokenizer)
    rows = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    with tempfile.TemporaryDirectory(prefix="orpo-ray-trl-") as folder:
        args = arguments(
            config_type, Path(folder), max_length=_LENGTHS[in_trl.trainer], **in_trl.settings
        )
        # KTO refuses 1. The number is not used: the trainer never makes a loader of its own.
        args.per_device_train_batch_size = 2
        inside = trainer_type(
            model=_stand_in(len(tokenizer)),
            args=args,
            train_dataset=rows,
            processing_class=tokenizer,
        )
    # Set only now: earlier, TRL would compute the reference log-probs of its one dummy row. Our
    # rows bring their own.
    inside.precompute_ref_logps = in_trl.trainer == "DPO"
    return inside


def _stand_in(vocabulary: int) -> PeftModel:
    sizes: dict[str, Any] = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, num_key_value_heads=1, **sizes))
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=1, target_modules=["q_proj"]))


def trl_model(
    model: PeftModel | PreTrainedModel, config: RunConfig, autocast: torch.dtype | None
) -> TrlModel:
    """Base and adapter as a trainer of TRL takes them.

    Raises ConfigError if TRL would leave out the adapter of the head.
    """
    objective = config.objective
    adapter = config.adapter
    starts_below = adapter.init_from is None and not adapter.starts_elsewhere
    if isinstance(model, PeftModel) and objective.compares_below_adapter and not starts_below:
        keep_start_as_reference(model)
    made = TrlModel(model, autocast)
    _refuse_adapted_head(made, objective)
    return made


def _refuse_adapted_head(model: TrlModel, objective: ObjectiveConfig) -> None:
    """Raise ConfigError if TRL would compute an objective without the adapter of the head."""
    if model.scorer.head is None or _in_trl(objective).trainer not in _FUSED:
        return
    instead = "" if objective.only_in_trl else ", or set training.engine=fast"
    raise ConfigError(
        "adapter.targets: TRL's DPO and KTO use the weight of the head without its adapter; leave "
        f"the head out{instead}"
    )


def _fuse_head(model: TrlModel) -> None:
    """Give the model TRL's head without full logits, which TRL's newer trainers need."""
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(model.causal_model, outputs=_FUSED_OUTPUTS)


def keep_start_as_reference(model: PeftModel) -> None:
    """Add a frozen copy of the adapter with which a run starts.

    KTO compares with this copy, not with the base.
    """
    start: Any = deepcopy(model.peft_config["default"])
    start.lora_dropout = 0.0  # the model is in training mode when it computes the reference
    model.add_adapter(REFERENCE_ADAPTER, start)
    copies = dict(model.named_parameters())
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        if "default" in parts:
            of_copy = [REFERENCE_ADAPTER if part == "default" else part for part in parts]
            copies[".".join(of_copy)].data.copy_(parameter.data)
    model.set_adapter("default")
