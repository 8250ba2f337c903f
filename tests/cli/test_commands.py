"""Every command as a person uses it, and the files that a run leaves behind."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from support import BASE, DEMO, Done, Listener, read_metrics
from terminal import WRONG, Command, Finished, fresh_shell, one_line

import orpo_ray
from orpo_ray.cli.main import COMMANDS
from orpo_ray.config import RunConfig, dump, load_config
from orpo_ray.config.keys import all_keys
from orpo_ray.data.store import open_artifact

TRAIN_METRICS = {
    "loss",
    "grad_norm",
    "nll",
    "log_odds_ratio",
    "accuracy",
    "margin",
    "chosen_logp",
    "rejected_logp",
}
EVAL_METRICS = {"accuracy", "margin", "chosen_logp", "rejected_logp", "log_odds_ratio", "nll"}


# --- help, config ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*COMMANDS, "config show", "config schema", "config from"])
def test_every_command_has_help_that_explains_its_options(command: Command, name: str) -> None:
    done = command(*name.split(), "--help")
    assert (done.code, done.err) == (0, "")
    assert f"Usage: orpo-ray {name} " in done.out
    # A row is the option, what it takes, and what it is for. A star marks one that must be given.
    lines = [line.strip("│* ") for line in done.out.splitlines() if line.startswith("│")]
    rows = [line.split(maxsplit=2) for line in lines if line.startswith("--")]
    assert rows and all(len(row) == 3 for row in rows), "an option without an explanation"


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_the_first_page_names_every_command_with_what_it_is_for(
    command: Command, arguments: list[str]
) -> None:
    done = command(*arguments)
    assert (done.code, done.err) == (0, "")
    rows = [line.strip("│ ").split(maxsplit=1) for line in done.out.splitlines()]
    assert [row[0] for row in rows if row and row[0] in COMMANDS and len(row) == 2] == list(
        COMMANDS
    )


def test_config_show_prints_every_setting_as_yaml_that_loads_again(
    command: Command, config: Path, tmp_path: Path
) -> None:
    done = command("config", "show", config, "objective.lambda=0.25", "training.epochs=null")
    assert (done.code, done.err) == (0, "")
    shown = yaml.safe_load(done.out)
    assert shown == dump(load_config(config, ["objective.lambda=0.25"]))
    assert shown["objective"]["lambda"] == 0.25
    assert shown["training"]["weight_decay"] == 0.0, "a default that nobody wrote"
    again = tmp_path / "again.yaml"
    again.write_text(done.out, encoding="utf-8")
    assert command("config", "show", again).out == done.out
    assert command("config", "show", again, "--json").result == shown


def test_config_show_prints_one_config_of_all_that_extend_one_another(
    command: Command, config: Path
) -> None:
    own = config.with_name("own.yaml")
    own.write_text(f"extends: {config.name}\nname: own\n", encoding="utf-8")
    assert command("config", "show", own).out == command("config", "show", config, "name=own").out
    assert "extends" not in command("config", "show", own, "--json").result


def test_config_schema_is_a_json_schema_that_describes_every_setting(
    command: Command, config: Path
) -> None:
    done = command("config", "schema")
    schema = done.result
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    assert _described(schema, schema) >= set(all_keys(RunConfig))
    written = yaml.safe_load(config.read_text(encoding="utf-8"))
    validator.validate(written)
    validator.validate(dump(load_config(config)))
    for wrong in (
        {**written, "lambda": 1},
        {**written, "name": 3},
        {**written, "objective": {"kind": "rloo"}},
    ):
        with pytest.raises(jsonschema.ValidationError):
            validator.validate(wrong)
    assert command("config", "schema", "--json").result == schema


def _described(schema: dict[str, Any], node: dict[str, Any], prefix: str = "") -> set[str]:
    """Dotted names of all properties of a schema, also behind references and unions."""
    if "$ref" in node:
        node = schema["$defs"][node["$ref"].rpartition("/")[2]]
    found = set()
    for name, inner in node.get("properties", {}).items():
        found |= {prefix + name} | _described(schema, inner, f"{prefix}{name}.")
    for inner in [
        *node.get("anyOf", []),
        *node.get("oneOf", []),
        *([node["items"]] if "items" in node else []),
    ]:
        found |= _described(schema, inner, prefix)
    return found


THEIRS = f"""\
model_name_or_path: {BASE}
stage: dpo
pref_loss: orpo
pref_beta: 0.2
finetuning_type: lora
lora_rank: 4
dataset: {DEMO / "train.jsonl"}
cutoff_len: 96
learning_rate: 1.0e-3
max_steps: 2
logging_steps: 10
"""


def test_config_from_prints_another_projects_config_as_one_that_trains(
    command: Command, tmp_path: Path
) -> None:
    theirs, ours = tmp_path / "theirs.yaml", tmp_path / "ours.yaml"
    theirs.write_text(THEIRS, encoding="utf-8")
    done = command("config", "from", theirs)
    assert (done.code, done.err) == (0, "")
    assert "# logging_steps: 10: every step is logged" in done.out
    ours.write_text(done.out, encoding="utf-8")
    config = load_config(ours)
    own = {"kind": "orpo", "lambda": 0.2, "nll_on": "response"}
    assert dump(config.objective) == {**own, "beta": 1.0, "nll_weight": 1.0}
    result = command("config", "from", theirs, "--json").result
    assert (result["project"], load_config(result["config"])) == ("LLaMA-Factory", config)
    assert list(result["no_counterpart"]) == ["logging_steps"]
    planned = command(
        "train", ours, "--dry-run", f"storage={tmp_path}", "scale.workers=1", "--json"
    )
    assert (planned.code, planned.result["steps"]) == (0, 2)


# --- prepare --------------------------------------------------------------------------------------


def test_prepare_shows_pairs_as_they_will_be_trained(command: Command, config: Path) -> None:
    done = command("prepare", config, "--show", "3")
    assert done.code == 0
    assert done.said[0].startswith("prepared data found in ")
    assert (
        done.out.count("prompt: ")
        == done.out.count("chosen: ")
        == done.out.count("rejected: ")
        == 3
    )
    first = json.loads((DEMO / "train.jsonl").read_text(encoding="utf-8").splitlines()[0])
    shown = " ".join(done.out.split())
    for side in ("prompt", "chosen", "rejected"):
        assert first[side][-1]["content"] in shown
    assert "tokens of prompt and longer answer" in done.out
    assert "nothing was dropped" in done.out
    assert f"prepared: {config.parent}" in done.out


def test_prepare_without_a_config_names_columns_and_makes_the_same_pairs(
    command: Command, config: Path, tmp_path: Path
) -> None:
    renamed = {"prompt": "question", "chosen": "good", "rejected": "bad"}
    rows = [
        json.loads(line)
        for line in (DEMO / "h2.jsonl").read_text(encoding="utf-8").splitlines()[:40]
    ]
    odd = tmp_path / "odd.jsonl"
    odd.write_text(
        "".join(json.dumps({renamed[k]: r[k][0]["content"] for k in renamed}) + "\n" for r in rows)
    )
    plain = tmp_path / "plain.jsonl"
    plain.write_text(
        "".join(json.dumps({k: r[k][0]["content"] for k in renamed}) + "\n" for r in rows)
    )
    common = [
        "prepare",
        "--tokenizer",
        BASE,
        "--storage",
        tmp_path / "storage",
        "--eval",
        DEMO / "h3.jsonl",
        "--json",
    ]
    columns = "prompt=question,chosen=good,rejected=bad"
    named = command(*common, "--train", odd, "--columns", columns)
    known = command(*common, "--train", plain)
    assert (named.code, known.code) == (0, 0), named.err + known.err
    assert named.result["train"] == known.result["train"] == 40
    artifacts = [open_artifact(Path(done.result["artifact"])) for done in (named, known)]
    chosen = [[pair.chosen.tolist() for pair in artifact.train] for artifact in artifacts]
    assert chosen[0] == chosen[1]
    defaults = ["data.max_length=2048", "data.max_prompt_length=1024"]
    by_config = command(
        "prepare", config, "--train", plain, "--eval", DEMO / "h3.jsonl", "--json", *defaults
    )
    assert by_config.result["hash"] == known.result["hash"], (
        "a config and options that say the same find one artifact"
    )


# --- train ----------------------------------------------------------------------------------------


def test_dry_run_prepares_and_plans_but_begins_no_run(command: Command, config: Path) -> None:
    done = command("train", config, "--dry-run", "--json", "training.max_steps=null")
    assert done.code == 0
    assert {key: done.result[key] for key in ("name", "steps", "pairs", "eval_pairs")} == {
        "name": "tiny",
        "steps": 6,
        "pairs": 48,
        "eval_pairs": 16,
    }
    assert done.result["decisions"]["device"] == "cpu"
    assert done.said[-1] == "the plan has 6 steps; nothing was started"
    assert [path.name for path in (config.parent / "storage").iterdir()] == ["artifacts"]


def test_a_finished_run_is_told_and_not_trained_again(command: Command, finished: Finished) -> None:
    before = _snapshot(finished.run_dir)
    done = command("train", finished.config)
    assert done.code == 0
    assert done.said == [
        f"run tiny is finished: {finished.run_dir}; give another name to train again, "
        "or more steps with --extend"
    ]
    adapter = f"adapter: {finished.run_dir / 'adapter'}\n"
    assert adapter in done.out and "16 held-out pairs (95 % intervals)" in done.out
    assert "next:    orpo-ray evaluate" in done.out and "training.max_steps=8 --extend" in done.out
    assert f"orpo-ray chat {finished.config}\n" in done.out
    assert command("train", finished.config, "--json").result == finished.done.result
    dry = command("train", finished.config, "--dry-run")
    assert dry.said[0] == done.said[0]
    assert _snapshot(finished.run_dir) == before


def _snapshot(run_dir: Path) -> dict[str, int]:
    """When each file of a run that says something was last written; the log may grow."""
    files = (
        path
        for path in run_dir.rglob("*")
        if path.is_file() and path.name not in ("run.log", ".lock")
    )
    return {str(path.relative_to(run_dir)): path.stat().st_mtime_ns for path in files}


def test_with_json_stdout_is_one_object_and_the_rest_is_on_stderr(finished: Finished) -> None:
    assert finished.done.out.count("\n") == 1
    assert finished.done.result == json.loads(
        (finished.run_dir / "result.json").read_text(encoding="utf-8")
    )
    said = finished.done.said
    assert said[0] == "48 training pairs and 16 evaluation pairs from 64 rows"
    assert [line.split()[:2] for line in said[-4:-1]] == [
        ["step", "0/4"],
        ["step", "2/4"],
        ["step", "4/4"],
    ]
    assert said[-1].startswith("the plan: ")
    noise = [
        line for line in said if any(word in line.lower() for word in ("warning", "error", "trace"))
    ]
    assert not noise, "what libraries have to say belongs in run.log"
    assert "%|" not in finished.done.err, "a library's progress bar"


@pytest.mark.parametrize(
    "arguments", [["train", "none.yaml"], ["trian"], ["config"], ["prepare", "--show", "x"]]
)
def test_with_json_a_failure_is_one_object_too(command: Command, arguments: list[str]) -> None:
    assert_one_object(command(*arguments, "--json"))


def test_a_failure_is_the_exit_code_of_the_process() -> None:
    assert_one_object(fresh_shell("train", "none.yaml", "--json"))


def assert_one_object(done: Done) -> None:
    assert done.code == 2
    assert done.result["exit_code"] == 2
    assert done.err == f"orpo-ray: {done.result['error']}\n"


def test_train_from_python(config: Path, finished: Finished, ray_session: None) -> None:
    said: list[str] = []
    seen: list[int] = []
    settings = orpo_ray.load_config(config, ["name=python"])
    result = orpo_ray.train(
        settings, Listener(said, lambda step, total, metrics: seen.append(step))
    )
    assert result.name == "python" and result.to_json()["status"] == "finished"
    assert seen == [0, 1, 2, 2, 3, 4, 4]
    assert any("training pairs" in line for line in said)
    shell_run, python_run = read_metrics(finished.run_dir), read_metrics(settings.run_dir)
    assert [line.get("train/loss") for line in python_run] == [
        line.get("train/loss") for line in shell_run
    ]
    assert orpo_ray.train(settings, Listener(said)) == result
    assert said[-1].startswith("run python is finished")


# --- what a run leaves ----------------------------------------------------------------------------


def _read(finished: Finished, name: str) -> Any:
    return json.loads((finished.run_dir / name).read_text(encoding="utf-8"))


def test_a_run_leaves_these_files_and_no_others(finished: Finished) -> None:
    names = {path.name for path in finished.run_dir.iterdir()}
    assert names == {
        *(".lock", "config.json", "run.json", "run.log", "metrics.jsonl", "samples.jsonl"),
        *("result.json", "report.html"),
        *("adapter", "checkpoints", "evaluations", "tensorboard"),
    }
    assert sorted(path.name for path in (finished.run_dir / "checkpoints").iterdir()) == [
        "step-000002",
        "step-000004",
    ]


def test_config_json_is_total(finished: Finished) -> None:
    stored = _read(finished, "config.json")
    assert stored == dump(load_config(finished.config))
    # `search` and `compare` are null, `scale.deepspeed` is a word, and an objective has only the
    # keys of its own kind.
    branches = ("search.", "compare.", "objective.", "scale.deepspeed.")
    assert {
        key for key in all_keys(RunConfig) if not key.startswith((*branches, "data.columns."))
    } <= _keys(stored)
    assert set(stored["objective"]) >= {"kind", "lambda", "nll_on"}


def _keys(tree: Any, prefix: str = "") -> set[str]:
    if isinstance(tree, list):
        return {key for item in tree for key in _keys(item, prefix)}
    if not isinstance(tree, dict):
        return set()
    return {
        key
        for name, value in tree.items()
        for key in {prefix + name} | _keys(value, f"{prefix}{name}.")
    }


def test_metrics_begin_with_an_evaluation_and_hold_every_step_in_full_precision(
    finished: Finished,
) -> None:
    lines = read_metrics(finished.run_dir)
    assert [line["step"] for line in lines] == [0, 1, 2, 2, 3, 4, 4]
    evaluations = [line for line in lines if "eval/accuracy" in line]
    trained = [line for line in lines if "train/loss" in line]
    assert [line["step"] for line in evaluations] == [0, 2, 4]
    assert [line["step"] for line in trained] == [1, 2, 3, 4]
    for line in evaluations:
        assert set(line) == {"step"} | {f"eval/{name}" for name in EVAL_METRICS}
    for line in trained:
        assert set(line) >= {"step"} | {f"train/{name}" for name in TRAIN_METRICS}
        assert all(isinstance(value, int | float) for value in line.values())
        odds = line["train/preference_share"] * line["train/loss"]
        assert line["train/loss"] == pytest.approx(line["train/nll"] + odds, rel=1e-5)
        assert line["train/loss"] != round(line["train/loss"], 6), "rounded for display"


def test_result_json_sums_the_run_up(finished: Finished) -> None:
    result = _read(finished, "result.json")
    assert {"status", "name", "steps", "adapter", "metrics", "pairs_per_second", "versions"} <= set(
        result
    )
    assert (result["status"], result["name"], result["steps"]) == ("finished", "tiny", 4)
    assert result["adapter"] == str(finished.run_dir / "adapter")
    (worker,) = result["workers"]
    assert isinstance(worker, int) and worker > 1
    assert result["strategy"] == "single-process"
    assert result["pairs_per_second"] > 0
    last: dict[str, float] = {}
    for line in read_metrics(finished.run_dir):
        last |= line
    assert result["metrics"] == {name: value for name, value in last.items() if name != "step"}
    assert {"python", "torch", "transformers", "peft", "orpo-ray"} <= set(result["versions"])


def test_run_json_says_what_auto_came_to_and_what_lay_behind_the_settings(
    finished: Finished,
) -> None:
    run = _read(finished, "run.json")
    assert run["decisions"]["device"] == "cpu"
    assert run["decisions"]["dtype"] == "float32"
    assert run["decisions"]["tokens_per_microbatch"] > 0
    artifacts = (finished.run_dir.parent / "artifacts").glob("*/artifact.json")
    assert run["identity"]["data"] in {
        json.loads(path.read_text(encoding="utf-8"))["hash"] for path in artifacts
    }
    assert {"tokenizer", "model.base"} <= set(run["identity"])


def test_tensorboard_has_the_same_curves(finished: Finished) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished.run_dir / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    curves = {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }
    lines = read_metrics(finished.run_dir)
    for name in sorted({name for line in lines for name in line} - {"step"}):
        expected = [
            (line["step"], pytest.approx(line[name], rel=1e-5)) for line in lines if name in line
        ]
        assert curves[name] == expected, name


def test_the_adapter_folder_is_all_that_is_needed_to_use_it(finished: Finished) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = finished.run_dir / "adapter"
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), folder)
    trained = [p for name, p in model.named_parameters() if "lora_B" in name]
    assert trained and any(p.abs().max() > 0 for p in trained)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(BASE).chat_template
    assert not list(folder.glob("*.bin")) and not list(folder.glob("*.pt"))
    (newest,) = (finished.run_dir / "checkpoints").glob(
        "step-000004/adapter/adapter_model.safetensors"
    )
    assert (folder / "adapter_model.safetensors").read_bytes() == newest.read_bytes()


def test_the_model_card_tells_data_settings_and_metrics(finished: Finished) -> None:
    card = (finished.run_dir / "adapter" / "README.md").read_text(encoding="utf-8")
    _, header, body = card.split("---\n", 2)
    assert yaml.safe_load(header) == {
        "library_name": "peft",
        "tags": ["orpo-ray", "orpo"],
    }, "a base on this machine has no name elsewhere"
    assert f"Data hash: `{_read(finished, 'run.json')['identity']['data']}`" in body
    assert "48 pairs for training, 16 for evaluation, out of 64 rows read" in body
    result = _read(finished, "result.json")
    for name, label in (("accuracy", "preference accuracy"), ("nll", "NLL of chosen answers")):
        before, after = (result["changes"][name][when]["value"] for when in ("before", "after"))
        (row,) = [line for line in body.splitlines() if line.startswith(f"| {label}")]
        assert f"| {before:.3f} (" in row and f"| {after:.3f} (" in row
    assert all(remark in body for remark in result["remarks"])
    settings = yaml.safe_load(body.partition("```yaml\n")[2].partition("```")[0])
    assert settings == _read(finished, "config.json")


def test_run_log_keeps_what_was_announced_and_no_warnings_of_libraries(finished: Finished) -> None:
    log = (finished.run_dir / "run.log").read_text(encoding="utf-8")
    assert "WARNING" not in log
    for line in finished.done.said:
        if not line.startswith(("step ", "  held out: ")):
            assert line in log


# --- evaluate -------------------------------------------------------------------------------------


def test_evaluate_compares_the_base_with_what_the_run_made_of_it(
    command: Command, finished: Finished
) -> None:
    done = command(
        "evaluate", finished.config, "--samples", "2", "--max-new-tokens", "24", "--json"
    )
    assert done.code == 0, done.err
    result = done.result
    first, *_, last = read_metrics(finished.run_dir)
    for who, line in (("base", first), ("trained", last)):
        overall = result["metrics"][who]["all"]
        assert overall["pairs"] == 16
        for name in EVAL_METRICS:
            assert overall[name] == pytest.approx(line[f"eval/{name}"], rel=1e-4, abs=1e-6), (
                who,
                name,
            )
        assert result["metrics"][who]["h1.jsonl"] == overall
    assert result["quantized_modules"] > 0
    assert result["adapter"] == str(finished.run_dir / "adapter")
    assert len(result["samples"]) == 2
    keys = {"prompt", "base", "base_is_cut", "trained", "trained_is_cut"}
    assert all(set(sample) == keys for sample in result["samples"])
    assert _read(finished, "evaluation.json") == result


def test_evaluate_judges_a_base_before_training(command: Command, config: Path) -> None:
    done = command("evaluate", config, "--base-only", "--samples", "1", "--json")
    assert done.code == 0, done.err
    assert list(done.result["metrics"]) == ["base"] and done.result["adapter"] is None
    assert [sample["trained"] for sample in done.result["samples"]] == [None]
    (kept,) = (config.parent / "storage" / "tiny").iterdir()
    assert kept.name == "evaluation-base.json"
    assert json.loads(kept.read_text(encoding="utf-8")) == done.result
    one_line(command("evaluate", config, "--base-only", "--adapter", "x"), WRONG, "--adapter")


def test_evaluate_prints_tables_and_answers(command: Command, finished: Finished) -> None:
    done = command("evaluate", finished.config, "--samples", "1", "--max-new-tokens", "8")
    assert done.code == 0
    assert done.out.count("preference accuracy") == 1, "one source needs no second table for all"
    assert "16 held-out pairs (95 % intervals)" in done.out
    assert "before: " in done.out and "after: " in done.out


def test_a_base_that_is_judged_alone_has_intervals(command: Command, config: Path) -> None:
    done = command("evaluate", config, "--base-only", "--samples", "1", "--max-new-tokens", "8")
    assert done.code == 0, done.err
    assert "16 held-out pairs (95 % intervals)" in done.out and " to " in done.out
    assert "  base: " in done.out and "before" not in done.out
    assert "16 held-out pairs show no difference of accuracy below 0.375" in done.out


def test_evaluate_looks_at_another_adapter_or_run(
    command: Command, config: Path, finished: Finished
) -> None:
    quiet = ["--samples", "0", "--json"]
    for place in (
        finished.run_dir,
        finished.run_dir / "adapter",
        finished.run_dir / "checkpoints/step-000002/adapter",
    ):
        done = command("evaluate", config, "name=none", "--adapter", place, *quiet)
        assert done.code == 0, done.err
        assert done.result["samples"] == []
    middle = next(
        line
        for line in read_metrics(finished.run_dir)
        if line["step"] == 2 and "eval/margin" in line
    )
    assert done.result["metrics"]["trained"]["all"]["margin"] == pytest.approx(
        middle["eval/margin"], rel=1e-4
    )


def test_evaluate_splits_the_metrics_by_source(command: Command, finished: Finished) -> None:
    sources = json.dumps(
        [{"source": str(DEMO / f"{name}.jsonl"), "limit": 8} for name in ("h1", "h3")]
    )
    done: Done = command("evaluate", finished.config, f"data.eval={sources}", "--samples", "0")
    assert done.code == 0, done.err
    titles = ("16 held-out pairs (95 %", "h1.jsonl: 8 pairs", "h3.jsonl: 8 pairs")
    assert [title for title in titles if title not in done.out] == []
