"""data.train_on=all-assistant: the loss is the one by hand, however its steps are laid out."""

import json
import math
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lab import ALONE, TOLERANCE, Cell, MakeLab, largest
from support import BASE, decided, read_metrics, run_config, turn_pairs, turn_rows, write_pairs
from transformers import AutoModelForCausalLM, AutoTokenizer

from orpo_ray import api
from orpo_ray.data.pairs import TokenPair
from orpo_ray.data.store import Artifact, open_artifact
from orpo_ray.objectives import build_objective
from orpo_ray.runs.console import SILENT
from orpo_ray.training.load import load_pair_model
from orpo_ray.training.metrics import score_pairs, summarise
from orpo_ray.training.pair_model import PairModel
from orpo_ray.training.plan import PACKED, PADDED, SHARED_PREFIX
from orpo_ray.training.run_plan import plan_run
from orpo_ray.training.steps import StepDataset, Work, pack_loss

PAIRS = 8
START, END = "<|im_start|>assistant\n", "<|im_end|>"
DEVICE = torch.device("cpu")
DECISIONS = decided(10_000)


@pytest.fixture(scope="module")
def turns(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Eight pairs to train on and four to evaluate on, half of which part at an earlier turn."""
    return write_pairs(
        tmp_path_factory.mktemp("turns"), turn_pairs("train", PAIRS), turn_pairs("h1", 4)
    )


@pytest.fixture(scope="module")
def by_hand(turns: Artifact) -> dict[str, list[list[float]]]:
    """Log-probs of the assistant tokens of each pair, one row at a time, found in the text.

    By side: those of the shared prompt, then those of each answer.
    """
    tokenizer, model = (
        AutoTokenizer.from_pretrained(BASE),
        AutoModelForCausalLM.from_pretrained(BASE),
    )
    found: dict[str, list[list[float]]] = {"prompt": [], "chosen": [], "rejected": []}
    for pair in turns.train:
        for side in ("chosen", "rejected"):
            log_probs = assistant_log_probs(tokenizer, model, pair, side)
            found[side].append([value for place, value in log_probs if place >= len(pair.prompt)])
            if side == "chosen":
                found["prompt"].append(
                    [value for place, value in log_probs if place < len(pair.prompt)]
                )
    return found


@torch.no_grad()
def assistant_log_probs(
    tokenizer: Any, model: Any, pair: TokenPair, side: str
) -> list[tuple[int, float]]:
    """Place and log-prob of every token that an assistant wrote, up to its end token."""
    ids = [*pair.prompt.tolist(), *getattr(pair, side).tolist()]
    log_probs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    found, open_ = [], False
    for place in range(1, len(ids)):
        if open_:
            found.append((place, float(log_probs[place - 1, ids[place]])))
        if tokenizer.decode(ids[place : place + 1]) == END:
            open_ = False
        elif tokenizer.decode(ids[: place + 1]).endswith(START):
            open_ = True
    return found


def test_the_rows_have_turns_to_train_in_prompts_and_in_answers(
    by_hand: dict[str, list[list[float]]], turns: Artifact
) -> None:
    counts = [[len(found) for found in by_hand[side]] for side in ("prompt", "chosen", "rejected")]
    assert np.array(counts).T.tolist() == turns.train.trained.tolist()
    assert turns.train.trained[::2, 0].min() > 0 and turns.train.trained[1::2, 0].max() == 0
    answers = turns.train.lengths[:, 1:] - turns.train.trained[:, 1:]
    assert answers[::2].max() == 0 and answers[1::2].min() > 0


def orpo(log_probs: dict[str, list[list[float]]]) -> float:
    tokens = [value for side in ("prompt", "chosen") for pair in log_probs[side] for value in pair]
    ratios = []
    for chosen, rejected in zip(log_probs["chosen"], log_probs["rejected"], strict=True):
        p, q = (math.exp(sum(side) / len(side)) for side in (chosen, rejected))
        ratios.append(math.log(p / (1 - p)) - math.log(q / (1 - q)))
    preference = sum(math.log(1 + math.exp(-ratio)) for ratio in ratios) / len(ratios)
    return -sum(tokens) / len(tokens) + 0.5 * preference


def dpo(log_probs: dict[str, list[list[float]]]) -> float:
    tokens = [value for side in ("prompt", "chosen") for pair in log_probs[side] for value in pair]
    margins = [
        sum(chosen) - sum(rejected)
        for chosen, rejected in zip(log_probs["chosen"], log_probs["rejected"], strict=True)
    ]
    preference = sum(math.log(1 + math.exp(-0.1 * margin)) for margin in margins) / len(margins)
    return preference - 0.3 * sum(tokens) / len(tokens)


def sft(log_probs: dict[str, list[list[float]]]) -> float:
    tokens = [value for side in ("prompt", "chosen") for pair in log_probs[side] for value in pair]
    return -sum(tokens) / len(tokens)


OBJECTIVES: dict[str, Any] = {
    "orpo": (orpo, {"kind": "orpo", "lambda": 0.5}),
    "dpo": (dpo, {"kind": "dpo", "beta": 0.1, "nll_weight": 0.3}),
    "sft": (sft, {"kind": "sft"}),
}


@pytest.fixture(scope="module")
def model() -> PairModel:
    config = run_config(Path("unused"), adapter={"dropout": 0.0}, model={"quantization": "none"})
    return load_pair_model(config, DECISIONS, print).eval()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_loss_is_the_one_by_hand_in_every_layout_and_cut(
    name: str, by_hand: dict[str, list[list[float]]], turns: Artifact, model: PairModel
) -> None:
    """Packs of weight 0 are among them. DPO's reference gives 0 to both answers."""
    hand, settings = OBJECTIVES[name]
    expected, idle = hand(by_hand), 0
    for layout, (world, budget) in product(
        (PADDED, PACKED, SHARED_PREFIX), ((1, 10_000), (1, 300), (3, 700), (5, 10))
    ):
        config = run_config(Path("unused"), objective=settings, training={"pairs_per_step": PAIRS})
        objective = build_objective(config.objective)
        steps = plan_run(config, turns.train, world, budget, layout)
        idle += sum(not pack.weight for rank in steps[0].packs for pack in rank)
        work = Work(
            steps=steps,
            train=turns.train,
            evaluation=turns.eval,
            reference=np.zeros((PAIRS, 2)) if objective.needs_reference else None,
            pad_id=0,
            layout=layout,
            token_budget=budget,
        )
        model.use_layout(layout)
        total = 0.0
        for rank in range(world):
            step = StepDataset(work, objective, 0, rank)[0]
            for pack in step.packs:
                _, parts = pack_loss(model, objective, pack, step, DEVICE)
                total += pack.weight * parts.total.item()
        assert total == pytest.approx(expected, rel=1e-5), (layout, world, budget)
    assert idle


def test_evaluation_takes_means_over_trained_tokens(
    by_hand: dict[str, list[list[float]]], turns: Artifact, model: PairModel
) -> None:
    model.use_layout(SHARED_PREFIX)
    scores = score_pairs(model, turns.train, 0, 1000)
    assert scores.chosen == pytest.approx([sum(side) for side in by_hand["chosen"]], rel=1e-4)
    assert scores.rejected == pytest.approx([sum(side) for side in by_hand["rejected"]], rel=1e-4)
    means = [sum(side) / len(side) for side in by_hand["chosen"]]
    assert summarise(scores)["chosen_logp"] == pytest.approx(sum(means) / len(means), rel=1e-4)


def test_two_workers_give_the_curve_of_one(make_lab: MakeLab, turns: Artifact) -> None:
    lab = make_lab(artifact=turns)
    cells = [ALONE, Cell(2, 1, "ddp"), Cell(2, 2, "ddp", "padded")]
    names = lab.add_cells(cells, steps=4, model={"quantization": "none"})
    lab.run()
    assert largest(lab, names[0], names[1:]) < TOLERANCE


def test_a_run_from_rows_to_an_adapter(tmp_path: Path) -> None:
    """The command line's own way, with rows of both kinds and a pair that `last` refuses."""
    files = {}
    for name, count in (("train", 16), ("h1", 4)):
        files[name] = tmp_path / f"{name}.jsonl"
        lines = (json.dumps(row) + "\n" for row in turn_rows(name, count))
        files[name].write_text("".join(lines), encoding="utf-8")
    data: dict[str, Any] = {
        "train": [{"source": str(files["train"])}],
        "eval": [{"source": str(files["h1"])}],
        "max_length": 256,
        "max_prompt_length": 128,
        "max_bad_fraction": 1.0,
    }
    training = {"max_steps": 2, "tokens_per_microbatch": 1000}
    config = run_config(tmp_path, data={**data, "train_on": "all-assistant"}, training=training)
    result = api.train(config, SILENT)
    assert result is not None
    artifacts = list((tmp_path / "artifacts").iterdir())
    artifact = open_artifact(artifacts[0])
    assert (len(artifact.train), len(artifact.eval), artifact.summary.bad) == (16, 4, {})
    assert (artifact.train.trained[:, 0] > 0).sum() == 8
    losses = [line["train/loss"] for line in read_metrics(config.run_dir) if "train/loss" in line]
    assert len(losses) == 2 and np.isfinite(losses).all()
    assert list((config.run_dir / "adapter").glob("*.safetensors"))
    last = api.prepare(run_config(tmp_path, "last", data=data), SILENT)
    assert last.path != artifact.path
    assert last.summary.bad == {"different-prompts": 10}
    assert last.train.trained[:, 0].max() == 0
