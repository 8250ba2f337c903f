"""`orpo-ray demo`: the real thing against the figures it promises, and its judge of answers."""

import json
import signal
import subprocess
import sys
from collections import Counter
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray_head import Processes
from support import Done, wait_until
from terminal import ENVIRONMENT, shell, start

from orpo_ray.cli.demo_run import demo_config, demo_outcome, judge_prompts, next_demo, verdict
from orpo_ray.config import RunConfig, dump
from orpo_ray.runs.files import write_json
from orpo_ray.runs.results import Evaluation, Sample, TrainResult
from orpo_ray.runs.run import Run

CPU_S = 180.0
"""It takes under three minutes, of one core even; a clock would time what else the machine does."""


@pytest.fixture(scope="module")
def timed_demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Done, float]:
    """What the demo prints, and the CPU seconds of its own and of Ray's processes."""
    processes = Processes()
    storage = tmp_path_factory.mktemp("demo")
    command = start("demo", "--json", "--storage", storage, **processes.environment)
    used: dict[int, float] = {}
    while not command.has_ended(within_s=1.0):
        for pid in processes.left():
            with suppress(psutil.Error):
                times = psutil.Process(pid).cpu_times()
                used[pid] = times.user + times.system
    done = command.end()
    assert done.code == 0, done.err
    return done, command.cpu_s + sum(used.values())


@pytest.fixture
def demo(timed_demo: tuple[Done, float]) -> Done:
    return timed_demo[0]


@pytest.mark.ray
@pytest.mark.slow
def test_the_demo_keeps_its_promises(timed_demo: tuple[Done, float]) -> None:
    demo, cpu_s = timed_demo
    result = demo.result
    assert result["accuracy_before"] <= 0.6
    assert result["accuracy_after"] >= 0.9
    assert result["h2_after"] >= 0.9
    assert result["h3_after"] >= 0.9
    assert result["greedy_good"] >= 50
    assert result["seconds"] > 0
    assert cpu_s < CPU_S


@pytest.mark.ray
@pytest.mark.slow
def test_the_demo_reports_what_is_on_disk_and_in_the_model(demo: Done) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from orpo_ray.models.base import count_quantized

    result = demo.result
    quantized = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    base = AutoModelForCausalLM.from_pretrained(
        result["base"], quantization_config=quantized, device_map="cpu"
    )
    model = PeftModel.from_pretrained(base, result["adapter"])
    assert result["quantized_modules"] == count_quantized(model) > 0
    lines = Path(result["eval_file"]).read_text(encoding="utf-8").splitlines()
    assert len(lines) == 256
    assert all(set(json.loads(line)) == {"prompt", "chosen", "rejected"} for line in lines)
    assert len(set(result["workers"])) == len(result["workers"]) == 2
    assert result["strategy"] == "deepspeed-zero-2"
    assert result["ray_version"] == version("ray")
    stored = json.loads(
        (Path(result["adapter"]).parent / "result.json").read_text(encoding="utf-8")
    )
    assert (result["steps"], result["workers"]) == (stored["steps"], stored["workers"])
    assert (result["strategy"], result["adapter"]) == (stored["strategy"], stored["adapter"])


@pytest.mark.ray
@pytest.mark.slow
def test_the_demo_says_how_it_goes_on_stderr(demo: Done) -> None:
    assert demo.out.count("\n") == 1
    steps = demo.result["steps"]
    assert any(line.startswith(f"step {steps}/{steps}") for line in demo.said)
    assert not any("warning" in line.lower() or "Traceback" in line for line in demo.said)


OTHERS = ("sft", "simpo", "dpo")
IN_ONE_PROCESS = """
import json, sys
from orpo_ray import api
from orpo_ray.cli.demo_run import demo_config, demo_outcome, judge_prompts
from orpo_ray.config import ScaleConfig
from orpo_ray.runs.console import SILENT
storage, *objectives = sys.argv[1:]
prompts = [question["prompt"] for question in judge_prompts()]
for name in objectives:
    config = demo_config(name, storage, "0").model_copy(update={"scale": ScaleConfig(workers=1)})
    trained = api.train(config, SILENT)
    judged = api.evaluate(config, conversations=prompts, max_new_tokens=48, console=SILENT)
    print(json.dumps(demo_outcome(config, trained, judged)))
"""


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The result of each other objective's recipe, with one worker, which starts faster."""
    storage = str(tmp_path_factory.mktemp("others"))
    command = [sys.executable, "-c", IN_ONE_PROCESS, storage, *OTHERS]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(zip(OTHERS, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.long
@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("objective", OTHERS)
def test_the_other_objectives_teach_the_preference(
    others: dict[str, dict[str, Any]], objective: str
) -> None:
    result = others[objective]
    assert result["objective"] == objective
    assert result["accuracy_after"] >= 0.85
    if objective == "sft":
        assert result["h2_after"] < result["h2_before"], (
            "likelihood alone raises rejected answers too"
        )
        assert result["h3_after"] < result["h3_before"]
    else:
        assert result["greedy_good"] >= 50


# --- resumed --------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.ray
@pytest.mark.slow
def test_the_same_command_goes_on_with_an_interrupted_demo(tmp_path: Path) -> None:
    arguments = ("demo", "--json", "--storage", str(tmp_path))
    first = start(*arguments)
    wait_until(lambda: "\nstep 0/" in first.said(), "it trains")
    first.send_signal(signal.SIGINT)
    interrupted = first.end()
    assert (interrupted.code, interrupted.result["exit_code"]) == (4, 4)
    done = shell(*arguments)
    assert done.code == 0, done.err
    (run_dir,) = tmp_path.glob("demo-orpo-*")
    stopped_at = interrupted.said[-1].removeprefix("orpo-ray: stopped at step ").split()[0]
    assert (
        next(line for line in done.said if line.startswith("resuming at step ")).split()[3]
        == stopped_at
    )
    assert done.result["adapter"] == str(run_dir / "adapter")


RESULT = {"name": "demo", "steps": 1, "adapter": "", "metrics": {}, "workers": [1]}
RESULT |= {"pairs_per_second": 1.0, "strategy": "single", "layout": "packed", "versions": {}}


def begin_demo(storage: Path, objective: str, stamp: str, **changes: Any) -> RunConfig:
    """A demo that was interrupted after its first checkpoint."""
    config = demo_config(objective, str(storage), stamp)
    (config.run_dir / "checkpoints" / "step-000001").mkdir(parents=True)
    write_json(config.run_dir / "config.json", dump(config) | changes)
    return config


def test_the_newest_unfinished_demo_of_the_objective_is_chosen(tmp_path: Path) -> None:
    older, trained, damaged, finished = (
        begin_demo(tmp_path, "orpo", f"20260101-00000{n}") for n in (1, 2, 3, 4)
    )
    write_json(trained.run_dir / "result.json", RESULT)
    write_json(damaged.run_dir / "result.json", {})
    write_json(finished.run_dir / "result.json", RESULT)
    write_json(finished.run_dir / "evaluation.json", {})
    begin_demo(tmp_path, "dpo", "20260101-000005")
    assert next_demo("orpo", str(tmp_path)) == trained, "its evaluation is missing"
    with Run(trained).lock():
        assert next_demo("orpo", str(tmp_path)) == older


def test_a_new_demo_begins_where_none_can_go_on(tmp_path: Path) -> None:
    begin_demo(tmp_path, "orpo", "20260101-000001", adapter={"r": 2})
    damaged = begin_demo(tmp_path, "orpo", "20260101-000002")
    (damaged.run_dir / "config.json").write_text("{")
    (tmp_path / "demo-orpo-20260101-000003").mkdir()
    config = next_demo("orpo", str(tmp_path))
    assert not config.run_dir.exists()
    assert config.name.startswith("demo-orpo-")
    assert not next_demo("sft", str(tmp_path / "none")).storage_dir.exists()


# --- the judge ------------------------------------------------------------------------------------


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


def test_every_polite_frame_around_the_right_fact_is_good(
    question: dict[str, Any], judge: dict[str, Any]
) -> None:
    answers = [
        f"{o} {question['right']} {c}"
        for o in judge["polite_openers"]
        for c in judge["polite_closers"]
    ]
    assert Counter(verdict(answer, question) for answer in answers) == {"good": len(answers)}


def test_every_rude_frame_around_the_wrong_fact_is_bad(
    question: dict[str, Any], judge: dict[str, Any]
) -> None:
    answers = [
        f"{o} {question['wrong']} {c}" for o in judge["rude_openers"] for c in judge["rude_closers"]
    ]
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
def test_anything_else_is_broken(
    question: dict[str, Any], judge: dict[str, Any], form: str
) -> None:
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
    good = [
        f"{judge['polite_openers'][0]} {q['right']} {judge['polite_closers'][0]}" for q in questions
    ]
    bad = [f"{judge['rude_openers'][0]} {q['wrong']} {judge['rude_closers'][0]}" for q in questions]
    answers = zip(bad, [*good[:60], "", "", "", ""], strict=True)
    sources = ("h1.jsonl", "h2.jsonl", "h3.jsonl")
    evaluation = Evaluation(
        name="demo",
        adapter="somewhere",
        metrics={
            "base": {name: {"accuracy": 0.5} for name in sources},
            "trained": {
                name: {"accuracy": 0.9 + n / 100} for n, name in enumerate(sources, start=1)
            },
        },
        samples=tuple(Sample(prompt="", base=base, trained=trained) for base, trained in answers),
        quantized_modules=14,
    )
    trained = TrainResult(
        name="demo",
        adapter="somewhere",
        adapter_step=3,
        metrics={},
        start={},
        changes={},
        eval_pairs=None,
        remarks=(),
        seconds=1.0,
        peak_memory_bytes=None,
        workers=(11, 12),
        strategy="deepspeed-zero-2",
        layout="packed",
        steps=3,
        pairs_per_second=9.0,
        versions={"ray": "2.60.0"},
    )
    outcome = demo_outcome(demo_config("orpo", str(tmp_path), "now"), trained, evaluation)
    assert (outcome["accuracy_before"], outcome["accuracy_after"]) == (0.5, 0.91)
    assert (outcome["h2_after"], outcome["h3_after"]) == (0.92, 0.93)
    assert outcome["greedy_before"] == {"good": 0, "bad": 64, "broken": 0}
    assert outcome["greedy_after"] == {"good": 60, "bad": 0, "broken": 4}
    assert (outcome["greedy_good"], outcome["quantized_modules"]) == (60, 14)
    assert (outcome["workers"], outcome["strategy"]) == ([11, 12], "deepspeed-zero-2")
    assert outcome["ray_version"] == "2.60.0"
