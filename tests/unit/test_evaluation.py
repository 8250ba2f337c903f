"""Scores by source, and greedy answers that batching does not change."""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from orpo_ray.evaluation.evaluate import judge_model, load_trained
from orpo_ray.evaluation.generate import greedy_answers
from orpo_ray.evaluation.preference import evaluate_pairs
from orpo_ray.training.decisions import Decisions
from orpo_ray.training.metrics import score_pairs
from orpo_ray.training.pair_model import PairModel
from orpo_ray.training.plan import PADDED
from orpo_ray.training.strategy import Strategy
from tests.support import BASE, demo_pairs, run_config, write_pairs

DECISIONS = Decisions(
    device="cpu",
    dtype="float32",
    attention="sdpa",
    layout=PADDED,
    strategy=Strategy.SINGLE,
    gradient_checkpointing=False,
    tokens_per_microbatch=512,
)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BASE)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> PairModel:
    return load_trained(run_config(tmp_path_factory.mktemp("storage")), DECISIONS, None)


def test_each_source_is_scored_apart_and_all_together(tmp_path: Path, model: PairModel):
    table = write_pairs(
        tmp_path, demo_pairs("train", 2), [*demo_pairs("h1", 6), *demo_pairs("h3", 3)]
    ).eval
    result = evaluate_pairs(model, table, pad_id=0, token_budget=512)
    assert list(result) == ["all", "h1.jsonl", "h3.jsonl"]
    assert [result[source]["pairs"] for source in result] == [9, 6, 3]
    whole = (6 * result["h1.jsonl"]["margin"] + 3 * result["h3.jsonl"]["margin"]) / 9
    assert result["all"]["margin"] == pytest.approx(whole, rel=1e-9)
    scores = score_pairs(model, table, 0, 512)
    by_hand = -scores.chosen[6:].sum() / scores.chosen_tokens[6:].sum()
    assert result["h3.jsonl"]["nll"] == pytest.approx(by_hand, rel=1e-9)


def test_scores_do_not_depend_on_the_token_budget(tmp_path: Path, model: PairModel):
    table = write_pairs(tmp_path, demo_pairs("train", 2), demo_pairs("h1", 9)).eval
    one_by_one, together = (score_pairs(model, table, 0, budget) for budget in (1, 10_000))
    assert one_by_one.chosen == pytest.approx(together.chosen, rel=1e-5)
    assert one_by_one.rejected == pytest.approx(together.rejected, rel=1e-5)


def test_answers_come_in_order_and_do_not_depend_on_their_batch(model: PairModel, tokenizer):
    prompts = [pair.prompt.tolist() for pair in demo_pairs("h1", 7)]
    assert len({len(prompt) for prompt in prompts}) > 1, (
        "prompts of one length would not test the padding"
    )
    alone = [greedy_answers(model, tokenizer, [prompt], max_new_tokens=40)[0] for prompt in prompts]
    assert greedy_answers(model, tokenizer, prompts, max_new_tokens=40, batch_size=3) == alone
    assert len(set(alone)) > 1


def test_an_answer_is_what_the_model_finds_most_likely_token_by_token(model: PairModel, tokenizer):
    prompt = demo_pairs("h1", 1)[0].prompt.tolist()
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(40):
            following = (
                model.causal_model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item()
            )
            if following == tokenizer.eos_token_id:
                break
            ids.append(following)
    expected = tokenizer.decode(ids[len(prompt) :]).strip()
    assert greedy_answers(model, tokenizer, [prompt], max_new_tokens=40) == [expected]


def test_no_prompts_give_no_answers(model: PairModel, tokenizer):
    assert greedy_answers(model, tokenizer, [], max_new_tokens=4) == []


def test_the_base_is_judged_with_its_quantised_layers_counted(tmp_path: Path, tokenizer):
    table = write_pairs(tmp_path, demo_pairs("train", 2), demo_pairs("h1", 2)).eval
    nf4 = judge_model(run_config(tmp_path), DECISIONS, tokenizer, table, None, [], 4)
    plain = judge_model(
        run_config(tmp_path, model={"quantization": "none"}),
        DECISIONS,
        tokenizer,
        table,
        None,
        [],
        4,
    )
    assert (nf4.quantized_modules, plain.quantized_modules) == (4 * 7, 0), (
        "four layers of seven linear modules"
    )
