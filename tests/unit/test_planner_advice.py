"""ORPO in one stage, or SFT and then DPO: by the base, and by how many pairs there are."""

import json
from pathlib import Path

import pytest

from orpo_ray.planner.advice import FEW_PAIRS, advise, has_template, is_chat_model
from orpo_ray.planner.contest import Contest
from orpo_ray.planner.interval import Interval
from orpo_ray.planner.roads import Roads

ROADS = Roads("l4", {"orpo": Interval(2.0, 3.0, 4.0), "sft>dpo": Interval(6.0, 7.0, 8.0)})


@pytest.mark.parametrize(
    ("name", "template", "chats"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", None, True),
        ("google/gemma-2-2b-it", None, True),
        ("google/gemma-2-2b-it", False, True),
        ("HuggingFaceH4/zephyr-7b-beta", None, True),
        ("meta-llama/Llama-2-7b-chat-hf", None, True),
        ("HuggingFaceH4/mistral-7b-sft-beta", None, True),
        ("/models/chat/llama", None, None),
        ("owner/italian-7b", None, None),
        ("google/gemma-3-1b-pt", True, False),
        ("Qwen/Qwen3-8B-Base", True, False),
        ("Qwen/Qwen2.5-0.5B", True, None),  # pre-trained, and with a template
        ("mistralai/Mistral-7B-v0.1", False, False),
        ("mistralai/Mistral-7B-v0.1", None, None),
    ],
)
def test_the_name_says_it_first_and_a_missing_template_second(name, template, chats):
    assert is_chat_model(name, template) is chats


def write(folder: Path, name: str, content: object) -> None:
    folder.mkdir(exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / name).write_text(text, encoding="utf-8")


def test_a_template_is_in_a_file_of_its_own_or_in_the_tokenizers_settings(tmp_path):
    assert has_template(None) is None
    assert has_template(tmp_path) is None
    write(tmp_path / "plain", "tokenizer_config.json", {"model_max_length": 512})
    assert has_template(tmp_path / "plain") is False
    write(tmp_path / "inside", "tokenizer_config.json", {"chat_template": "{{ messages }}"})
    assert has_template(tmp_path / "inside") is True
    write(tmp_path / "plain", "chat_template.jinja", "{{ messages }}")
    assert has_template(tmp_path / "plain") is True
    write(tmp_path / "broken", "tokenizer_config.json", "{")
    assert has_template(tmp_path / "broken") is None


def test_a_base_that_chats_is_not_taught_to_answer_again():
    assert advise(60_000, True).method.startswith("DPO alone")
    assert advise(100, True).method.startswith("DPO alone")


def test_few_pairs_are_for_sft_first():
    few = advise(FEW_PAIRS - 1, False)
    assert few.method.startswith("SFT on the chosen answers first")
    assert "4,999 pairs" in few.reason
    assert advise(FEW_PAIRS, False).method == "ORPO"


@pytest.mark.parametrize("pairs", [None, 60_000])
def test_orpo_is_what_else_is_trained(pairs):
    found = advise(pairs, False, ROADS)
    assert found.method == "ORPO"
    assert "not known" not in found.reason
    assert "arXiv:2403.07691" in found.source
    assert found.check == "to know for your data: orpo-ray compare"


def test_it_asks_what_neither_name_nor_template_says():
    found = advise(60_000, None)
    assert found.method == "ORPO"
    assert "is the base instruction-tuned?" in found.reason and "--tuned" in found.reason
    assert "?" not in advise(60_000, False).reason


def test_a_budget_that_two_stages_exceed_is_a_reason():
    assert (
        "two stages would not end within 5 hours" in advise(60_000, False, ROADS, budget=5).reason
    )
    assert "even this does not end within 2 hours" in advise(60_000, False, ROADS, budget=2).reason
    assert "not end" not in advise(60_000, False, ROADS, budget=8).reason


def test_every_road_is_measured_against_the_budget():
    tuned = Roads("l4", {"orpo": Interval.sure(3.0), "dpo": Interval.sure(2.0)})
    thumbs = Roads("l4", {"kto": Interval.sure(4.0)})
    late = "it does not end within 1 hours (2 to 2 hours)"
    assert late in advise(60_000, True, tuned, budget=1).reason
    assert "does not end within 5 hours" in advise(100, False, ROADS, budget=5).reason
    assert (
        "does not end within 3 hours" in advise(9, None, thumbs, budget=3, has_pairs=False).reason
    )
    assert "not end" not in advise(60_000, True, tuned, budget=2).reason


def test_the_hours_of_both_roads_are_told():
    contest = Contest("l4", ("orpo", "sft>dpo"), 3, Interval(20.0, 25.0, 30.0))
    found = advise(60_000, False, ROADS, contest)
    assert "2 to 4 hours, and SFT, then DPO 6 to 8 hours" in found.reason
    assert "orpo and sft>dpo on the same budget, each with 3 seeds: 20 to 30 hours on l4" in (
        found.check
    )
