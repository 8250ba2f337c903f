"""Our losses compared with stock TRL 1.16.

Both have the same weights and ids, one micro-batch, float32 and no dropout. TRL's own trainers
tokenise, collate and compute. We take the ids from their rows, so that both have the same tokens.

Some definitions differ, and settings make them equal. TRL's ORPO takes its NLL over prompt and
response (`nll_on: full`). Its SimPO adds an NLL unless `cpo_alpha=0`. Its CPO takes the NLL over
the response. Its IPO takes means over tokens.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from support import BASE, DEMO
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, Trainer
from trl import DPOConfig as TrlDpoConfig
from trl import DPOTrainer
from trl.experimental.cpo import CPOConfig as TrlCpoConfig
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOConfig as TrlOrpoConfig
from trl.experimental.orpo import ORPOTrainer

from orpo_ray.config.objectives import ObjectiveConfig
from orpo_ray.config.objectives.cpo import CpoConfig
from orpo_ray.config.objectives.dpo import DpoConfig
from orpo_ray.config.objectives.ipo import IpoConfig
from orpo_ray.config.objectives.orpo import OrpoConfig
from orpo_ray.config.objectives.simpo import SimpoConfig
from orpo_ray.data.pairs import TokenPair
from orpo_ray.objectives import PairLogps, build_objective, loss_parts
from orpo_ray.training.layout import collate
from orpo_ray.training.logprobs import pair_logps
from orpo_ray.training.metrics import StepMetrics
from orpo_ray.training.pair_model import PairModel
from orpo_ray.training.plan import PACKED, PADDED, SHARED_PREFIX

RELATIVE = 1e-5
LORA = LoraConfig(
    task_type="CAUSAL_LM", r=4, lora_alpha=8, lora_dropout=0.0, target_modules="all-linear"
)
DEMO_PAIRS = 4


def demo_rows() -> list[dict[str, str]]:
    """A few of the demo's pairs as plain text, without a chat template."""
    lines = (DEMO / "train.jsonl").read_text(encoding="utf-8").splitlines()[:DEMO_PAIRS]
    pairs = [
        {part: messages[-1]["content"] for part, messages in json.loads(line).items()}
        for line in lines
    ]
    return [
        {**pair, "chosen": " " + pair["chosen"], "rejected": " " + pair["rejected"]}
        for pair in pairs
    ]


ROWS = demo_rows()


@dataclass(frozen=True)
class Case:
    """A TRL trainer with its settings, and our settings for the same loss."""

    trainer: type[Trainer]
    config: type[Any]
    settings: dict[str, Any]
    objective: ObjectiveConfig
    log_probs: Callable[[PairLogps], tuple[Tensor, Tensor]]


def sums(pairs: PairLogps) -> tuple[Tensor, Tensor]:
    return pairs.chosen, pairs.rejected


def means(pairs: PairLogps) -> tuple[Tensor, Tensor]:
    return pairs.chosen_mean, pairs.rejected_mean


CASES = {
    "orpo": Case(
        ORPOTrainer, TrlOrpoConfig, {"beta": 0.3}, OrpoConfig(lambda_=0.3, nll_on="full"), means
    ),
    "dpo": Case(
        DPOTrainer, TrlDpoConfig, {"beta": 0.2, "loss_type": "sigmoid"}, DpoConfig(beta=0.2), sums
    ),
    "hinge": Case(
        DPOTrainer,
        TrlDpoConfig,
        {"beta": 0.9, "loss_type": "hinge"},
        DpoConfig(beta=0.9, loss="hinge"),
        sums,
    ),
    "robust": Case(
        DPOTrainer,
        TrlDpoConfig,
        {"beta": 0.2, "loss_type": "robust", "label_smoothing": 0.2},
        DpoConfig(beta=0.2, loss="robust", label_smoothing=0.2),
        sums,
    ),
    "sigmoid-norm": Case(
        DPOTrainer,
        TrlDpoConfig,
        {"beta": 5.0, "loss_type": "sigmoid_norm"},
        DpoConfig(beta=5.0, loss="sigmoid-norm"),
        sums,
    ),
    "apo-zero": Case(
        DPOTrainer,
        TrlDpoConfig,
        {"beta": 0.2, "loss_type": "apo_zero"},
        DpoConfig(beta=0.2, loss="apo-zero"),
        sums,
    ),
    "apo-down": Case(
        DPOTrainer,
        TrlDpoConfig,
        {"beta": 0.2, "loss_type": "apo_down"},
        DpoConfig(beta=0.2, loss="apo-down"),
        sums,
    ),
    "nca": Case(
        DPOTrainer,
        TrlDpoConfig,
        {"beta": 0.2, "loss_type": "nca_pair"},
        DpoConfig(beta=0.2, loss="nca"),
        sums,
    ),
    "ipo": Case(
        DPOTrainer,
        TrlDpoConfig,
        {"beta": 0.2, "loss_type": "ipo"},
        IpoConfig(beta=0.2, log_probs="token-mean"),
        sums,
    ),
    "simpo": Case(
        CPOTrainer,
        TrlCpoConfig,
        {"beta": 2.5, "loss_type": "simpo", "simpo_gamma": 1.0, "cpo_alpha": 0.0},
        SimpoConfig(beta=2.5, gamma_beta_ratio=0.4),
        means,
    ),
    "cpo": Case(
        CPOTrainer,
        TrlCpoConfig,
        {"beta": 0.2, "loss_type": "sigmoid", "cpo_alpha": 0.7},
        CpoConfig(beta=0.2, alpha=0.7),
        sums,
    ),
}


@dataclass(frozen=True)
class Outcome:
    """The numbers that one implementation computes for the micro-batch."""

    log_probs: Tensor  # [2, n]
    loss: Tensor
    gradients: dict[str, Tensor]
    metrics: dict[str, float]
    """By TRL's names."""


def tiny_llama(vocabulary: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            initializer_range=0.2,
        )
    )


def make_trainer(case: Case, folder: Path) -> Trainer:
    """The stock trainer with a new adapter.

    Its B matrices are not zero, so that every gradient counts.
    """
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    args = case.config(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        max_length=256,
        **case.settings,
    )
    trainer = case.trainer(
        model=tiny_llama(len(tokenizer)),
        args=args,
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tokenizer,
        peft_config=LORA,
    )
    generator = torch.Generator().manual_seed(1)
    for parameter in adapter(trainer.model).values():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return trainer


def adapter(model: PeftModel) -> dict[str, Tensor]:
    return {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }


def gradients(model: PeftModel, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in adapter(model).items()}


def theirs(trainer: Trainer) -> Outcome:
    """Log-probs, loss and adapter gradients by TRL's own collator, forward and loss."""
    rows = [trainer.train_dataset[i] for i in range(len(ROWS))]
    batch = trainer._prepare_inputs(trainer.data_collator(rows))
    trainer.model.train()
    outputs: list[Any] = []
    with trainer.model.register_forward_hook(
        lambda module, arguments, output: outputs.append(output)
    ):
        loss = trainer.compute_loss(trainer.model, batch)
    if isinstance(trainer, DPOTrainer):
        # Its fused head gives log-probs per token. The policy runs before the reference.
        log_probs = outputs[0].log_probs.sum(dim=1).view(2, -1)
    else:
        log_probs = torch.stack(trainer.concatenated_forward(trainer.model, batch)[:2])
    stored = trainer._metrics if isinstance(trainer, DPOTrainer) else trainer._stored_metrics
    metrics = {name: float(np.mean(values)) for name, values in stored["train"].items()}
    return Outcome(log_probs.detach(), loss.detach(), gradients(trainer.model, loss), metrics)


def token_pair(row: dict[str, Any]) -> TokenPair:
    """The ids that a TRL row holds, cut where the answers begin."""
    if "prompt_ids" in row:
        prompt, chosen, rejected = row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]
    else:
        cut = row["chosen_labels"].count(-100)
        assert row["chosen_input_ids"][:cut] == row["rejected_input_ids"][:cut]
        assert row["rejected_labels"].count(-100) == cut
        prompt, chosen, rejected = (
            row["chosen_input_ids"][:cut],
            row["chosen_input_ids"][cut:],
            row["rejected_input_ids"][cut:],
        )
    return TokenPair.of_answers(
        "", *(np.array(ids, dtype=np.int32) for ids in (prompt, chosen, rejected))
    )


def ours(trainer: Trainer, case: Case, layout: str = SHARED_PREFIX) -> Outcome:
    """The same numbers by our collator, scorer and objective, on an equal model.

    The reference is computed in the same layout.
    """
    model = get_peft_model(tiny_llama(len(trainer.processing_class)), LORA)
    for name, parameter in adapter(model).items():
        parameter.data = adapter(trainer.model)[name].detach().clone()
    objective = build_objective(case.objective)
    token_pairs = [token_pair(row) for row in trainer.train_dataset]
    full = objective.nll_on == "full"
    batch = collate(token_pairs, layout, trainer.processing_class.pad_token_id, score_prompt=full)
    pair_model = PairModel(model)
    pair_model.use_layout(layout)
    pairs = pair_logps(pair_model(batch), batch)
    if objective.needs_reference:
        with torch.no_grad(), model.disable_adapter():
            reference = pair_logps(pair_model(batch), batch)
        pairs = replace(
            pairs, reference_chosen=reference.chosen, reference_rejected=reference.rejected
        )
    tokens = sum(len(pair.chosen) + (len(pair.prompt) - 1 if full else 0) for pair in token_pairs)
    parts = loss_parts(objective, pairs, len(token_pairs), tokens)
    step = StepMetrics(objective, torch.device("cpu"), with_sums=True)
    step.add(pairs, parts, 1.0)
    sums = step.sums.tolist()
    found = step.means(sums, len(token_pairs), tokens) | step.summed_means(sums, len(token_pairs))
    log_probs = torch.stack(case.log_probs(pairs)).detach()
    return Outcome(
        log_probs,
        parts.total.detach(),
        gradients(model, parts.total),
        case.objective.trl_metrics(found),
    )


@pytest.fixture(scope="module", params=list(CASES))
def case(request) -> Case:
    return CASES[request.param]


@pytest.fixture(scope="module")
def trainer(case, tmp_path_factory) -> Trainer:
    return make_trainer(case, tmp_path_factory.mktemp("trl"))


@pytest.fixture(scope="module", params=[PADDED, PACKED, SHARED_PREFIX])
def both(request, case, trainer) -> tuple[Outcome, Outcome]:
    return ours(trainer, case, request.param), theirs(trainer)


def relative_difference(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def test_rows_hold_pairs_of_different_lengths_with_one_end_token(trainer):
    pairs = [token_pair(row) for row in trainer.train_dataset]
    end = trainer.processing_class.eos_token_id
    assert len({len(pair.prompt) + len(pair.chosen) for pair in pairs}) == len(ROWS)
    for pair in pairs:
        for answer in (pair.chosen, pair.rejected):
            assert answer[-1] == end and (answer == end).sum() == 1


def test_log_probs_equal_those_of_trl(both):
    our, their = both
    assert our.log_probs.shape == their.log_probs.shape == (2, len(ROWS))
    torch.testing.assert_close(our.log_probs, their.log_probs, rtol=RELATIVE, atol=0)


def test_loss_equals_that_of_trl(both):
    our, their = both
    assert our.loss.item() == pytest.approx(their.loss.item(), rel=RELATIVE, abs=0)


def test_metrics_under_trls_names_equal_those_of_trl(both, case):
    our, their = both
    shared = our.metrics.keys() & their.metrics.keys()
    rewards = {f"rewards/{name}" for name in ("accuracies", "margins", "chosen", "rejected")}
    assert shared >= rewards | {"logps/chosen", "logps/rejected"}
    if case.settings.get("cpo_alpha") == 0:
        shared -= {"nll_loss"}  # TRL then computes none, and reports 0
    assert {name: our.metrics[name] for name in shared} == pytest.approx(
        {name: their.metrics[name] for name in shared}, rel=1e-4, abs=1e-5
    )


def test_adapter_gradients_equal_those_of_trl(both):
    our, their = both
    assert our.gradients.keys() == their.gradients.keys()
    assert len(our.gradients) == 2 * 2 * 7  # A and B, two layers, seven linear maps
    worst = {
        name: relative_difference(our.gradients[name], their.gradients[name])
        for name in our.gradients
    }
    assert max(worst.values()) < RELATIVE, worst
    assert min(gradient.norm().item() for gradient in their.gradients.values()) > 1e-4


@pytest.mark.parametrize(
    ("kind", "other"),
    [
        ("orpo", OrpoConfig(lambda_=0.3, nll_on="response")),
        ("ipo", IpoConfig(beta=0.2, log_probs="sum")),
    ],
)
def test_our_default_differs_from_trl_if_the_definition_does(kind, other, tmp_path):
    trainer = make_trainer(CASES[kind], tmp_path)
    our_loss, their_loss = (
        ours(trainer, replace(CASES[kind], objective=other)).loss,
        theirs(trainer).loss,
    )
    assert abs(our_loss - their_loss) / their_loss > 0.01
