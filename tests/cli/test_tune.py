"""`orpo-ray tune` as a person uses it: the plan, the search, its table, and refusals."""

import fcntl
import json
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import DEMO, Done, locked_elsewhere
from terminal import Command, shell

from orpo_ray.cli.search_table import SearchTable
from orpo_ray.runs.files import write_json
from orpo_ray.runs.lock import is_locked, locked
from orpo_ray.runs.search import Search, Start, Trial

pytestmark = pytest.mark.ray

SPACE = "search.space={objective.lambda: {loguniform: [0.1, 1.0]}}"


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Done]:
    """A search over the last of two stages, by the real command."""
    folder = tmp_path_factory.mktemp("tuned")
    sft = {"objective": {"kind": "sft"}}
    orpo = {"objective": {"kind": "orpo", "lambda": 0.1}, "training": {"max_steps": 2}}
    tree = {
        "name": "staged",
        "storage": str(folder / "storage"),
        "model": {"base": str(DEMO / "base")},
        "adapter": {"r": 4, "alpha": 8},
        "data": {
            "train": [{"source": str(DEMO / "train.jsonl"), "limit": 48}],
            "eval": [{"source": str(DEMO / "h1.jsonl"), "limit": 16}],
            "max_length": 96,
            "max_prompt_length": 48,
        },
        "training": {
            "pairs_per_step": 8,
            "max_steps": 3,
            "eval_every": 0.5,
            "checkpoint_every": 1.0,
        },
        "scale": {"workers": 1, "gpus_per_worker": 0},
        "stages": [sft, orpo],
        "search": {
            "searcher": "grid",
            "scheduler": "none",
            "space": {"stages.1.objective.lambda": {"grid": [0.1, 1.0]}},
        },
    }
    config = folder / "staged.yaml"
    config.write_text(yaml.safe_dump(tree), encoding="utf-8")
    done = shell("tune", config, "--json")
    assert done.code == 0, done.err
    return config, done


@pytest.mark.long
@pytest.mark.slow
def test_a_field_of_one_stage_is_searched_from_the_adapter_of_the_stage_before(
    tuned: tuple[Path, Done],
) -> None:
    config, done = tuned
    folder = config.parent / "storage" / "staged" / "search"
    assert [trial["state"] for trial in done.result["trials"]] == ["finished", "finished"]
    assert json.loads((folder / "1-sft" / "result.json").read_text(encoding="utf-8"))["steps"] == 3
    starts = set()
    for number, weight in enumerate((0.1, 1.0)):
        trial = folder / "trials" / f"{number:03d}"
        tried = json.loads((trial / "config.json").read_text(encoding="utf-8"))
        assert tried["objective"]["lambda"] == weight and tried["training"]["max_steps"] == 2
        assert tried["adapter"]["init_from"] == str(folder / "1-sft")
        starts.add(
            json.loads((trial / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])[
                "eval/nll"
            ]
        )
        # An evaluation reaches the search without a checkpoint.
        assert [each["step"] for each in done.result["trials"][number]["evaluations"]] == [0, 1, 2]
        assert [path.name for path in (trial / "checkpoints").iterdir()] == ["step-000002"]
    assert len(starts) == 1, "both begin as the first stage ended"


@pytest.mark.long
@pytest.mark.slow
def test_the_best_config_holds_all_stages_and_trains_as_it_is(
    command: Command, tuned: tuple[Path, Done]
) -> None:
    _, done = tuned
    outcome = done.result["outcome"]
    best = yaml.safe_load(Path(outcome["config"]).read_text(encoding="utf-8"))
    assert (
        best["stages"][1]["objective"]["lambda"] == outcome["values"]["stages.1.objective.lambda"]
    )
    planned = command("train", outcome["config"], "--dry-run", "--json")
    assert (planned.code, planned.result["name"], planned.result["steps"]) == (0, "staged-best", 5)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("inside", ["staged", "staged/search"])
def test_a_search_is_shown_from_its_folder(
    command: Command, tuned: tuple[Path, Done], inside: str
) -> None:
    config, done = tuned
    shown = command("tune", "--show", config.parent / "storage" / inside)
    assert shown.code == 0
    for part in (
        "staged/search: finished",
        "Pareto front",
        "is best",
        "config:  ",
        "adapter: ",
        "trial 0: ",
        "base: ",
    ):
        assert part in shown.out
    assert (
        command("tune", "--show", config.parent / "storage" / inside, "--json").result
        == done.result
    )


def test_a_running_search_is_shown_as_far_as_it_has_come(command: Command, tmp_path: Path) -> None:
    with locked_elsewhere(tmp_path):
        shown = shown_half_way(command, tmp_path)
    assert "x/search: running" in shown.out and "trial 1 failed: no memory" in shown.out


def test_a_search_whose_process_is_gone_is_not_said_to_be_running(
    command: Command, tmp_path: Path
) -> None:
    assert "x/search: interrupted" in shown_half_way(command, tmp_path).out


def shown_half_way(command: Command, tmp_path: Path) -> Done:
    trial = Trial(
        number=0, run="x/search/trials/000", values={"objective.lambda": 0.25}, total_steps=10
    )
    trial.note(5, 10, {"eval/accuracy": 0.75, "eval/margin": 0.5, "eval/nll": 1.25})
    failed = Trial(
        number=1,
        run="x/search/trials/001",
        values={"objective.lambda": 0.5},
        state="failed",
        error="no memory",
    )
    write_json(
        tmp_path / "search.json",
        Search(
            name="x/search",
            settings={"metric": "eval/accuracy"},
            trial_count=4,
            pairs=16,
            trials=[trial, failed],
        ).to_json(),
    )
    shown = command("tune", "--show", tmp_path)
    assert shown.code == 0
    (row,) = (line for line in shown.out.splitlines() if "0.25" in line)
    assert [cell.strip() for cell in row.strip("│").split("│")] == [
        "0",
        "0.25",
        "5/10",
        "0.750",
        "0.500",
        "1.250",
        "running",
    ]
    return shown


def test_progress_tells_each_event_once_and_the_time_that_is_left(
    capsys: pytest.CaptureFixture[str],
) -> None:
    now = [0.0]
    table = SearchTable(clock=lambda: now[0])
    search = Search(
        name="x", settings={"metric": "eval/accuracy"}, trial_count=4, pairs=16, began=Start(0.0, 0)
    )
    numbers = {"eval/accuracy": 0.75, "eval/margin": 0.5, "eval/nll": 1.25}
    search.trials.append(Trial(number=0, run="", values={"objective.lambda": 0.25}))
    table(search)
    table(search)
    now[0] = 60.0
    search.trials[0].note(10, 10, numbers)
    search.trials[0].state = "finished"
    table(search)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "trial 0: objective.lambda=0.25  running  [0 of 4 trials done]",
        "trial 0: objective.lambda=0.25  step 10/10  accuracy 0.750  margin 0.500  nll 1.250  "
        "finished  "
        "[1 of 4 trials done, time left about 0:03:00]",
    ]


def test_a_trial_that_outlived_the_others_is_expected_to_go_on_to_its_end(
    capsys: pytest.CaptureFixture[str],
) -> None:
    trials = [
        Trial(number=0, run="", values={}, state="finished", steps=100, total_steps=100),
        Trial(number=1, run="", values={}, state="stopped", steps=20, total_steps=100),
        Trial(number=2, run="", values={}, steps=70, total_steps=100),
    ]
    table, search = (
        SearchTable(clock=lambda: 190.0),
        Search(name="x", settings={}, trial_count=3, pairs=16, trials=trials, began=Start(0.0, 0)),
    )
    table(search)
    assert "[2 of 3 trials done, time left about 0:00:30]" in capsys.readouterr().err
    trials[0].state = "running"
    table(search)
    assert "time left" not in capsys.readouterr().err


def test_a_running_search_is_shown_with_what_is_left(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = Trial(
        number=0,
        run="x/search/trials/000",
        values={"objective.lambda": 0.25},
        state="finished",
        steps=10,
        total_steps=10,
    )
    search = Search(
        name="x/search",
        settings={"metric": "eval/accuracy"},
        trial_count=4,
        pairs=16,
        trials=[ended],
        began=Start(1000.0, 0),
    )
    write_json(tmp_path / "search.json", search.to_json())
    monkeypatch.setattr(time, "time", lambda: 1060.0)
    with locked(tmp_path / ".lock"):
        shown = command("tune", "--show", tmp_path)
    assert "1 of 4 trials done, time left about 0:03:00" in shown.out


def test_looking_at_a_search_does_not_take_its_lock(tmp_path: Path) -> None:
    with locked(tmp_path / ".lock"):
        assert is_locked(tmp_path / ".lock")
    with (tmp_path / ".lock").open("r") as onlooker:
        fcntl.flock(onlooker, fcntl.LOCK_SH)
        assert not is_locked(tmp_path / ".lock")


def test_a_search_is_not_trained_over(command: Command, tmp_path: Path, config: Path) -> None:
    folder = config.parent / "storage" / "tiny" / "search"
    folder.mkdir(parents=True)
    write_json(
        folder / "search.json",
        Search(name="tiny/search", settings={}, trial_count=16, pairs=16).to_json(),
    )
    done = command("train", config, "name=tiny/search")
    assert (
        done.code == 2
        and "holds a search; train its best.yaml, or choose another name" in done.said[-1]
    )


def test_a_dry_run_tells_what_would_be_tried(command: Command, config: Path) -> None:
    done = command("tune", config, SPACE, "search.trials=5", "--dry-run", "--json")
    assert done.code == 0
    assert (done.result["trials"], done.result["steps"], done.result["pairs"]) == (5, 4, 48)
    assert done.result["at_once"] >= 1
    assert list(done.result["space"]) == ["objective.lambda"]
    assert (
        done.said[-1]
        == f"5 trials of 4 steps, {done.result['at_once']} at once; nothing was started"
    )
    assert not (config.parent / "storage" / "tiny").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["search.space={objective.lamda: {uniform: [0, 1]}}"], "did you mean objective.lambda?"),
        (["search.space={objective.lambda: {loguniform: [0, 1]}}"], "which has no logarithm"),
        (
            ["search.space={objective.lambda: {uniform: [1, 0]}}"],
            "1 to 0 is no range; write the smaller number first",
        ),
        (
            ["search.space={adapter.dropout: {uniform: [0.5, 2]}}"],
            "adapter.dropout: must be less than 1, not 2",
        ),
        ([SPACE, "search.trials=0"], "search.trials: must be greater than 0, not 0"),
        ([SPACE, "search.metric=eval/acuracy"], "did you mean eval/accuracy?"),
        ([SPACE, "search.metric=eval/loss"], "is scaled by lambda or beta"),
        ([SPACE, "search.scheduler=pbt"], "use asha or none"),
        (
            [
                "search.space={stages.1.objective.lambda: {uniform: [0, 1]}}",
                "stages=[{}, {objective: {kind: dpo}}]",
            ],
            "search.space: stages.1: objective.lambda: dpo has no lambda; remove it",
        ),
        (["--show", "runs/x"], "--show RUN takes no config"),
        (
            ["search.space={adapter.kind: {choice: [lora, none]}}"],
            "adapter.kind=none trains the base's own weights",
        ),
    ],
)
def test_what_cannot_be_searched_is_refused_before_anything_starts(
    command: Command, config: Path, arguments: list[str], says: str
) -> None:
    done = command("tune", config, *arguments)
    assert done.code == 2 and says in done.said[-1]
    assert len([line for line in done.said if line.startswith("orpo-ray: ")]) == 1
    assert not (config.parent / "storage" / "tiny").exists()


def test_no_search_to_show_and_no_config_are_told(command: Command, tmp_path: Path) -> None:
    done = command("tune", "--show", tmp_path)
    assert done.code == 2 and "no search.json here" in done.said[-1]
    done = command("tune")
    assert done.code == 2 and "name a CONFIG.yaml to search with" in done.said[-1]


STAGES = (
    "stages=[{objective: {kind: sft}}, {objective: {kind: orpo}, OTHER}, {objective: {kind: dpo}}]"
)
FULL = ("adapter.kind=none", "model.quantization=none")


@pytest.mark.parametrize(
    ("other", "more"), [("model: {dtype: float32}", ()), ("training: {warmup: 1}", FULL)]
)
def test_a_later_stage_without_pairs_is_refused_before_the_first_is_trained(
    command: Command, config: Path, other: str, more: tuple[str, ...]
) -> None:
    other += ", data: {train: [{source: nowhere.jsonl}]}"
    done = command("train", config, STAGES.replace("OTHER", other), *more)
    assert done.code == 2 and "nowhere.jsonl: no such file" in done.said[-1]
    assert not (config.parent / "storage" / "tiny").exists()


def test_stages_of_full_fine_tuning_are_planned_before_any_is_trained(
    command: Command, config: Path
) -> None:
    stages = STAGES.replace("OTHER", "training: {max_steps: 3}")
    planned = command("train", config, stages, *FULL, "--dry-run", "--json")
    assert (planned.code, planned.result["steps"]) == (0, 4 + 3 + 4)
    space = "search.space={stages.1.objective.lambda: {loguniform: [0.1, 1.0]}}"
    planned = command("tune", config, stages, space, *FULL, "--dry-run", "--json")
    assert (planned.code, planned.result["steps"]) == (0, 3)


def test_other_settings_under_the_same_name_are_refused(command: Command, config: Path) -> None:
    folder = config.parent / "storage" / "tiny" / "search"
    folder.mkdir(parents=True)
    shown: dict[str, Any] = command(
        "config", "show", config, SPACE, "name=tiny/search", "--json"
    ).result
    (folder / "config.json").write_text(json.dumps(shown), encoding="utf-8")
    write_json(
        folder / "search.json",
        Search(name="tiny/search", settings=shown["search"], trial_count=16, pairs=16).to_json(),
    )
    done = command("tune", config, SPACE, "search.metric=eval/margin")
    assert done.code == 2
    assert (
        "search.metric: 'eval/margin' here, but run tiny/search was made with 'eval/accuracy'"
        in done.said[-1]
    )
