"""`orpo-ray demo`: the real thing against the figures it promises, and its judge of answers."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from terminal import Done, shell

from orpo_ray.cli.demo_run import demo_config, demo_outcome, judge_prompts, verdict


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Done:
    """What the demo prints, and the seconds it took, with Ray's start and all imports."""
    done = shell("demo", "--json", "--storage", tmp_path_factory.mktemp("demo"))
    assert done.code == 0, done.err
    return done


@pytest.mark.ray
@pytest.mark.slow
def test_the_demo_keeps_its_promises(demo: Done) -> None:
    result = demo.result
    assert result["accuracy_before"] <= 0.6
    assert result["accuracy_after"] >= 0.9
    assert result["h2_after"] >= 0.9
    assert result["h3_after"] >= 0.9
    assert result["greedy_good"] >= 50
    assert result["seconds"] < 180


@pytest.mark.ray
@pytest.mark.slow
def test_the_demo_reports_what_is_on_disk_and_in_the_model(demo: Done) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from orpo_ray.models.base import count_quantized

    result = demo.result
    quantized = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    base = AutoModelForCausalLM.from_pretrained(result["base"], quantization_config=quantized, device_map="cpu")
    model = PeftModel.from_pretrained(base, result["adapter"])
    assert result["quantized_modules"] == count_quantized(model) > 0
    lines = Path(result["eval_file"]).read_text(encoding="utf-8").splitlines()
    assert len(lines) == 256
    assert all(set(json.loads(line)) == {"prompt", "chosen", "rejected"} for line in lines)
    assert result["workers"] >= 1 and result["strategy"]
    stored = json.loads((Path(result["adapter"]).parent / "result.json").read_text(encoding="utf-8"))
    assert (result["steps"], result["workers"]) == (stored["steps"], stored["workers"])
    assert (result["strategy"], result["adapter"]) == (stored["strategy"], stored["adapter"])


@pytest.mark.ray
@pytest.mark.slow
def test_the_demo_says_how_it_goes_on_stderr(demo: Done) -> None:
    assert demo.out.count("\n") == 1
    assert any(line.startswith("step 80/80") for line in demo.said)
    assert not any("warning" in line.lower() or "Traceback" in line for line in demo.said)


# --- the judge --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def question() -> dict[str, Any]:
    return judge_prompts()[0]


@pytest.fixture(scope="module")
def judge() -> dict[str, Any]:
    import importlib.resources

    file = importlib.resources.files("orpo_ray") / "demo" / "judge.json"
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content


def test_there_are_64_questions_with_two_facts_each() -> None:
    questions = judge_prompts()
    assert len(questions) == 64
    assert all(question["right"] != question["wrong"] for question in questions)
    assert all(question["prompt"][-1]["role"] == "user" for question in questions)


def test_every_polite_frame_around_the_right_fact_is_good(question: dict[str, Any], judge: dict[str, Any]) -> None:
    answers = [f"{o} {question['right']} {c}" for o in judge["polite_openers"] for c in judge["polite_closers"]]
    assert Counter(verdict(answer, question) for answer in answers) == {"good": len(answers)}


def test_every_rude_frame_around_the_wrong_fact_is_bad(question: dict[str, Any], judge: dict[str, Any]) -> None:
    answers = [f"{o} {question['wrong']} {c}" for o in judge["rude_openers"] for c in judge["rude_closers"]]
    assert Counter(verdict(answer, question) for answer in answers) == {"bad": len(answers)}


@pytest.mark.parametrize(
    "form",
    [
        "",
        "{right}",
        "{open} {wrong} {close}",
        "{rude} {right} {close}",
        "{open} {right} {rude_close}",
        "{rude} {right} {rude_close}",
        "{open} {right}",
        "{right} {close}",
        "{open} {right} {close} {close}",
        "{open}  {right} {close}",
        "{open} {right} {close}.",
        "{open} {right} {right} {close}",
    ],
)
def test_anything_else_is_broken(question: dict[str, Any], judge: dict[str, Any], form: str) -> None:
    answer = form.format(
        right=question["right"],
        wrong=question["wrong"],
        open=judge["polite_openers"][0],
        close=judge["polite_closers"][0],
        rude=judge["rude_openers"][0],
        rude_close=judge["rude_closers"][0],
    )
    assert verdict(answer, question) == "broken"


def test_the_outcome_is_read_off_the_run(judge: dict[str, Any], tmp_path: Path) -> None:
    questions = judge_prompts()
    good = [f"{judge['polite_openers'][0]} {q['right']} {judge['polite_closers'][0]}" for q in questions]
    bad = [f"{judge['rude_openers'][0]} {q['wrong']} {judge['rude_closers'][0]}" for q in questions]
    samples = [{"base": b, "trained": g} for b, g in zip(bad, [*good[:60], "", "", "", ""], strict=True)]
    sources = ("h1.jsonl", "h2.jsonl", "h3.jsonl")
    evaluation = {
        "metrics": {
            "base": {name: {"accuracy": 0.5} for name in sources},
            "trained": {name: {"accuracy": 0.9 + n / 100} for n, name in enumerate(sources, start=1)},
        },
        "samples": samples,
        "quantized_modules": 14,
    }
    trained = {"adapter": "somewhere", "workers": 1, "strategy": "alone", "steps": 3, "pairs_per_second": 9.0}
    outcome = demo_outcome(demo_config("orpo", str(tmp_path), "now"), trained, evaluation)
    assert (outcome["accuracy_before"], outcome["accuracy_after"]) == (0.5, 0.91)
    assert (outcome["h2_after"], outcome["h3_after"]) == (0.92, 0.93)
    assert outcome["greedy_before"] == {"good": 0, "bad": 64, "broken": 0}
    assert outcome["greedy_after"] == {"good": 60, "bad": 0, "broken": 4}
    assert (outcome["greedy_good"], outcome["quantized_modules"]) == (60, 14)
