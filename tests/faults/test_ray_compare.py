"""A real comparison under Ray: one method fails, one has two stages, and a killed one goes on."""

import json
import os
from pathlib import Path
from signal import SIGKILL
from typing import Any

import pytest
import yaml
from judge_server import MODEL, serve
from ray_processes import Command, Ended
from support import settings, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.ray]

METHODS = ["orpo", "odd", "sft>dpo"]
BUDGET = 512
FIGURES = ("accuracy", "low", "high", "margin", "chosen_log_prob", "nll", "broken", "win_rate")


def write_config(storage: Path, name: str, **compare: Any) -> Path:
    sections: dict[str, Any] = {
        "adapter": {"dropout": 0.0},
        "training": {
            "pairs_per_step": 4,
            "learning_rate": 1e-3,
            "eval_every": 0.5,
            "checkpoint_every": 0.25,
        },
        "scale": {"workers": 1, "gpus_per_worker": 0},
        "compare": {
            "methods": METHODS,
            "seeds": 1,
            "budget": {"pairs": BUDGET},
            "answers": 4,
            # More steps of warm-up than the run has.
            "settings": {"odd": {"objective": {"kind": "orpo"}, "training": {"warmup": 9999}}},
            **compare,
        },
    }
    path = storage / f"{name}.yaml"
    path.write_text(yaml.safe_dump(settings(storage, name, **sections)), encoding="utf-8")
    return path


def compare(config: Path, *words: str) -> Ended:
    command = Command(config, *words, "--json", command="compare")
    return command.end()


def read(folder: Path, name: str = "comparison.json") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / name).read_text(encoding="utf-8"))
    return found


def table(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What methods reached, without what it took."""
    return {
        each["method"]: {name: each[name] for name in FIGURES}
        for each in record["methods"]
        if each["state"] == "finished"
    }


@pytest.fixture(scope="module")
def whole(prepared_storage: Path) -> dict[str, Any]:
    ended = compare(write_config(prepared_storage, "compared"))
    assert ended.code == 0, ended.said
    record = read(prepared_storage / "compared" / "compare")
    assert json.loads(ended.out) == record
    return record


def test_every_method_but_the_one_that_fails_is_in_the_table(whole: dict[str, Any]) -> None:
    assert whole["status"] == "finished"
    assert set(table(whole)) == {"orpo", "sft>dpo"}
    (failed,) = [each for each in whole["methods"] if each["state"] == "failed"]
    assert failed["method"] == "odd" and "training.warmup: 9999 steps" in failed["error"]
    assert any(line.startswith("odd failed: training.warmup") for line in whole["reading"])
    (verdict,) = whole["verdicts"]
    assert {verdict["method"], verdict["other"]} == {"orpo", "sft>dpo"}


def test_each_method_uses_the_budget(whole: dict[str, Any], prepared_storage: Path) -> None:
    used = {each["method"]: each["budget_used"] for each in whole["methods"]}
    assert used["orpo"] == BUDGET and used["sft>dpo"] == pytest.approx(BUDGET, rel=0.02)
    folder = prepared_storage / "compared" / "compare" / "sft-dpo" / "seed-0"
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    trained = sum(4 * stage["steps"] for stage in result["stages"])
    assert trained < BUDGET, "the reference is paid from the budget, too"


def test_what_it_took_and_how_it_answers_are_there(whole: dict[str, Any]) -> None:
    for each in whole["methods"]:
        if each["state"] == "finished":
            assert each["seconds"] > 0 and each["peak_memory_bytes"] > 0
            assert 0 <= each["broken"] <= 1 and 0 <= each["win_low"] <= each["win_high"] <= 1
            assert each["low"] <= each["accuracy"] <= each["high"]


def test_the_same_command_trains_nothing_again(
    whole: dict[str, Any], prepared_storage: Path
) -> None:
    again = compare(prepared_storage / "compared.yaml")
    assert again.code == 0
    assert table(json.loads(again.out)) == table(whole)
    assert not any("each loads the base" in line for line in again.said)


def test_a_judge_is_asked_in_place_of_words_and_only_once(
    whole: dict[str, Any], prepared_storage: Path
) -> None:
    config = prepared_storage / "compared.yaml"
    with serve() as server:
        named = json.dumps({"endpoint": server.url, "model": MODEL})
        found = [json.loads(compare(config, f"compare.judge={named}").out) for _ in range(2)]
        asked = len(server.asked)
    assert found[0]["methods"] == found[1]["methods"]
    methods, before = table(found[0]), table(whole)
    for method, figures in methods.items():
        folder = prepared_storage / "compared" / "compare" / method.replace(">", "-") / "seed-0"
        ours, base = (
            [text for text, _ in json.loads((place / "greedy.json").read_text())["answers"]]
            for place in (folder, folder.parent.parent)
        )
        points = [
            0.5 if len(one) == len(other) else float(len(one) > len(other))
            for one, other in zip(ours, base, strict=True)
        ]
        assert figures.pop("win_rate") == pytest.approx(sum(points) / len(points))
        before[method].pop("win_rate")
        asked -= 2 * sum(one != other for one, other in zip(ours, base, strict=True))
    assert methods == before, "a judge changes nothing else"
    assert asked == 0


@pytest.mark.long
def test_a_killed_comparison_resumes_to_the_same_table(
    whole: dict[str, Any], prepared_storage: Path
) -> None:
    config = write_config(prepared_storage, "killed")
    folder = prepared_storage / "killed" / "compare"
    first = Command(config, "--json", command="compare")
    # One method has ended and another is at work.
    first.wait_until(
        lambda: (
            (folder / "comparison.json").exists()
            and any(each["state"] == "finished" for each in read(folder)["entries"])
        ),
        "the end of the first run",
    )
    os.kill(first.pid, SIGKILL)
    wait_until(lambda: not first.processes.actors(), "the end of the dead driver's processes")
    second = compare(config)
    first.end()
    assert second.code == 0, second.said
    assert table(read(folder)) == table(whole)


@pytest.mark.long
def test_a_killed_search_of_settings_resumes_and_every_seed_trains_with_the_best(
    prepared_storage: Path,
) -> None:
    config = write_config(
        prepared_storage, "searched", methods=METHODS[::2], search=2, budget={"pairs": 64}, seeds=2
    )
    folder = prepared_storage / "searched" / "compare"
    first_search, second_search = folder / "orpo" / "search", folder / "sft-dpo" / "search"
    first = Command(config, "--json", command="compare")
    first.wait_until((second_search / "search.json").exists, "the search of the second method")
    os.kill(first.pid, SIGKILL)
    wait_until(lambda: not first.processes.actors(), "the end of the dead driver's processes")
    found = read(first_search, "search.json")
    second = compare(config)
    first.end()
    assert second.code == 0, second.said
    assert read(first_search, "search.json") == found, "a finished search is not run again"
    for search in (first_search, second_search):
        record = read(search, "search.json")
        assert record["status"] == "finished" and len(record["trials"]) == 2
    best = found["outcome"]["values"]
    last = read(second_search, "search.json")["outcome"]["values"]
    for seed in range(2):
        one = read(folder / "orpo" / f"seed-{seed}", "config.json")
        assert one["objective"]["lambda"] == best["objective.lambda"]
        assert one["training"]["learning_rate"] == best["training.learning_rate"]
        stage = read(folder / "sft-dpo" / f"seed-{seed}", "config.json")["stages"][1]
        assert stage["objective"]["beta"] == last["stages.1.objective.beta"]
        assert stage["training"]["learning_rate"] == last["stages.1.training.learning_rate"]
    used = [each["budget_used"] for each in json.loads(second.out)["methods"]]
    assert used == pytest.approx([64, 64], rel=0.02), "trials are not in the budget"
