"""`orpo-ray evaluate RUN --lm-eval TASKS`: numbers of the real lm-eval, on tasks of local rows."""

import hashlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from lm_eval.tasks import TaskManager
from support import DEMO
from terminal import FAILED, WRONG, Command, Finished, one_line

import orpo_ray
from orpo_ray.evaluation import harness
from orpo_ray.runs.run import Run

ROWS = 16
"""As many held-out pairs as the finished run has."""
END = "<|im_end|>"
"""The token that ends an answer in the demo's chat template."""
STEPS = {"base": 0, "trained": 4}
"""Where the run keeps its own scores of the same pairs."""


def write_task(folder: Path, name: str, **keys: Any) -> Path:
    """A task of lm-eval over the run's held-out pairs, each with its two answers."""
    pairs = [json.loads(line) for line in (DEMO / "h1.jsonl").read_text().splitlines()[:ROWS]]
    rows = [
        {
            "question": pair["prompt"][0]["content"],
            "answers": [pair[side][0]["content"] + END for side in ("chosen", "rejected")],
        }
        for pair in pairs
    ]
    data, file = folder / f"{name}.jsonl", folder / f"{name}.yaml"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "target_delimiter": "",
        "metadata": {"version": 3.0},
        **keys,
    }
    file.write_text(yaml.safe_dump(task), encoding="utf-8")
    return file


def choosing(folder: Path, name: str = "choosing", **more: Any) -> Path:
    """A task that asks which of two answers is likelier."""
    keys = {
        "output_type": "multiple_choice",
        "doc_to_choice": "{{answers}}",
        "doc_to_target": 0,
        "metric_list": [{"metric": "acc"}],
        **more,
    }
    return write_task(folder, name, **keys)


@pytest.fixture(scope="module")
def choices(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return choosing(tmp_path_factory.mktemp("choices"))


@pytest.fixture(scope="module")
def likelihood(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task that asks how likely the chosen answers are."""
    return write_task(
        tmp_path_factory.mktemp("likelihood"),
        "likelihood",
        output_type="loglikelihood",
        doc_to_target="{{answers[0]}}",
        metric_list=[{"metric": "perplexity"}],
    )


def measured(command: Command, *arguments: object) -> dict[str, Any]:
    done = command("evaluate", *arguments, "--json")
    assert done.code == 0, done.err
    result: dict[str, Any] = done.result
    return result


def kept(run_dir: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((run_dir / "lm-eval.json").read_text())["evaluations"]
    return found


def test_its_numbers_are_those_of_the_projects_own_scores(
    command: Command,
    finished: Finished,
    choices: Path,
    likelihood: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def forked(*_: object) -> None:
        raise AssertionError("a process with threads was forked")

    monkeypatch.setattr("multiprocessing.Pool", forked)
    tasks = f"{choices}, {likelihood}"
    found = measured(command, finished.run_dir, "--lm-eval", tasks, "--apply-chat-template")
    run = Run(orpo_ray.load_config(str(finished.config)))
    for who, step in STEPS.items():
        scores = run.scores(step)
        assert scores is not None
        accuracy = found["metrics"][who]["choosing"]["acc,none"]
        right = scores.chosen > scores.rejected
        assert accuracy["value"] == right.mean()
        assert accuracy["stderr"] == pytest.approx(right.std(ddof=1) / math.sqrt(ROWS))
        perplexity = found["metrics"][who]["likelihood"]["perplexity,none"]["value"]
        assert math.log(perplexity) == pytest.approx(-np.mean(scores.chosen), rel=1e-4)
    numbers = [found["metrics"][who]["likelihood"]["perplexity,none"]["value"] for who in STEPS]
    assert numbers[1] < numbers[0], "training made the chosen answers likelier"
    assert kept(finished.run_dir)[-1] == found


def test_the_settings_are_on_record(command: Command, finished: Finished, choices: Path) -> None:
    asks = (finished.run_dir, "--lm-eval", choices, "--limit", "4", "--base-only")
    found = measured(command, *asks, "--apply-chat-template", "--batch-size", "2")
    _, tokenizer = orpo_ray.load(finished.run_dir)
    assert found["models"] == {
        "base": {
            "base": str(DEMO / "base"),
            "revision": None,
            "quantization": "nf4",
            "trained": None,
            "merged": None,
            "dtype": "float32",
            "device": "cpu",
            "chat_template_sha256": hashlib.sha256(tokenizer.chat_template.encode()).hexdigest(),
        }
    }
    settings = found["settings"]
    versions = settings.pop("versions")
    assert {"lm_eval", "datasets", "torch", "transformers"} <= versions.keys()
    assert settings == {
        "tasks": [str(choices)],
        "limit": 4,
        "fewshot": {"choosing": 0},
        "chat_template": True,
        "task_versions": {"choosing": 3.0},
        "rows": {"choosing": 4},
        "batch_size": 2,
        "seeds": {
            "random_seed": 0,
            "numpy_seed": 1234,
            "torch_seed": 1234,
            "fewshot_seed": 1234,
        },
    }
    assert list(found["metrics"]) == ["base"]


@pytest.mark.slow
def test_an_exported_folder_stands_in_for_the_trained_model(
    command: Command, finished: Finished, likelihood: Path, tmp_path: Path
) -> None:
    merged = tmp_path / "merged"
    how = ("--merge", "dequantised", "--answers", "1")
    assert command("export", finished.run_dir, "--to", merged, *how).code == 0
    before = len(kept(finished.run_dir))
    asks = (finished.run_dir, "--lm-eval", likelihood, "--apply-chat-template")
    unmerged = measured(command, *asks)
    found = measured(command, *asks, "--merged", merged)
    assert found["models"]["base"] == unmerged["models"]["base"]
    assert found["metrics"]["base"] == unmerged["metrics"]["base"]
    told = {"merged": str(merged), "merge": "dequantised", "quantization": "none", "trained": None}
    assert found["models"]["trained"] == {**unmerged["models"]["base"], **told}
    sums = [
        math.log(each["metrics"]["trained"]["likelihood"]["perplexity,none"]["value"])
        for each in (unmerged, found)
    ]
    assert sums[1] == pytest.approx(sums[0], abs=0.01)
    assert kept(finished.run_dir)[before:] == [unmerged, found], "earlier ones stay"


def test_its_answers_are_those_of_generate(
    command: Command, finished: Finished, tmp_path: Path
) -> None:
    prompts, out = tmp_path / "prompts.txt", tmp_path / "answers.jsonl"
    prompts.write_text("What sound does a cow make?\nName a colour.\n", encoding="utf-8")
    asks = ("generate", finished.run_dir, "--prompts", prompts, "--max-new-tokens", "24")
    assert command(*asks, "--out", out).code == 0
    task = write_task(
        tmp_path,
        "writing",
        dataset_kwargs={"data_files": {"test": str(out)}},
        output_type="generate_until",
        doc_to_text="{{prompt}}",
        doc_to_target="{{answer}}",
        generation_kwargs={"until": ["\n\n"], "max_gen_toks": 24, "do_sample": False},
        metric_list=[{"metric": "exact_match", "regexes_to_ignore": [r"^\s+|\s+$"]}],
    )
    found = measured(command, finished.run_dir, "--lm-eval", task, "--apply-chat-template")
    same = {who: found["metrics"][who]["writing"]["exact_match,none"]["value"] for who in STEPS}
    assert same["trained"] == 1.0, out.read_text()


def test_a_group_gives_its_own_number(
    command: Command, finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """lm-eval reads groups from its list of tasks only; here a small list takes its place."""
    for name in ("first", "second"):
        choosing(tmp_path, name)
    group = {"group": "inner", "task": ["first"]}
    (tmp_path / "inner.yaml").write_text(yaml.safe_dump(group), encoding="utf-8")
    mean = {"metric": "acc", "weight_by_size": True}
    group = {"group": "both", "task": ["inner", "second"], "aggregate_metric_list": [mean]}
    (tmp_path / "both.yaml").write_text(yaml.safe_dump(group), encoding="utf-8")
    small = TaskManager(include_path=tmp_path, include_defaults=False)
    monkeypatch.setattr(harness, "_manager", lambda with_own_tasks: small)
    asks = (finished.run_dir, "--lm-eval", "both", "--limit", "4", "--base-only")
    numbers = measured(command, *asks)["metrics"]["base"]
    values = {numbers[name]["acc,none"]["value"] for name in ("both", "first", "second")}
    assert len(values) == 1
    done = command("evaluate", finished.run_dir, "--lm-eval", tmp_path / "both.yaml")
    one_line(done, WRONG, "both.yaml describes a group")


def test_examples_come_before_a_question(
    command: Command, finished: Finished, tmp_path: Path
) -> None:
    task = choosing(tmp_path, "shown", fewshot_split="test", description="Kind answers. ")
    asks = (finished.run_dir, "--lm-eval", task, "--limit", "2", "--base-only", "--fewshot", "1")
    assert measured(command, *asks)["settings"]["fewshot"] == {"shown": 1}


def test_a_person_reads_a_table(command: Command, finished: Finished, choices: Path) -> None:
    done = command("evaluate", finished.run_dir, "--lm-eval", choices, "--limit", "4")
    assert done.code == 0, done.err
    assert "at most 4 rows a task, asked as plain text" in done.out
    row = next(line for line in done.out.splitlines() if "choosing" in line)
    assert row.count("±") == 2 and "acc " in row


def test_a_task_that_runs_what_a_model_writes_is_refused(
    command: Command, finished: Finished, tmp_path: Path
) -> None:
    task = choosing(tmp_path, "running", unsafe_code=True)
    done = command("evaluate", finished.run_dir, "--lm-eval", task)
    one_line(done, WRONG, "running.yaml runs code that the model writes")


def test_a_metric_that_the_hub_keeps_as_code_is_not_fetched(
    command: Command, finished: Finished, tmp_path: Path
) -> None:
    code = "import evaluate\n\ndef judged(row, said):\n    evaluate.load('squad_v2')\n"
    (tmp_path / "judging.py").write_text(code, encoding="utf-8")
    task = choosing(tmp_path, "judging")
    with task.open("a", encoding="utf-8") as file:
        file.write("process_results: !function judging.judged\n")
    done = command("evaluate", finished.run_dir, "--lm-eval", task, "--limit", "2", "--base-only")
    one_line(done, FAILED, "those that the hub keeps as code are not fetched")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tasks", "told"),
    [
        ("helaswag", "there is no task helaswag; did you mean hellaswag"),
        ("humaneval", "humaneval runs code that the model writes"),
    ],
)
def test_names_are_looked_up_in_lm_evals_own_list(
    tasks: str, told: str, command: Command, finished: Finished
) -> None:
    one_line(command("evaluate", finished.run_dir, "--lm-eval", tasks), WRONG, told)


def test_data_that_cannot_be_fetched_is_named(
    command: Command, finished: Finished, tmp_path: Path
) -> None:
    task = choosing(tmp_path, "away", dataset_path="nobody/nothing-of-the-kind")
    done = command("evaluate", finished.run_dir, "--lm-eval", task)
    one_line(done, WRONG, "away.yaml", "cannot be")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--lm-eval", ""), "name one task or more"),
        (("--lm-eval", "TASK,"), "name one task or more"),
        (("--lm-eval", "none.yaml"), "none.yaml cannot be read"),
        (("--lm-eval", "TASK", "--samples", "3"), "--samples does not go with --lm-eval"),
        (("--lm-eval", "TASK", "--max-new-tokens", "9"), "--max-new-tokens does not go with"),
        (("--limit", "3"), "--limit only goes with --lm-eval"),
        (("--apply-chat-template",), "--apply-chat-template only goes with --lm-eval"),
        (("--lm-eval", "TASK", "--limit", "0"), "--limit"),
        (("--lm-eval", "TASK", "--base-only", "--merged", "x"), "leave out --merged"),
        (("--lm-eval", "TASK", "--base-only", "--adapter", "x"), "leave out --adapter"),
        (("--lm-eval", "TASK", "--adapter", "x", "--merged", "y"), "give one of them"),
        (("--lm-eval", "TASK", "--merged", "none"), "no export.json in none"),
        (("--lm-eval", "BROKEN"), "broken.yaml cannot be loaded"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(
    arguments: tuple[str, ...],
    told: str,
    command: Command,
    finished: Finished,
    choices: Path,
    tmp_path: Path,
) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text("task: [unclosed\n", encoding="utf-8")
    files = {"TASK": choices, "BROKEN": broken, "TASK,": f"{choices},"}
    given = [files.get(each, each) for each in arguments]
    one_line(command("evaluate", finished.run_dir, *given), WRONG, told)


def test_an_adapter_alone_is_no_merged_model(
    command: Command, finished: Finished, choices: Path, tmp_path: Path
) -> None:
    (tmp_path / "export.json").write_text("{}")
    (tmp_path / "adapter_config.json").write_text("{}")
    done = command("evaluate", finished.run_dir, "--lm-eval", choices, "--merged", tmp_path)
    one_line(done, WRONG, "holds an adapter alone")


def test_a_rejected_folder_is_no_merged_model(
    command: Command, finished: Finished, choices: Path, tmp_path: Path
) -> None:
    folder, link = tmp_path / "merged.rejected", tmp_path / "merged"
    folder.mkdir()
    (folder / "export.json").write_text("{}")
    link.symlink_to(folder)
    for place in (folder, f"{folder}/", link):
        done = command("evaluate", finished.run_dir, "--lm-eval", choices, "--merged", place)
        one_line(done, WRONG, "was rejected by `orpo-ray export`")


def test_the_model_of_another_run_does_not_stand_in_for_this_one(
    command: Command, finished: Finished, choices: Path, tmp_path: Path
) -> None:
    (tmp_path / "export.json").write_text('{"run": "another"}')
    done = command("evaluate", finished.run_dir, "--lm-eval", choices, "--merged", tmp_path)
    one_line(done, WRONG, f"holds run another, not {finished.run_dir.name}; evaluate that run")


@pytest.mark.parametrize("written", ["{}", '{"run": "mine"}'])
def test_a_folder_of_this_run_or_of_no_known_one_is_taken(written: str, tmp_path: Path) -> None:
    (tmp_path / "export.json").write_text(written)
    assert harness.merged_folder(str(tmp_path), "mine") == tmp_path


def test_a_run_that_is_not_there_is_named(command: Command, config: Path, choices: Path) -> None:
    one_line(command("evaluate", config, "--lm-eval", choices), WRONG, "does not exist; train it")


def test_without_the_package_its_extra_is_named(
    command: Command, finished: Finished, choices: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    done = command("evaluate", finished.run_dir, "--lm-eval", choices)
    one_line(done, WRONG, "pip install 'orpo_ray[lm-eval]'")
