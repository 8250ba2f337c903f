"""Scores by source, and greedy answers that batching does not change."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from orpo_ray.api.trained import _prompts, distinct_prompts
from orpo_ray.data.pairs import TokenPair
from orpo_ray.data.store import PairTable
from orpo_ray.evaluation.evaluate import (
    Judged,
    Questions,
    evaluation_of,
    judge_model,
    load_trained,
    score_table,
)
from orpo_ray.evaluation.judge.by_reward import ByReward
from orpo_ray.evaluation.preference import by_source
from orpo_ray.runs.console import SILENT
from orpo_ray.training.generate import Answer, answers_of
from orpo_ray.training.metrics import score_pairs
from orpo_ray.training.pair_model import PairModel
from orpo_ray.training.plan import PADDED, SHARED_PREFIX, Layout
from orpo_ray.training.sampling import Sampling
from tests.support import BASE, decided, demo_pairs, random_base, run_config, write_pairs

DECISIONS = decided(512)


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
    result = by_source(score_pairs(model, table, pad_id=0, token_budget=512), table)
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
    alone = [
        answers_of(model, tokenizer, [prompt], Sampling(max_new_tokens=40))[0] for prompt in prompts
    ]
    assert answers_of(model, tokenizer, prompts, Sampling(max_new_tokens=40), 200) == alone
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
    assert answers_of(model, tokenizer, [prompt], Sampling(max_new_tokens=40)) == [
        Answer(expected, is_cut=False, tokens=len(ids) - len(prompt))
    ]


def test_an_answer_ends_with_the_templates_own_token_although_eos_is_another(
    model: PairModel, tokenizer
):
    prompts = [pair.prompt.tolist() for pair in demo_pairs("h1", 3)]
    expected = answers_of(model, tokenizer, prompts, Sampling(max_new_tokens=40))
    other = AutoTokenizer.from_pretrained(BASE, eos_token="<|pad|>")
    assert answers_of(model, other, prompts, Sampling(max_new_tokens=40)) == expected
    assert not any(answer.is_cut for answer in expected)


def test_an_answer_that_comes_to_the_limit_is_cut(model: PairModel, tokenizer):
    prompt = demo_pairs("h1", 1)[0].prompt.tolist()
    (whole,) = answers_of(model, tokenizer, [prompt], Sampling(max_new_tokens=40))
    (cut,) = answers_of(model, tokenizer, [prompt], Sampling(max_new_tokens=3))
    assert cut.is_cut and whole.text.startswith(cut.text) and cut.text != whole.text


def test_samples_have_different_prompts(tmp_path: Path, tokenizer):
    first, second = demo_pairs("h1", 2)
    pairs = [first, replace(first, pair_id="again"), second]
    artifact = write_pairs(tmp_path, demo_pairs("train", 2), pairs)
    both = [first.prompt.tolist(), second.prompt.tolist()]
    for samples, expected in ((0, []), (1, both[:1]), (2, both), (5, both)):
        assert _prompts(tokenizer, artifact, (), samples) == expected


def test_no_prompts_give_no_answers(model: PairModel, tokenizer):
    assert answers_of(model, tokenizer, [], Sampling(max_new_tokens=4)) == []


def test_the_base_is_judged_with_its_quantised_layers_counted(tmp_path: Path, tokenizer):
    table = write_pairs(tmp_path, demo_pairs("train", 2), demo_pairs("h1", 2)).eval
    nothing = Questions([], max_new_tokens=4)
    judge = partial(judge_model, trained=None, console=SILENT)
    nf4 = judge(run_config(tmp_path), DECISIONS, tokenizer, table, nothing)
    whole = run_config(tmp_path, model={"quantization": "none"})
    plain = judge(whole, DECISIONS, tokenizer, table, nothing)
    assert (nf4.quantized_modules, plain.quantized_modules) == (4 * 7, 0), (
        "four layers of seven linear modules"
    )


def test_pairs_are_scored_in_the_layout_of_the_run(tmp_path: Path, model: PairModel):
    table = write_pairs(tmp_path, demo_pairs("train", 2), demo_pairs("h1", 80)).eval
    computed: dict[Layout, int] = {}

    def count(body: object, given: object, named: dict[str, torch.Tensor]) -> None:
        computed[layout] += named["input_ids"].numel()

    hook = model.body.register_forward_pre_hook(count, with_kwargs=True)
    found = {}
    for layout in (PADDED, SHARED_PREFIX):
        computed[layout] = 0
        decisions = replace(DECISIONS, layout=layout)
        found[layout] = score_table(model, decisions, table, 0, SILENT)
        assert model.layout is PADDED, "answers need padded rows"
    hook.remove()
    assert found[SHARED_PREFIX].chosen == pytest.approx(found[PADDED].chosen, rel=1e-5)
    # The layouts are compared on a few pairs first, which takes some of what is saved.
    assert computed[SHARED_PREFIX] < 0.9 * computed[PADDED]


def test_a_long_answer_changes_no_reward_of_others(tmp_path: Path, tokenizer):
    """A base whose positions are stretched by the longest row: the run has read no such pair."""
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 32}
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0, 6.0, 8.0, 10.0]}
    base = random_base(
        tmp_path / "base",
        "phi3",
        max_position_embeddings=128,
        original_max_position_embeddings=32,
        rope_parameters={**rope, **factors, "rope_theta": 1e4},
        initializer_range=0.5,
        pad_token_id=0,
    )
    config = run_config(tmp_path, model={"base": str(base), "quantization": "none"})
    decisions = replace(decided(128), layout=SHARED_PREFIX)
    judge = ByReward(config=config, decisions=decisions, trained="", tokenizer=tokenizer)
    prompt, *answers = (np.arange(3, 3 + size, dtype=np.int32) for size in (4, 5, 6, 40))
    pairs = [TokenPair.of_answers(str(len(one)), prompt, one, one[:0]) for one in answers]
    alone = judge._means(pairs[:2], None, SILENT)
    assert judge._means(pairs, None, SILENT)[:2] == pytest.approx(alone, rel=1e-5)


def judged(table: PairTable, model: PairModel, gain: float, answers: list[Answer]) -> Judged:
    """What a model would be that finds each chosen answer likelier by `gain` nats a token."""
    found = score_pairs(model, table, 0, 512)
    scores = replace(found, chosen=found.chosen + gain * found.chosen_tokens)
    return Judged(by_source(scores, table), scores, answers, quantized_modules=0)


def test_an_evaluation_tells_what_changed_and_which_answers_were_cut(
    tmp_path: Path, model: PairModel
):
    table = write_pairs(tmp_path, demo_pairs("train", 2), demo_pairs("h1", 9)).eval
    ended, cut = Answer("yes", False, 1), Answer("and then", True, 2)
    base = judged(table, model, 0.0, [ended, ended])
    tuned = judged(table, model, 0.5, [ended, cut])
    found = evaluation_of("run", "somewhere", ["a", "b"], [base, tuned], limit=8)
    assert found.changes["margin"]["difference"]["value"] == pytest.approx(0.5)
    assert found.changes["accuracy"]["before"]["value"] == base.metrics["all"]["accuracy"]
    assert any(
        "1 of 2 answers were cut, because they did not end within 8 tokens" in line
        for line in found.remarks
    )
    few = "9 held-out pairs show no difference of accuracy below"
    assert not any(few in line for line in found.remarks), "the difference is larger"
    same = evaluation_of("run", "somewhere", ["a", "b"], [base, base], limit=8)
    assert any(few in line for line in same.remarks)
    assert [sample.trained_is_cut for sample in found.samples] == [False, True]
    alone = evaluation_of("run", None, ["a", "b"], [base], limit=8)
    assert (alone.adapter, alone.changes, list(alone.metrics)) == (None, {}, ["base"])
    assert [sample.trained for sample in alone.samples] == [None, None]


def test_long_prompts_are_left_out_and_others_take_their_place(tmp_path: Path):
    pairs = demo_pairs("h1", 8)
    table = write_pairs(tmp_path, demo_pairs("train", 2), [*pairs[:4], *pairs]).eval
    prompts = [pair.prompt.tolist() for pair in pairs]
    most = sorted(len(prompt) for prompt in prompts)[4]
    short = [prompt for prompt in prompts if len(prompt) <= most]
    assert 3 < len(short) < len(prompts)
    assert distinct_prompts(table, 3, most) == short[:3]
    assert distinct_prompts(table, 100, most) == short
    assert distinct_prompts(table, 100) == prompts
    assert distinct_prompts(table, 0) == []
