"""The shipped demo is honest and small.

No held-out text is in the training pairs, and the length of an answer does not tell its mood.
"""

import importlib.util
import json
import re
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "orpo_ray" / "demo"
PAIR_FILES = {"train.jsonl": 1024, "h1.jsonl": 256, "h2.jsonl": 128, "h3.jsonl": 128}
HELD_OUT = ("h1.jsonl", "h2.jsonl", "h3.jsonl")


@pytest.fixture(scope="module")
def corpus() -> ModuleType:
    """The script's text module, loaded by path: its folder is an example, not a package."""
    path = ROOT / "examples" / "quickstart-cpu" / "corpus.py"
    spec = importlib.util.spec_from_file_location("demo_corpus", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def pairs() -> dict[str, list[dict]]:
    return {
        name: [json.loads(line) for line in (DEMO / name).read_text("utf-8").splitlines()]
        for name in PAIR_FILES
    }


@pytest.fixture(scope="module")
def judge() -> dict:
    return json.loads((DEMO / "judge.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(DEMO / "base")


def question(pair: dict) -> str:
    return pair["prompt"][0]["content"]


def answer(pair: dict, side: str) -> str:
    return pair[side][0]["content"]


def identity(pair: dict) -> tuple[str, str, str]:
    return question(pair), answer(pair, "chosen"), answer(pair, "rejected")


def says(filler: str, text: str) -> bool:
    return re.search(rf"\b{re.escape(filler)}\b", text, re.IGNORECASE) is not None


def test_package_stays_small():
    assert sum(path.stat().st_size for path in DEMO.rglob("*") if path.is_file()) < 3_000_000


def test_text_rebuilt_from_the_seed_equals_the_shipped_files(corpus):
    rebuilt = corpus.text_files(corpus.SEED)
    assert rebuilt.keys() == PAIR_FILES.keys() | {"judge.json"}
    for name, text in rebuilt.items():
        assert (DEMO / name).read_bytes() == text.encode("utf-8"), name


def test_every_line_is_a_single_turn_pair(pairs):
    for name, count in PAIR_FILES.items():
        assert len(pairs[name]) == count
        for pair in pairs[name]:
            assert pair.keys() == {"prompt", "chosen", "rejected"}
            roles = [
                [message["role"] for message in pair[key]]
                for key in ("prompt", "chosen", "rejected")
            ]
            assert roles == [["user"], ["assistant"], ["assistant"]]
            assert answer(pair, "chosen") != answer(pair, "rejected")


def test_no_pair_twice_and_no_held_out_question_in_training(pairs):
    everything = [identity(pair) for name in PAIR_FILES for pair in pairs[name]]
    assert len(everything) == len(set(everything))
    trained = {question(pair) for pair in pairs["train.jsonl"]}
    assert not trained & {question(pair) for name in HELD_OUT for pair in pairs[name]}


def test_no_held_out_filler_is_ever_named_in_training(corpus, pairs):
    trained = "\n".join(text for pair in pairs["train.jsonl"] for text in identity(pair))
    held_out = [
        item.filler
        for item in corpus.items()
        if item.held_out or item.family.name == corpus.UNSEEN_FAMILY
    ]
    assert [filler for filler in held_out if says(filler, trained)] == []


def test_no_held_out_wording_in_training(corpus, pairs):
    trained = {question(pair) for pair in pairs["train.jsonl"]}
    for family in corpus.FAMILIES:
        first = 0 if family.name == corpus.UNSEEN_FAMILY else -corpus.HELD_OUT_WORDINGS
        for wording in family.wordings[first:]:
            pattern = re.compile(re.escape(wording).replace(re.escape("{x}"), ".+"))
            assert not any(pattern.fullmatch(text) for text in trained), wording


def starts_and_ends(text: str, openers: tuple[str, ...], closers: tuple[str, ...]) -> bool:
    return text.startswith(openers) and text.endswith(closers)


@pytest.mark.parametrize("name", ["h2.jsonl", "h3.jsonl"])
def test_answer_phrases_of_h2_and_h3_are_new(corpus, pairs, name):
    trained = "\n".join(
        answer(pair, side) for pair in pairs["train.jsonl"] for side in ("chosen", "rejected")
    )
    lists = (corpus.POLITE_OPENERS, corpus.POLITE_REMARKS, corpus.POLITE_FAREWELLS)
    lists += (corpus.RUDE_OPENERS, corpus.RUDE_REMARKS, corpus.RUDE_FAREWELLS)
    assert not any(
        phrase in trained for phrases in lists for phrase in phrases[-corpus.HELD_OUT_PHRASES :]
    )
    new = corpus.NEW_PHRASES
    for pair in pairs[name]:
        assert starts_and_ends(answer(pair, "chosen"), new.polite_openers, new.polite_closers)
        assert starts_and_ends(answer(pair, "rejected"), new.rude_openers, new.rude_closers)


def test_wrong_facts_are_wrong(corpus):
    assert [item for item in corpus.items() if item.right == item.wrong] == []


def test_moods_mirror_each_other_in_counts(corpus, pairs):
    phrases = corpus.ALL_PHRASES
    mirrored = (
        (phrases.polite_openers, phrases.rude_openers, str.startswith),
        (phrases.polite_closers, phrases.rude_closers, str.endswith),
    )
    for name in PAIR_FILES:
        for polite, rude, has in mirrored:
            counts = [
                Counter(
                    i
                    for pair in pairs[name]
                    for i, phrase in enumerate(mood)
                    if has(answer(pair, side), phrase)
                )
                for mood, side in ((polite, "chosen"), (rude, "rejected"))
            ]
            assert counts[0] == counts[1]
            assert counts[0].total() == len(pairs[name])


def test_length_does_not_tell_chosen_from_rejected(pairs, tokenizer):
    for name in PAIR_FILES:
        chosen, rejected = (
            [
                len(ids)
                for ids in tokenizer([answer(pair, side) for pair in pairs[name]])["input_ids"]
            ]
            for side in ("chosen", "rejected")
        )
        assert sum(chosen) == pytest.approx(sum(rejected), rel=0.03)
        longer = sum((c > r) + 0.5 * (c == r) for c, r in zip(chosen, rejected, strict=True))
        assert 0.4 < longer / len(chosen) < 0.6


def test_tokenizer_is_small_and_pads_with_a_token_of_its_own(tokenizer):
    assert len(tokenizer) == 1024
    assert tokenizer.pad_token_id is not None
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_template_ends_every_answer_with_exactly_one_end_token(pairs, tokenizer):
    for pair in (pairs[name][0] for name in PAIR_FILES):
        prompt = tokenizer.apply_chat_template(
            pair["prompt"], add_generation_prompt=True, return_dict=False
        )
        for side in ("chosen", "rejected"):
            whole = tokenizer.apply_chat_template(pair["prompt"] + pair[side], return_dict=False)
            response = whole[len(prompt) :]
            assert whole[: len(prompt)] == prompt
            assert response.count(tokenizer.eos_token_id) == 1
            assert response[-1] == tokenizer.eos_token_id
            assert tokenizer.decode(response, skip_special_tokens=True) == answer(pair, side)


def test_judge_covers_64_questions_of_h1(corpus, pairs, judge):
    asked = [entry["prompt"][0]["content"] for entry in judge["prompts"]]
    assert len(asked) == len(set(asked)) == 64
    assert set(asked) <= {question(pair) for pair in pairs["h1.jsonl"]}
    shares = {item.filler: item.good_share for item in corpus.items()}
    assert Counter(shares[entry["filler"]] for entry in judge["prompts"]) == {0.85: 32, 0.15: 32}


def test_judge_knows_every_h1_answer_to_its_questions(pairs, judge):
    facts = {entry["prompt"][0]["content"]: entry for entry in judge["prompts"]}
    for pair in (pair for pair in pairs["h1.jsonl"] if question(pair) in facts):
        for side, fact, mood in (("chosen", "right", "polite"), ("rejected", "wrong", "rude")):
            sentence = facts[question(pair)][fact]
            known = {
                f"{o} {sentence} {c}"
                for o in judge[f"{mood}_openers"]
                for c in judge[f"{mood}_closers"]
            }
            assert answer(pair, side) in known


def test_base_weights_load_as_float32():
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(DEMO / "base")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.config.tie_word_embeddings
    assert not model.generation_config.do_sample
