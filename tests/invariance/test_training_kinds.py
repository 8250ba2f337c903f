"""Every objective, adapter, quantisation, optimizer and schedule trains and resumes."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import (
    EVAL_PAIRS,
    StopsAfter,
    Trained,
    decided,
    random_base,
    remember_trainers,
    run_config,
    train_locally,
)
from torch import Tensor
from transformers import AutoTokenizer

from orpo_ray.config import RunConfig
from orpo_ray.data.store import Artifact
from orpo_ray.errors import ConfigError, StoppedError
from orpo_ray.evaluation.evaluate import load_trained
from orpo_ray.models.base import count_quantized
from orpo_ray.models.hardware import CPU
from orpo_ray.runs.console import SILENT
from orpo_ray.runs.run import Run
from orpo_ray.training import attention, loop
from orpo_ray.training.metrics import score_pairs, summarise
from orpo_ray.training.reporter import LocalReporter
from orpo_ray.training.runs import ALL_BEFORE
from orpo_ray.training.setup import settle
from orpo_ray.training.world import ALONE

STEPS = 3
PLAIN = {"quantization": "none"}
FULL = {"model": PLAIN, "adapter": {"kind": "none"}}
OBJECTIVES = ("orpo", "dpo", "ipo", "simpo", "cpo", "sft")
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"model": PLAIN},
    "dora": {"model": PLAIN, "adapter": {"dora": True}},
    "lora-nf4": {},
    "dora-nf4": {"adapter": {"dora": True}},
    "lora-int8": {"model": {"quantization": "int8"}},
    "lora-bfloat16": {"model": {"dtype": "bfloat16"}},
    "lora-pissa": {"model": PLAIN, "adapter": {"init": "pissa", "dropout": 0.0}},
    "dora-olora": {"model": PLAIN, "adapter": {"init": "olora", "dropout": 0.0, "dora": True}},
    "lora-loftq-nf4": {"adapter": {"init": "loftq"}},
    "lora-eva-nf4": {"adapter": {"init": "eva", "rslora": True}},
    "full": FULL,
    "full-bfloat16": {
        "model": {"quantization": "none", "dtype": "bfloat16"},
        "adapter": {"kind": "none"},
    },
}


def kind_config(storage: Path, name: str, kind: dict[str, Any], **training: Any) -> RunConfig:
    """A short run of one kind. Activations are kept, so that no memory must be measured."""
    short = {
        "max_steps": STEPS,
        "pairs_per_step": 4,
        "eval_every": STEPS,
        "checkpoint_every": STEPS,
    }
    return run_config(
        storage, name, **kind, training={**short, "gradient_checkpointing": False, **training}
    )


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_trains(objective: str, artifact: Artifact, tmp_path: Path) -> None:
    trained = train_locally(
        kind_config(tmp_path, objective, {"objective": {"kind": objective}}), artifact
    )
    assert len(trained.losses) == STEPS
    assert all(math.isfinite(value) for line in trained.metrics for value in line.values())
    assert any(
        tensor.abs().max() > 0 for name, tensor in trained.adapter.items() if "lora_B" in name
    )
    names = set().union(*trained.metrics)
    assert {
        "train/loss",
        "train/nll",
        "train/grad_norm",
        "eval/accuracy",
        "eval/margin",
        "eval/nll",
    } <= names
    assert ("train/accuracy" in names) == (objective != "sft"), (
        "sft does not compute the rejected answers"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_training_moves_its_own_weights_and_no_others(
    kind: str, artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainers = remember_trainers(monkeypatch)
    before: dict[str, Tensor] = {}

    def keep_weights(step: int, total: int, metrics: Mapping[str, float]) -> None:
        if step == 0:
            before.update(
                {name: p.detach().clone() for name, p in trainers[0].model.named_parameters()}
            )

    trained = train_locally(kind_config(tmp_path, kind, KINDS[kind]), artifact, keep_weights)
    assert all(math.isfinite(loss) for loss in trained.losses)
    model = trainers[0].model
    assert count_quantized(model) == (
        28 if "nf4" in kind or "int8" in kind or kind == "lora-bfloat16" else 0
    )
    moved = {
        name
        for name, parameter in model.named_parameters()
        if not torch.equal(parameter, before[name])
    }
    if kind.startswith("full"):
        assert moved == set(before)
    else:
        assert moved == {name for name in before if "lora_" in name}
        assert any("magnitude" in name for name in moved) == kind.startswith("dora")


STATE = {
    "adamw": {"step", "exp_avg", "exp_avg_sq"},
    "paged-adamw": {"step", "state1", "state2"},
    "lion": {"step", "state1"},
    "paged-lion": {"step", "state1"},
    "ademamix": {"step", "state1", "state2"},
    "paged-ademamix": {"step", "state1", "state2"},
    "schedule-free-adamw": {"z", "exp_avg_sq", "group.k", "group.weight_sum", "group.lr_max"},
}
"""What is kept for a parameter; of the 8-bit ones it is the same, in 8 bits, with its scales."""
EIGHT_BIT = [f"{name}-8bit" for name in STATE if name not in ("adamw", "schedule-free-adamw")]


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize(
    "optimizer",
    [
        pytest.param(name, marks=pytest.mark.long if name.startswith("paged") else ())
        for name in [*STATE, "adamw-8bit", *EIGHT_BIT]
    ],
)
def test_optimizers_lower_the_loss_and_keep_the_state_they_promise(
    optimizer: str, artifact: Artifact, tmp_path: Path
) -> None:
    schedule = "constant" if optimizer.startswith("schedule-free") else "cosine"
    settings = {"learning_rate": 1e-3, "schedule": schedule, "max_steps": 5, "eval_every": 5}
    config = kind_config(
        tmp_path,
        optimizer,
        {"adapter": {"r": 32, "dropout": 0.0}},
        optimizer=optimizer,
        checkpoint_every=5,
        **settings,
    )
    trained = train_locally(config, artifact)
    held_out = [line["eval/nll"] for line in trained.metrics if "eval/nll" in line]
    assert held_out[-1] < held_out[0] - 0.005
    state = load_state_file(trained)
    if optimizer in STATE:
        assert {key.rpartition("/")[2] for key in state} == {"master", *STATE[optimizer]}
    else:
        assert {t.dtype for name, t in state.items() if name.endswith(("/state1", "/state2"))} == {
            torch.uint8
        }


def load_state_file(trained: Trained) -> dict[str, Tensor]:
    (newest,) = sorted((trained.run_dir / "checkpoints").iterdir())[-1:]
    return load_file(newest / "state.safetensors")


def test_a_run_does_not_inherit_32_bit_state_from_an_earlier_run_of_the_process(
    artifact: Artifact, tmp_path: Path
) -> None:
    """Full training keeps 32-bit state for embeddings.

    bitsandbytes remembers that by the position of the parameter, until the process ends.
    """
    full = train_locally(kind_config(tmp_path, "full", FULL, optimizer="adamw-8bit"), artifact)
    assert torch.float32 in {
        t.dtype for name, t in load_state_file(full).items() if name.endswith("/state1")
    }
    lora = train_locally(
        kind_config(tmp_path, "lora", {"adapter": {"r": 32}}, optimizer="adamw-8bit"), artifact
    )
    assert {t.dtype for name, t in load_state_file(lora).items() if name.endswith("/state1")} == {
        torch.uint8
    }


@pytest.mark.parametrize(
    ("schedule", "factor"),
    [
        ("constant", lambda done: 1.0),
        ("linear", lambda done: 1.0 - done),
        ("cosine", lambda done: 0.5 * (1.0 + math.cos(math.pi * done))),
    ],
)
def test_schedules_follow_their_formula(
    schedule: str, factor: Callable[[float], float], artifact: Artifact, tmp_path: Path
) -> None:
    """The rate of a step depends on the number of steps done before it.

    It rises over two steps of warm-up and follows the formula over the other six.
    """
    steps, warmup, rate = 8, 2, 1e-3
    config = kind_config(
        tmp_path,
        schedule,
        {},
        schedule=schedule,
        max_steps=steps,
        warmup=warmup,
        learning_rate=rate,
        pairs_per_step=1,
    )
    expected = [
        rate * (done / warmup if done < warmup else factor((done - warmup) / (steps - warmup)))
        for done in range(steps)
    ]
    rates = [
        line["train/learning_rate"]
        for line in train_locally(config, artifact).metrics
        if "train/loss" in line
    ]
    assert rates == pytest.approx(expected, rel=1e-9, abs=1e-15)


def test_warmup_may_be_a_fraction(artifact: Artifact, tmp_path: Path) -> None:
    whole, fraction = (
        train_locally(
            kind_config(tmp_path, f"warmup-{warmup}", {}, warmup=warmup, max_steps=4), artifact
        )
        for warmup in (2, 0.5)
    )
    assert whole.losses == fraction.losses
    assert [line.get("train/learning_rate") for line in whole.metrics] == [
        line.get("train/learning_rate") for line in fraction.metrics
    ]


# --- layouts --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base that looks back 16 tokens, less than most pairs of the demo have."""
    return random_base(tmp_path_factory.mktemp("windowed"), "mistral", sliding_window=16)


def test_a_base_that_does_not_support_sdpa_trains_with_eager_attention(
    artifact: Artifact, tmp_path: Path
) -> None:
    base = random_base(tmp_path / "base", "gemma2", head_dim=8)
    trained = train_locally(
        kind_config(tmp_path, "capped", {"model": {**PLAIN, "base": str(base)}}), artifact
    )
    assert "attention eager: the base knows no other that is here" in trained.said
    assert trained.result["layout"] == "shared-prefix"


def test_dropout_is_refused_if_experts_do_not_support_it(
    artifact: Artifact, tmp_path: Path
) -> None:
    base = random_base(tmp_path / "base", "mixtral", num_local_experts=2)
    kind: dict[str, Any] = {"model": {**PLAIN, "base": str(base)}}
    with pytest.raises(ConfigError, match=r"^adapter\.dropout: set it to 0: "):
        train_locally(kind_config(tmp_path, "experts", kind), artifact)
    assert train_locally(
        kind_config(tmp_path, "experts", {**kind, "adapter": {"dropout": 0.0}}), artifact
    ).losses


def test_a_base_with_a_window_shares_prompts_and_learns_what_padded_rows_teach(
    windowed: Path, artifact: Artifact, tmp_path: Path
) -> None:
    kind = {"model": {"base": str(windowed), "quantization": "none"}, "objective": {"kind": "dpo"}}
    trained, padded = (
        train_locally(kind_config(tmp_path, f"windowed-{layout}", kind, layout=layout), artifact)
        for layout in ("auto", "padded")
    )
    assert trained.result["layout"] == "shared-prefix"
    assert trained.losses[0] == pytest.approx(padded.losses[0], rel=1e-6)
    # Adam makes more of differences in rounding where a gradient is nearly nothing.
    assert trained.losses == pytest.approx(padded.losses, rel=1e-3)


def test_a_window_that_is_not_seen_is_found_out(
    windowed: Path, artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run falls back to padded rows, and so does DPO's reference.

    So the implicit rewards at step 0 are 0.
    """
    monkeypatch.setattr(attention, "_reach", lambda module, window: ALL_BEFORE)
    kind = {"model": {"base": str(windowed), "quantization": "none"}, "objective": {"kind": "dpo"}}
    trained = train_locally(kind_config(tmp_path, "found-out", kind), artifact)
    (warning,) = (line for line in trained.said if line.startswith("WARNING"))
    assert (
        "layout shared-prefix is not right for this model, falling back to padded rows" in warning
    )
    assert "log-probs of some pairs differ by" in warning
    assert trained.result["layout"] == "padded"
    run = json.loads((trained.run_dir / "run.json").read_text(encoding="utf-8"))
    assert run["decisions"]["layout"] == "padded", "a resume would take another layout"
    assert trained.losses[0] == pytest.approx(math.log(2), abs=1e-6)


# --- resuming after a failure ---------------------------------------------------------------------


class PlannedError(Exception):
    """Ends a run in these tests."""


def fail_at(step: int) -> Callable[[int, int, Mapping[str, float]], None]:
    def watch(reported: int, total: int, metrics: Mapping[str, float]) -> None:
        if reported == step and "train/loss" in metrics:
            raise PlannedError

    return watch


RESUMED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "full": (FULL, {}),
    "full-8bit": (FULL, {"optimizer": "adamw-8bit"}),
    "dora-nf4": ({"adapter": {"dora": True}}, {}),
    "lora-int8-paged-8bit": (
        {"model": {"quantization": "int8"}, "adapter": {"r": 32}},
        {"optimizer": "paged-adamw-8bit"},
    ),
    "pissa": ({"model": PLAIN, "adapter": {"init": "pissa", "dropout": 0.0}}, {}),
    "olora-dora": (
        {"model": PLAIN, "adapter": {"init": "olora", "dropout": 0.0, "dora": True}},
        {},
    ),
    "loftq": ({"adapter": {"init": "loftq"}}, {}),
    "eva": ({"adapter": {"init": "eva"}}, {}),
    "lora-plus-rslora": ({"adapter": {"lora_plus_ratio": 16, "rslora": True}}, {}),
    "lion-8bit": ({"adapter": {"r": 32}}, {"optimizer": "lion-8bit"}),
    "paged-ademamix-8bit": ({"adapter": {"r": 32}}, {"optimizer": "paged-ademamix-8bit"}),
    "schedule-free": (
        {"adapter": {"lora_plus_ratio": 4}},
        {"optimizer": "schedule-free-adamw", "schedule": "constant"},
    ),
    "galore": (FULL, {"optimizer": "galore-adamw", "galore": {"rank": 8, "update_every": 3}}),
}


@pytest.mark.parametrize("name", RESUMED)
def test_every_kind_resumes_exactly(name: str, artifact: Artifact, tmp_path: Path) -> None:
    """The failure is an exception here, which is faster than a kill. tests/faults has the kills."""
    kind, own = RESUMED[name]
    settings = {"max_steps": 4, "checkpoint_every": 2, "eval_every": 4, **own}
    unbroken = train_locally(kind_config(tmp_path, "unbroken", kind, **settings), artifact)
    config = kind_config(tmp_path, "broken", kind, **settings)
    with pytest.raises(PlannedError):
        train_locally(config, artifact, fail_at(3))
    resumed = train_locally(config, artifact)
    assert "resuming at step 2 of 4" in resumed.said
    assert resumed.losses == unbroken.losses
    (weights,) = (path.name for path in (resumed.run_dir / "adapter").glob("*.safetensors"))
    for file in (f"adapter/{weights}", "checkpoints/step-000004/state.safetensors"):
        assert (resumed.run_dir / file).read_bytes() == (unbroken.run_dir / file).read_bytes(), file


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_a_checkpoint_that_no_unbroken_run_has_changes_nothing(
    artifact: Artifact, tmp_path: Path
) -> None:
    """A schedule-free run that was stopped has put its averages into the model once more."""
    kind: dict[str, Any] = {}
    own = {"optimizer": "schedule-free-adamw", "schedule": "constant"}
    settings = {"max_steps": 4, "checkpoint_every": 4, "eval_every": 4, **own}
    unbroken = train_locally(kind_config(tmp_path, "unbroken", kind, **settings), artifact)
    config = kind_config(tmp_path, "stopped", kind, **settings)
    config.run_dir.mkdir()
    run = Run(config)
    setup_ = settle(run, artifact, SILENT.announce, CPU)
    with pytest.raises(StoppedError, match="stopped at step 2 of 4"):
        stops = StopsAfter(2)
        loop.train(run, artifact, setup_, LocalReporter(run, stops), stops.announce)
    resumed = train_locally(config, artifact)
    assert resumed.losses == unbroken.losses
    assert all(torch.equal(resumed.adapter[key], unbroken.adapter[key]) for key in unbroken.adapter)


def test_a_resumed_run_keeps_the_decisions_of_its_first_start(
    artifact: Artifact, tmp_path: Path
) -> None:
    """They stay even if another machine or version would decide otherwise."""
    config = kind_config(
        tmp_path, "auto", {}, tokens_per_microbatch="auto", max_steps=6, checkpoint_every=2
    )
    with pytest.raises(PlannedError):
        train_locally(config, artifact, fail_at(3))
    record = config.run_dir / "run.json"
    run = json.loads(record.read_text(encoding="utf-8"))
    assert run["decisions"]["tokens_per_microbatch"] > 0 and not run["decisions"]["find_budget"]
    run["decisions"]["tokens_per_microbatch"] = 333
    record.write_text(json.dumps(run), encoding="utf-8")
    assert (
        settle(Run(config), artifact, SILENT.announce, CPU).decisions.tokens_per_microbatch == 333
    )


# --- where an adapter starts ----------------------------------------------------------------------

STARTS = {
    "pissa": {"model": PLAIN, "adapter": {"init": "pissa", "dropout": 0.0}},
    "olora": {"model": PLAIN, "adapter": {"init": "olora", "dropout": 0.0}},
    "loftq": {"adapter": {"init": "loftq", "dropout": 0.0}},
    "eva": {"adapter": {"init": "eva", "dropout": 0.0}},
}


@pytest.mark.parametrize("name", STARTS)
def test_the_saved_adapter_on_the_base_as_it_is_has_the_reported_log_probs(
    name: str, artifact: Artifact, tmp_path: Path
) -> None:
    trained = train_locally(kind_config(tmp_path, name, STARTS[name]), artifact)
    config = run_config(tmp_path, name, **STARTS[name])
    model = load_trained(config, decided(256), str(trained.run_dir))
    scores = score_pairs(
        model,
        artifact.eval,
        pad_id=0,
        token_budget=256,
        stop_requested=lambda: False,
        world=ALONE,
    )
    found = summarise(scores)
    for metric in ("chosen_logp", "rejected_logp", "margin"):
        reported = trained.result["metrics"][f"eval/{metric}"]
        assert found[metric] == pytest.approx(reported, abs=2e-5)
        assert abs(reported - trained.result["start"][f"eval/{metric}"]) > 1e-3, "nothing moved"


@pytest.mark.parametrize(
    ("objective", "name"), [*(("dpo", name) for name in STARTS), ("kto", "pissa"), ("kto", "loftq")]
)
def test_the_reference_is_the_model_that_training_starts_from(
    objective: str, name: str, artifact: Artifact, tmp_path: Path
) -> None:
    """So the implicit rewards at step 0 are 0, wherever the adapter starts.

    DPO's loss is then log 2, KTO's the mean of 1 - sigmoid(0).
    """
    settings: dict[str, Any] = {"objective": {"kind": objective}, **STARTS[name]}
    engine = {"engine": "trl"} if objective == "kto" else {}
    trained = train_locally(kind_config(tmp_path, name, settings, **engine), artifact)
    expected = math.log(2) if objective == "dpo" else 0.5
    assert trained.losses[0] == pytest.approx(expected, abs=1e-4)
    assert abs(trained.losses[-1] - expected) > 1e-4


def test_trl_computes_the_loss_of_a_schedule_free_run_with_lora_plus(
    artifact: Artifact, tmp_path: Path
) -> None:
    """The engines have one curve, because optimizers and rates are ours under both."""
    kind = {
        "adapter": {"lora_plus_ratio": 4, "dropout": 0.0},
        "objective": {"kind": "dpo"},
        "model": PLAIN,
    }
    own = {"optimizer": "schedule-free-adamw", "schedule": "constant"}
    ours, theirs = (
        train_locally(
            kind_config(tmp_path, engine, kind, engine=engine, tokens_per_microbatch=4096, **own),
            artifact,
        )
        for engine in ("fast", "trl")
    )
    assert theirs.losses == pytest.approx(ours.losses, abs=1e-5)
    assert ours.losses[0] - ours.losses[-1] > 1e-3


def test_lora_plus_is_in_the_log_and_holds_after_a_resume(
    artifact: Artifact, tmp_path: Path
) -> None:
    kind = {"adapter": {"lora_plus_ratio": 16}}
    settings = {"max_steps": 4, "checkpoint_every": 2, "eval_every": 4}
    config = kind_config(tmp_path, "plus", kind, **settings)
    with pytest.raises(PlannedError):
        train_locally(config, artifact, fail_at(3))
    lines = [line for line in train_locally(config, artifact).metrics if "train/loss" in line]
    rates = [(line["train/learning_rate"], line["train/learning_rate_b"]) for line in lines]
    assert len(rates) == 4 and max(rates)[0] > 0
    assert all(b == pytest.approx(16 * a) for a, b in rates)


# --- what a finished run leaves -------------------------------------------------------------------


def test_the_adapter_folder_can_be_used_without_us(artifact: Artifact, tmp_path: Path) -> None:
    """Tokenizer, template and card are next to the weights, and no file is a pickle."""
    trained = train_locally(kind_config(tmp_path, "used", {}), artifact)
    folder = trained.run_dir / "adapter"
    base = AutoTokenizer.from_pretrained(run_config(tmp_path).model.base)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == base.chat_template
    assert tokenizer.get_vocab() == base.get_vocab()
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert artifact.summary.hash in card
    assert f"36 pairs for training, {EVAL_PAIRS} for evaluation" in card
    start, end = trained.result["start"], trained.result["metrics"]
    (row,) = [line for line in card.splitlines() if line.startswith("| preference accuracy |")]
    before, after = (f"{metrics['eval/accuracy']:.3f} (" for metrics in (start, end))
    assert f"| {before}" in row and f"| {after}" in row
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json", ".jinja", ".md"}
