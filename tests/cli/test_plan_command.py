"""`orpo-ray plan` as a person gives it: tables, JSON, exit codes, and one line for each mistake."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support import BASE, DEMO, Done, random_base
from terminal import ENVIRONMENT, FAILED, LACKING, WRONG, Command, Finished, one_line

from orpo_ray.planner.calibration import Calibration, calibration_file, write_calibrations

LARGE = """\
name: large
storage: STORAGE
model: {base: meta-llama/Llama-3.1-8B}
data:
  train: [{source: HuggingFaceH4/ultrafeedback_binarized, split: train_prefs}]
  max_length: 1024
"""
KEYS = {
    "gpu",
    "fits",
    "peak_gib",
    "low",
    "high",
    "tokens_per_microbatch",
    "pairs_per_second",
    "hours",
    "cost",
    "parts",
}
"""What scripts read of each GPU."""


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A common base and a common data set, neither of which is on this machine."""
    path = tmp_path / "large.yaml"
    path.write_text(LARGE.replace("STORAGE", str(tmp_path / "storage")), encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def own_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No calibration of the user who runs the tests."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "settings"))


def gpus_of(done: Done) -> dict[str, dict[str, Any]]:
    return {each["gpu"]: each for each in done.result["gpus"]}


def test_a_run_that_fits_is_planned(command: Command, large: Path) -> None:
    done = command("plan", large, "--gpu", "rtx4090")
    assert done.code == 0, done.err
    assert "base: meta-llama/Llama-3.1-8B, 8.03 billion numbers" in done.out
    assert "(assumed: " in done.out and "orpo-ray prepare tells" in done.out
    for part in ("memory at the worst moment", "weights of the base", "time: published rows"):
        assert part in done.out
    assert "advice: ORPO: one stage" in done.out
    assert "is the base instruction-tuned?" in done.out
    assert "orpo-ray compare trains orpo and sft>dpo on the same budget, each with 3" in done.out
    assert "advice: DPO alone" in command("plan", large, "--gpu", "l4", "--tuned").out
    done = command("plan", large, "model.base=meta-llama/Llama-3.1-8B-Instruct", "--gpu", "l4")
    assert "advice: DPO alone" in done.out


def test_json_is_one_object_with_a_row_for_each_gpu(command: Command, large: Path) -> None:
    done = command("plan", large, "--gpu", "rtx3050,l4,h100", "--json")
    assert done.code == 0, done.err
    assert set(gpus_of(done)) == {"rtx3050", "l4", "h100-pcie", "h100-sxm"}
    for row in done.result["gpus"]:
        assert set(row) >= KEYS
        assert row["low"] <= row["peak_gib"] <= row["high"]
        assert row["hours_low"] < row["hours"] < row["hours_high"]
        assert row["cost"] is None
        parts = row["parts"]
        whole = sum(parts.values()) - min(parts["layer"], parts["head"])
        assert row["peak_gib"] <= whole + 0.01
    assert json.loads(done.out, parse_constant=pytest.fail)["fits"] is True


def test_all_are_ranked_by_time_and_by_cost_where_there_are_prices(
    command: Command, large: Path, tmp_path: Path
) -> None:
    by_time = command("plan", large, "--gpu", "all", "--json").result["gpus"]
    hours = [row["hours"] for row in by_time if row["fits"]]
    assert len(hours) > 10 and hours == sorted(hours)
    (tmp_path / "prices.yaml").write_text(
        "currency: EUR\ngpus: {h100: 3.0, rtx4090: 0.4, t4: 0.35, l4: 0.7}\n", encoding="utf-8"
    )
    prices = ("--prices", tmp_path / "prices.yaml")
    by_cost = command("plan", large, *prices, "--json").result["gpus"]
    paid = [row["cost"] for row in by_cost if row["cost"] is not None]
    assert len(paid) == 5 and paid == sorted(paid)
    assert [row["cost"] for row in by_cost[:5]] == paid
    assert by_cost[0]["gpu"] == "rtx4090" and by_cost[0]["currency"] == "EUR"
    assert by_cost[0]["cost"] == pytest.approx(0.4 * by_cost[0]["hours"])
    assert "cost" in command("plan", large, *prices, "--gpu", "rtx4090").out


def test_what_does_not_fit_ends_with_1_and_names_the_missing_memory(
    command: Command, large: Path
) -> None:
    words = ("plan", large, "model.quantization=none", "--gpu")
    done = command(*words, "rtx3050")
    assert done.code == FAILED
    assert "rtx3050: " in done.out and "GiB are missing" in done.out
    assert "the cheapest change: model.quantization=nf4" in done.out
    (row,) = command(*words, "rtx3050", "--json").result["gpus"]
    assert (row["fits"], row["hours"], row["cost"]) == (False, None, None)
    assert row["missing_gib"] > 0
    assert command("plan", large, row["change"], "--gpu", "rtx3050").code == 0
    # One that fits is enough.
    both = command(*words, "rtx3050,h100-sxm", "--json")
    assert both.code == 0
    assert [row["fits"] for row in both.result["gpus"]] == [True, False]


def test_servers_are_simulated(command: Command, large: Path) -> None:
    words = ("plan", large, "--gpu", "rtx4090", "--network", "10gbit")
    done = command(*words, "--nodes", "1..8", "--json")
    assert done.code == 0, done.err
    for what in ("trained", "every_weight"):
        rows = done.result["scaling"][what]["nodes"]
        assert [row["nodes"] for row in rows] == [1, 2, 4, 8]
        assert rows[0]["efficiency"] == pytest.approx(1)
        assert all(0 < row["efficiency"] <= 1.001 for row in rows)
    shown = command(*words, "--nodes", "1..8")
    assert "gradients of what is trained, rtx4090, 10gbit" in shown.out
    four = command(*words, "--nodes", "4", "--count", "2")
    assert "GPUs of a server: 2, 4 servers, 10gbit" in four.out


def test_a_search_is_planned_as_a_whole(command: Command, large: Path) -> None:
    """Ranges are chosen when the search starts; their number does not change its time."""
    done = command("plan", large, "search.trials=8", "--gpu", "rtx4090", "--json")
    assert done.code == 0, done.err
    (row,) = done.result["gpus"]
    assert 2 * row["hours"] < row["search_hours"] < 8 * row["hours"]


MISTAKES: dict[str, tuple[tuple[str, ...], int, tuple[str, ...]]] = {
    "nothing": ((), WRONG, ("plan: name one thing: a config, --check",)),
    "two things": (("CONFIG", "--check", "f.csv"), WRONG, ("plan: name one thing",)),
    "a config and a run": (("CONFIG", "--calibrate", "run"), WRONG, ("plan: name one thing",)),
    "no such config": (("none.yaml",), WRONG, ("none.yaml",)),
    "a GPU": (("CONFIG", "--gpu", "rtx409"), WRONG, ("--gpu", "did you mean rtx4090?")),
    "no GPU": (("CONFIG", "--gpu", ""), WRONG, ("--gpu",)),
    "a network": (("CONFIG", "--network", "fast"), WRONG, ("--network: no network 'fast'",)),
    "servers": (("CONFIG", "--nodes", "many"), WRONG, ("--nodes: write a number such as 4",)),
    "no server": (("CONFIG", "--nodes", "0"), WRONG, ("--nodes",)),
    "backwards": (("CONFIG", "--nodes", "8..1"), WRONG, ("--nodes", "not 8..1")),
    "half a range": (("CONFIG", "--nodes", "1.."), WRONG, ("--nodes", "not 1..")),
    "unequal servers": (
        ("CONFIG", "scale.workers=3", "--nodes", "2"),
        WRONG,
        ("--nodes: scale.workers=3 cannot be shared equally by 2 servers",),
    ),
    "no prices": (("CONFIG", "--prices", "none.yaml"), WRONG, ("--prices: none.yaml",)),
    "a missing base": (("CONFIG", "model.base=./none"), WRONG, ("model.base: no folder ./none",)),
    "a missing file": (
        ("CONFIG", "data.train=none.jsonl"),
        WRONG,
        ("none.jsonl: no such file",),
    ),
    "a missing file to hold out": (
        ("CONFIG", "data.eval=none.jsonl"),
        WRONG,
        ("none.jsonl: no such file",),
    ),
    "a split of a file": (
        ("CONFIG", f"data.train=[{{source: {DEMO / 'train.jsonl'}, split: test}}]"),
        WRONG,
        ("train.jsonl: split test: a file has no splits",),
    ),
    "no pair is short enough": (
        ("CONFIG", f"data.train={DEMO / 'train.jsonl'}", "data.max_length=8"),
        WRONG,
        ("data.max_length: no pair has at most 8 tokens", "raise it"),
    ),
    "a key": (("CONFIG", "training.epoch=2"), WRONG, ("training.epoch",)),
    "no rows to check": (("--check", "none.csv"), WRONG, ("--check: cannot read none.csv",)),
    "an option that --check does not read": (
        ("--check", "none.csv", "--gpu", "t4"),
        WRONG,
        ("plan: only the plan of a config reads --gpu",),
    ),
    "an option that --calibrate does not read": (
        ("--calibrate", "none", "--pretrained", "--count", "2"),
        WRONG,
        ("plan: only the plan of a config reads --",),
    ),
    "a run": (("--calibrate", "none"), WRONG, ("none: no run is there",)),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(
    command: Command, large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    words, code, said = MISTAKES[name]
    monkeypatch.chdir(tmp_path)
    done = command("plan", *(str(large) if word == "CONFIG" else word for word in words))
    one_line(done, code, *said)
    assert done.out == ""
    as_json = command(
        "plan", *(str(large) if word == "CONFIG" else word for word in words), "--json"
    )
    assert (as_json.code, as_json.result["exit_code"]) == (code, code)


def test_a_base_whose_layers_are_unknown_ends_with_3(
    command: Command, large: Path, tmp_path: Path
) -> None:
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text('{"model_type": "mamba"}', encoding="utf-8")
    done = command("plan", large, f"model.base={tmp_path / 'odd'}")
    one_line(done, LACKING, "mamba")


def test_prepared_pairs_are_counted(command: Command, config: Path) -> None:
    done = command("plan", config, "--gpu", "t4", "--json")
    assert done.code == 0, done.err
    pairs = done.result["pairs"]
    assert pairs["source"].startswith("prepared pairs in ")
    assert (pairs["train"], pairs["held_out"]) == (48, 16)
    (row,) = done.result["gpus"]
    assert row["stages"][0]["steps"] == 4
    other = command("plan", config, "data.max_length=80", "--gpu", "t4", "--json")
    assert other.result["pairs"]["source"].startswith("the first 48 pairs, read by ")


# --- measured rows --------------------------------------------------------------------------------


@pytest.mark.parametrize(("file", "kind"), [("memory.csv", "memory"), ("throughput.csv", "speed")])
def test_published_rows_are_checked(
    command: Command, shared_planner: Path, file: str, kind: str
) -> None:
    done = command("plan", "--check", shared_planner / file, "--json")
    assert done.code == 0, done.err
    assert done.result["scored"] > 10
    assert abs(done.result["mean_error"]) < 0.1
    shown = command("plan", "--check", shared_planner / file)
    assert "grade a" in shown.out and "rows are not scored or not held" in shown.out


@pytest.mark.parametrize("content", [b"", b"a,b\n1,2\n", b"\xff\xfe", b"row,model\n"])
def test_a_file_of_other_content_is_refused(
    command: Command, tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "rows.csv").write_bytes(content)
    one_line(command("plan", "--check", tmp_path / "rows.csv"), WRONG, "--check: ")
    one_line(command("plan", "--check", tmp_path), WRONG, "--check: cannot read")


# --- finished runs --------------------------------------------------------------------------------


def test_a_run_says_what_was_planned_and_what_came(finished: Finished) -> None:
    said = finished.done.said
    (planned,) = [line for line in said if line.startswith("planned: ")]
    (came,) = [line for line in said if line.startswith("the plan: ")]
    assert said.index(planned) < said.index(came)
    assert "of training" in planned and "GB a worker" in planned
    assert "pairs a second" in came and "were planned" in came
    plan = json.loads((finished.run_dir / "run.json").read_text(encoding="utf-8"))["plan"]
    assert plan["predicted"]["device"] == "cpu"
    for name in ("seconds", "pairs_per_second", "peak_bytes"):
        low, middle, high = plan["predicted"][name]
        assert 0 < low < middle < high
        assert plan["measured"][name] > 0
    result = finished.done.result
    assert plan["measured"]["pairs_per_second"] == result["pairs_per_second"]


def test_a_finished_run_teaches_and_later_plans_say_so(
    command: Command, finished: Finished, config: Path, tmp_path: Path
) -> None:
    first = command("plan", "--calibrate", finished.run_dir, "--json")
    assert first.code == 0, first.err
    assert (first.result["device"], len(first.result["runs"])) == ("cpu", 1)
    plan = json.loads((finished.run_dir / "run.json").read_text(encoding="utf-8"))["plan"]
    held = plan["predicted"]["held_bytes"]
    off = (plan["measured"]["peak_bytes"] - held) / (plan["predicted"]["peak_bytes"][1] - held)
    assert first.result["memory"] == pytest.approx(off)
    again = command("plan", "--calibrate", finished.run_dir)
    assert "has been learnt from already; nothing changes" in again.out
    shutil.copytree(finished.run_dir, tmp_path / "copied")
    other = command("plan", "--calibrate", tmp_path / "copied")
    assert "cpu: time times" in other.out and "from 2 runs; kept in" in other.out
    kept = tmp_path / "settings" / "orpo-ray" / "calibration.json"
    assert len(json.loads(kept.read_text(encoding="utf-8"))["cpu"]["runs"]) == 2
    done = command("train", config, "--json")
    assert done.code == 0, done.err
    (planned,) = [line for line in done.said if line.startswith("planned: ")]
    assert planned.endswith("(calibrated by 2 runs)")
    # run.json keeps the planner's own figures, so that a later calibration counts nothing twice.
    own = json.loads((tmp_path / "storage" / "tiny" / "run.json").read_text(encoding="utf-8"))
    assert own["plan"]["predicted"]["peak_bytes"] == plan["predicted"]["peak_bytes"]
    kept.write_text("{", encoding="utf-8")
    one_line(command("plan", "--calibrate", finished.run_dir), WRONG, "cannot be read; remove it")


def test_a_calibrated_plan_says_so_and_goes_by_what_was_measured(
    command: Command, large: Path
) -> None:
    words = ("plan", large, "--gpu", "l4,t4")
    before = gpus_of(command(*words, "--json"))
    write_calibrations(calibration_file(), {"l4": Calibration(dict.fromkeys("abc", (2.0, 0.9)))})
    after = gpus_of(command(*words, "--json"))
    assert after["t4"] == before["t4"]
    l4, plain = after["l4"], before["l4"]
    assert l4["hours"] == pytest.approx(2 * plain["hours"], rel=0.02)  # its start is as it was
    assert l4["pairs_per_second"] == pytest.approx(plain["pairs_per_second"] / 2)
    assert l4["hours_high"] / l4["hours_low"] < plain["hours_high"] / plain["hours_low"]
    assert "calibrated here by 3 runs" in l4["reason"] and not l4["uncertain"]
    calibration_file().write_text("[", encoding="utf-8")
    one_line(command(*words), WRONG, "cannot be read; remove it, and calibrate again")


def test_the_hours_that_there_are_change_the_advice(command: Command, large: Path) -> None:
    words = ("plan", large, "--gpu", "rtx4090", "--within")
    assert "even this does not end within 0.5 hours" in command(*words, "0.5").out
    assert "two stages would not" not in command(*words, "500").out
    assert command(*words, "-1").code == WRONG


def test_a_run_without_a_plan_teaches_nothing(
    command: Command, finished: Finished, tmp_path: Path
) -> None:
    """One of an older version, or of a base that the planner does not know."""
    older = tmp_path / "older"
    shutil.copytree(finished.run_dir, older)
    facts = json.loads((older / "run.json").read_text(encoding="utf-8"))
    del facts["plan"]
    (older / "run.json").write_text(json.dumps(facts), encoding="utf-8")
    one_line(
        command("plan", "--calibrate", older),
        WRONG,
        "--calibrate: ",
        "has no whole plan in run.json",
    )
    assert not (tmp_path / "settings").exists()


# --- light ----------------------------------------------------------------------------------------


def test_nothing_heavy_is_loaded(large: Path) -> None:
    """Of files here, too, whose rows and tokens are counted."""
    code = (
        "import sys\n"
        "from orpo_ray.cli.main import run\n"
        "codes = [run(['plan', sys.argv[1], *more]) for more in (\n"
        "    ['--nodes', '1..4'],\n"
        "    ['data.train=' + sys.argv[2], 'model.base=' + sys.argv[3], 'data.max_length=128'],\n"
        ")]\n"
        "heavy = {'torch', 'transformers', 'ray', 'deepspeed', 'datasets', 'peft'}\n"
        "print(codes, sorted(heavy & set(sys.modules)), file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(large), str(DEMO / "train.jsonl"), str(BASE)],
        env={**ENVIRONMENT, "XDG_CONFIG_HOME": os.environ["XDG_CONFIG_HOME"]},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr.splitlines()[-1] == "[0, 0] []", done.stderr


def test_a_base_that_the_planner_does_not_know_trains_all_the_same(
    command: Command, config: Path, tmp_path: Path
) -> None:
    """StableLM is trained as any other base; the planner has no table of its layers."""
    base = random_base(tmp_path / "base", "stablelm")
    done = command("train", config, f"model.base={base}", "training.max_steps=1", "--json")
    assert done.code == 0, done.err
    (line,) = [line for line in done.said if "planned" in line]
    assert line.startswith("not planned: ") and "stablelm" in line
    written = json.loads((tmp_path / "storage" / "tiny" / "run.json").read_text(encoding="utf-8"))
    assert written["plan"] is None
