"""What run.json keeps for a reader: what became of the rows, why, and where a run was resumed."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import EVAL_PAIRS, TRAIN_PAIRS, StopsAfter, make_artifact, run_config, train_locally

from orpo_ray.data.checks import OVERLONG_PAIR, REASONS
from orpo_ray.data.store import Artifact
from orpo_ray.data.summary import account
from orpo_ray.errors import StoppedError
from orpo_ray.models.hardware import CPU
from orpo_ray.runs.console import SILENT
from orpo_ray.runs.files import PLAN, RUN_FILE, read_json
from orpo_ray.runs.run import Run
from orpo_ray.training import loop
from orpo_ray.training.reporter import LocalReporter
from orpo_ray.training.setup import settle


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return make_artifact(tmp_path_factory.mktemp("pairs"))


def test_every_training_pair_is_in_the_histogram_once(artifact: Artifact) -> None:
    found = account(artifact)
    assert (found["train"], found["eval"]) == (TRAIN_PAIRS, EVAL_PAIRS)
    edges, sides = found["lengths"]["edges"], found["lengths"]["sides"]
    assert list(sides) == ["prompt", "chosen", "rejected"]
    for column, counts in enumerate(sides.values()):
        lengths = artifact.train.lengths[:, column]
        assert sum(counts) == TRAIN_PAIRS
        for low, high, count in zip(edges, edges[1:], counts, strict=False):
            assert count == int(np.sum((low <= lengths) & (lengths < high)))


def test_drops_have_their_reasons(artifact: Artifact) -> None:
    code = next(iter(REASONS))
    changed = replace(
        artifact.summary,
        bad={code: 3},
        overlong=5,
        overlong_prompts=2,
        duplicates=4,
        near=9,
        settings={"max_length": 96, "max_prompt_length": 48, "dedup": "exact"},
    )
    found = account(replace(artifact, summary=changed))["dropped"]
    assert found == [
        [REASONS[code], 3],
        ["longer than data.max_length=96", 3],
        ["the prompt is longer than data.max_prompt_length=48", 2],
        ["exact duplicates", 4],
    ], OVERLONG_PAIR


def until(run: Run, artifact: Artifact, step: int, planned: dict[str, Any] | None = None) -> None:
    """Train up to a step, save a checkpoint there and stop."""
    console = StopsAfter(step)
    run.folder.mkdir(parents=True, exist_ok=True)
    setup = settle(run, artifact, console.announce, CPU, planned=planned)
    with pytest.raises(StoppedError):
        loop.train(run, artifact, setup, LocalReporter(run, console), console.announce)


def facts(run: Run) -> dict[str, Any]:
    found = read_json(run.path(RUN_FILE))
    assert found is not None
    return found


def test_each_resume_is_on_record_with_the_steps_that_were_lost(
    artifact: Artifact, tmp_path: Path
) -> None:
    config = run_config(tmp_path)
    run = Run(config)
    until(run, artifact, 3)
    assert "resumed" not in facts(run)
    with run.path("metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 5, "train/loss": 1.0}\n')  # reported, but in no checkpoint
    until(run, artifact, 6)
    assert facts(run)["resumed"] == [{"step": 3, "again": 2}]
    train_locally(config, artifact)
    assert facts(run)["resumed"] == [{"step": 3, "again": 2}, {"step": 6, "again": 0}]
    train_locally(config, artifact)  # nothing is left to train
    assert len(facts(run)["resumed"]) == 2


def test_a_resumed_run_keeps_why_it_was_decided_as_it_was(
    artifact: Artifact, tmp_path: Path
) -> None:
    config = run_config(tmp_path, training={"tokens_per_microbatch": "auto"})
    run = Run(config)
    until(run, artifact, 3)
    reasons = facts(run)["reasons"]
    assert reasons[0] == "dtype float32: the best that CPU computes"
    assert reasons[-1].startswith("tokens per micro-batch ")
    assert "trying the largest micro-batch" not in reasons
    train_locally(config, artifact)
    assert facts(run)["reasons"] == reasons
    assert facts(run)["pairs"] == account(artifact)


def test_the_plan_is_on_record_from_the_start_and_what_came_before_the_result(
    artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(run_config(tmp_path))
    until(run, artifact, 3, planned={"device": "one"})
    assert facts(run)[PLAN] == {"predicted": {"device": "one"}}
    setup = settle(run, artifact, SILENT.announce, CPU, planned={"device": "other"})
    # A driver that dies after the result would add nothing: all is there when the result is.
    seen: list[Any] = []
    conclude = Run.conclude
    monkeypatch.setattr(
        Run,
        "conclude",
        lambda self, result: (seen.append(facts(self)[PLAN]), conclude(self, result)),
    )
    loop.train(run, artifact, setup, LocalReporter(run, SILENT), SILENT.announce)
    result = run.result()
    assert result is not None and seen == [facts(run)[PLAN]]
    assert seen[0] == {
        "predicted": {"device": "other"},
        "measured": {
            "seconds": result.seconds,
            "pairs_per_second": result.pairs_per_second,
            "peak_bytes": result.peak_memory_bytes,
        },
    }


def test_a_run_that_is_not_planned_records_no_plan(artifact: Artifact, tmp_path: Path) -> None:
    config = run_config(tmp_path)
    until(Run(config), artifact, 3, planned={"device": "one"})
    train_locally(config, artifact)
    assert facts(Run(config))[PLAN] is None


def test_memory_is_reported_at_every_step_and_never_falls(
    artifact: Artifact, tmp_path: Path
) -> None:
    trained = train_locally(run_config(tmp_path), artifact)
    found = [line["train/memory_bytes"] for line in trained.metrics if "train/loss" in line]
    assert len(found) == len(trained.losses)
    assert found == sorted(found) and found[0] > 1e8
