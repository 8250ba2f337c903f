"""Answers to held-out prompts while a run trains: which they are, and that they change nothing."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import BASE, EVAL_PAIRS, Trained, decided, make_artifact, run_config, train_locally
from transformers import AutoTokenizer

from orpo_ray.config import RunConfig
from orpo_ray.data.held import HeldPairs
from orpo_ray.data.pairs import TokenPair
from orpo_ray.data.store import Artifact
from orpo_ray.errors import ResourceError
from orpo_ray.runs import files
from orpo_ray.runs.console import SILENT
from orpo_ray.runs.run import Run
from orpo_ray.runs.samples import SampleAnswer, sample_line, samples_of
from orpo_ray.training import sample_answers
from orpo_ray.training.load import load_pair_model
from orpo_ray.training.plan import SHARED_PREFIX
from orpo_ray.training.reporter import LocalReporter
from orpo_ray.training.sample_answers import Sampler, draw_prompts, refuse_samples
from orpo_ray.training.state import capture_random_state
from orpo_ray.training.strategy import Strategy


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return make_artifact(tmp_path_factory.mktemp("prepared"))


@pytest.fixture(scope="module")
def run_with(artifact: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train_locally(config(tmp_path_factory.mktemp("with")), artifact)


def config(storage: Path, samples: int = 3, **sections: Mapping[str, Any]) -> RunConfig:
    """A run with dropout, so that a number drawn by anybody else changes its weights."""
    training = {"samples": samples, **sections.pop("training", {})}
    return run_config(storage, training=training, adapter={"dropout": 0.1}, **sections)


# --- which prompts --------------------------------------------------------------------------------


def pairs(*prompts: int) -> HeldPairs:
    """Pairs whose prompts have one token each."""
    one = np.array([7], dtype=np.int32)
    return HeldPairs(
        [
            TokenPair.of_answers(str(number), np.array([token], dtype=np.int32), one, one)
            for number, token in enumerate(prompts)
        ]
    )


def test_prompts_are_drawn_by_the_seed_in_the_order_of_the_table() -> None:
    table = pairs(*range(50))
    drawn = [draw_prompts(table, 3, seed) for seed in range(20)]
    assert all(numbers == sorted(set(numbers)) and len(numbers) == 3 for numbers in drawn)
    assert drawn == [draw_prompts(table, 3, seed) for seed in range(20)]
    assert len({tuple(numbers) for numbers in drawn}) > 15


def test_a_prompt_that_stands_twice_is_drawn_once() -> None:
    table = pairs(1, 1, 1, 2, 2, 3)
    for seed in range(10):
        numbers = draw_prompts(table, 5, seed)
        assert sorted(table[number].prompt[0] for number in numbers) == [1, 2, 3]


def test_none_are_taken_from_shared_weights() -> None:
    assert str(refuse_samples(Strategy.ZERO_3)).startswith(
        "training.samples: none are taken, because ZeRO stage 3 shares out the weights"
    )
    others = [strategy for strategy in Strategy if not strategy.shares_weights]
    assert len(others) > 3 and not any(map(refuse_samples, others))


# --- a model in training --------------------------------------------------------------------------


def test_a_model_is_afterwards_as_it_was(artifact: Artifact, tmp_path: Path) -> None:
    model = load_pair_model(config(tmp_path), decided(256), lambda line: None)
    model.use_layout(SHARED_PREFIX)
    model.train()
    sampler = Sampler(model, AutoTokenizer.from_pretrained(BASE), artifact.eval, [0, 2], print)
    before = capture_random_state()
    first, again = sampler.take(0), sampler.take(5)
    assert capture_random_state() == before
    assert model.training and model.layout == SHARED_PREFIX
    assert [replace(sample, step=5) for sample in first] == again, "greedy answers"
    assert [sample.id for sample in first] == [artifact.eval[i].pair_id for i in (0, 2)]
    assert all(sample.answer and sample.chosen and sample.rejected for sample in first)


def test_a_lack_of_memory_ends_the_samples_and_not_the_run(
    artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_much(*_: Any) -> None:
        raise ResourceError("no room")

    answers_of = sample_answers.answers_of
    model = load_pair_model(config(tmp_path), decided(256), lambda line: None)
    said: list[str] = []
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    sampler = Sampler(model, tokenizer, artifact.eval, [0], said.append)
    monkeypatch.setattr(sample_answers, "answers_of", too_much)
    assert sampler.take(0) == []
    monkeypatch.setattr(sample_answers, "answers_of", answers_of)
    assert sampler.take(5) == []
    assert said == ["training.samples: no more are taken, because memory is short"]


# --- a run ----------------------------------------------------------------------------------------


def test_each_evaluation_of_a_run_has_its_answers(run_with: Trained, artifact: Artifact) -> None:
    found = samples_of(run_with.run_dir)
    steps = [line["step"] for line in run_with.metrics if "eval/accuracy" in line]
    assert [sample.step for sample in found] == [step for step in steps for _ in range(3)]
    assert len(steps) == 3 and len({sample.id for sample in found}) == 3
    table = {artifact.eval[i].pair_id: artifact.eval[i] for i in range(EVAL_PAIRS)}
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    for sample in found:
        own = table[sample.id]
        texts = [
            tokenizer.decode(ids.tolist(), skip_special_tokens=True).strip()
            for ids in (own.prompt, own.chosen, own.rejected)
        ]
        assert [sample.prompt, sample.chosen, sample.rejected] == texts
    first, last = found[:3], found[-3:]
    assert [sample.answer for sample in first] != [sample.answer for sample in last]
    assert any(sample.ended for sample in last)


def test_a_run_with_samples_trains_the_same_weights(
    run_with: Trained, artifact: Artifact, tmp_path: Path
) -> None:
    without = train_locally(config(tmp_path, samples=0), artifact)
    assert not (without.run_dir / files.SAMPLES_FILE).exists()
    assert without.losses == run_with.losses
    for name in (
        "adapter/adapter_model.safetensors",
        "checkpoints/step-000010/state.safetensors",
    ):
        assert (without.run_dir / name).read_bytes() == (run_with.run_dir / name).read_bytes()


def test_a_resumed_run_keeps_the_samples_of_an_unbroken_one(
    run_with: Trained, artifact: Artifact, tmp_path: Path
) -> None:
    class PlannedError(Exception):
        pass

    def fail(step: int, total: int, metrics: Any) -> None:
        if step == 10 and "eval/accuracy" in metrics:
            raise PlannedError

    with pytest.raises(PlannedError):
        train_locally(config(tmp_path), artifact, fail)
    folder = Run(config(tmp_path)).folder
    assert len(samples_of(folder)) == 9, "the last step was evaluated, and not saved"
    resumed = train_locally(config(tmp_path), artifact)
    assert "resuming at step 5 of 10" in resumed.said
    assert samples_of(folder) == samples_of(run_with.run_dir)


def test_trl_answers_as_our_own_engine_does(artifact: Artifact, tmp_path: Path) -> None:
    """Before the first step both have the same model; TRL's trainer has changed its head."""
    training = {"engine": "trl", "max_steps": 2, "eval_every": 2, "checkpoint_every": 2}
    by_trl = train_locally(
        config(tmp_path / "trl", objective={"kind": "dpo"}, training=training), artifact
    )
    ours = train_locally(
        config(
            tmp_path / "fast", objective={"kind": "dpo"}, training={**training, "engine": "fast"}
        ),
        artifact,
    )
    start = [sample for sample in samples_of(ours.run_dir) if sample.step == 0]
    assert len(start) == 3
    assert [sample for sample in samples_of(by_trl.run_dir) if sample.step == 0] == start


# --- the file -------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["a\nb", "\u2028\x85\x0b", "</script>", "\ud800", '"\\'])
def test_no_text_breaks_a_line(text: str, tmp_path: Path) -> None:
    sample = SampleAnswer(step=1, id="x", prompt=text, answer=text, ended=False, chosen=text)
    line = sample_line(sample)
    assert line.isascii() and len(line.splitlines()) == 1
    assert "rejected" not in json.loads(line)
    (tmp_path / files.SAMPLES_FILE).write_text(line + '{"step": 2, "id', encoding="utf-8")
    assert samples_of(tmp_path) == [sample]


def test_rewinding_forgets_the_samples_of_later_steps(tmp_path: Path) -> None:
    run = Run(config(tmp_path))
    run.folder.mkdir(parents=True)
    reporter = LocalReporter(run, SILENT)
    samples = [
        SampleAnswer(step=step, id="x", prompt="p", answer="a", ended=True) for step in (0, 5, 10)
    ]
    reporter.keep_samples(samples[:2])
    reporter.keep_samples(samples[2:])
    assert samples_of(run.folder) == samples
    reporter.rewind(5)
    assert samples_of(run.folder) == samples[:2]
    reporter.rewind(-1)
    assert samples_of(run.folder) == []
