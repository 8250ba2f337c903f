"""`engine: trl`: the same run as ours if both define an objective alike.

And KTO, which only TRL computes.
"""

import math
import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from support import (
    BASE,
    Trained,
    demo_pairs,
    make_artifact,
    run_config,
    train_locally,
    write_pairs,
)
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from orpo_ray.config import RunConfig
from orpo_ray.data.pairs import TokenPair
from orpo_ray.data.store import Artifact
from orpo_ray.errors import ConfigError
from orpo_ray.training.trl_engine import TrlTrainer, keep_start_as_reference, to_unpaired_rows

STEPS = 4
LOSS, TENSOR = 1e-5, 1e-4
"""Relative: of every step's loss and evaluation, and of the adapter's change as one vector."""
OBJECTIVES: dict[str, dict[str, Any]] = {
    "hinge": {"kind": "dpo", "beta": 0.5, "loss": "hinge"},
    "robust": {"kind": "dpo", "loss": "robust", "label_smoothing": 0.1},
    "sigmoid-norm": {"kind": "dpo", "loss": "sigmoid-norm"},
    "apo-zero": {"kind": "dpo", "loss": "apo-zero"},
    "apo-down": {"kind": "dpo", "loss": "apo-down"},
    "nca": {"kind": "dpo", "loss": "nca"},
    "orpo": {"kind": "orpo", "lambda": 0.5, "nll_on": "full"},
    "cpo": {"kind": "cpo", "alpha": 0.7},
    "simpo": {"kind": "simpo"},
    "dpo": {"kind": "dpo", "beta": 0.5},
    "ipo": {"kind": "ipo", "log_probs": "token-mean"},
}
ONE_PACK, PACKS = 100_000, 300
KTO: dict[str, Any] = {"kind": "kto", "beta": 0.5, "undesirable_weight": 0.8}

ByTrl = Callable[[str], tuple[Trained, TrlTrainer]]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return make_artifact(tmp_path_factory.mktemp("prepared"), train=14, evaluation=4)


def config(
    storage: Path, engine: str, objective: dict[str, Any], budget: int = ONE_PACK, **sections: Any
) -> RunConfig:
    training = {
        "engine": engine,
        "max_steps": STEPS,
        "pairs_per_step": 6,
        "tokens_per_microbatch": budget,
        "eval_every": STEPS,
        "checkpoint_every": 2,
        "gradient_checkpointing": False,  # so that no memory is measured
        **sections.pop("training", {}),
    }
    adapter = {"dropout": 0.0, **sections.pop("adapter", {})}
    name = f"{objective['kind']}-{engine}"
    return run_config(
        storage, name, objective=objective, training=training, adapter=adapter, **sections
    )


def assert_same_run(ours: Trained, theirs: Trained) -> None:
    np.testing.assert_allclose(theirs.losses, ours.losses, rtol=LOSS)
    for name in ("train/grad_norm", "eval/margin", "eval/nll", "eval/chosen_logp"):
        one, other = (
            [line[name] for line in run.metrics if name in line] for run in (ours, theirs)
        )
        np.testing.assert_allclose(other, one, rtol=TENSOR, atol=LOSS)
    assert ours.adapter.keys() == theirs.adapter.keys()
    difference = sum(
        float((ours.adapter[n] - theirs.adapter[n]).square().sum()) for n in ours.adapter
    )
    assert (
        math.sqrt(difference / sum(float(t.square().sum()) for t in ours.adapter.values())) < TENSOR
    )


@pytest.fixture(scope="module")
def by_trl(artifact: Artifact, tmp_path_factory: pytest.TempPathFactory) -> ByTrl:
    """One run of an objective by TRL in one pack; each is made once."""

    @cache
    def run(objective: str) -> tuple[Trained, TrlTrainer]:
        engines: list[TrlTrainer] = []
        train = TrlTrainer.train
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(TrlTrainer, "train", lambda self: (engines.append(self), train(self)))
            settings = config(
                tmp_path_factory.mktemp(objective), "trl", {**OBJECTIVES, "kto": KTO}[objective]
            )
            return train_locally(settings, artifact), engines[0]

    return run


@pytest.mark.parametrize(
    "objective",
    # The other losses of dpo are compared in test_trl.py, and they run as sigmoid does.
    [
        pytest.param(name, marks=pytest.mark.long if "loss" in settings else ())
        for name, settings in OBJECTIVES.items()
    ],
)
def test_a_run_is_the_same_by_either_engine(
    objective: str, by_trl: ByTrl, artifact: Artifact, tmp_path: Path
) -> None:
    ours, (theirs, _) = (
        train_locally(config(tmp_path, "fast", OBJECTIVES[objective]), artifact),
        by_trl(objective),
    )
    assert (ours.result["layout"], theirs.result["layout"]) == ("shared-prefix", "padded")
    assert ours.losses[-1] != ours.losses[0]
    assert_same_run(ours, theirs)


@pytest.mark.parametrize("objective", ["simpo", "dpo", "ipo"])
def test_a_mean_over_pairs_does_not_depend_on_packs(
    objective: str, by_trl: ByTrl, artifact: Artifact, tmp_path: Path
) -> None:
    """An NLL term does depend on packs: TRL takes its mean over each micro-batch's tokens."""
    whole, _ = by_trl(objective)
    assert_same_run(
        whole, train_locally(config(tmp_path, "trl", OBJECTIVES[objective], PACKS), artifact)
    )


@pytest.mark.parametrize("objective", [*OBJECTIVES, "kto"])
def test_what_trl_would_log_is_not_kept_for_ever(objective: str, by_trl: ByTrl) -> None:
    inside = vars(by_trl(objective)[1]._inside)
    kept = [inside[name]["train"] for name in ("_metrics", "_stored_metrics") if name in inside]
    assert kept and not any(kept)


# --- KTO ------------------------------------------------------------------------------------------


def test_the_unpaired_view_by_hand() -> None:
    """Chosen answers come first.

    For the baseline, each row also has the answer of the row before it.
    """
    pairs = [
        TokenPair.of_answers(str(i), *(np.array(ids, dtype=np.int32) for ids in sides))
        for i, sides in enumerate([([1, 2], [3], [4, 5]), ([6], [7, 8], [9])])
    ]
    rows = to_unpaired_rows(pairs, None, pairs[0])
    assert [row["prompt_ids"] for row in rows] == [[1, 2], [6], [1, 2], [6]]
    assert [row["completion_ids"] for row in rows] == [[3], [7, 8], [4, 5], [9]]
    assert [row["label"] for row in rows] == [True, True, False, False]
    assert [row["KL_completion_ids"] for row in rows] == [[9], [3], [7, 8], [4, 5]]


def test_single_answers_by_hand() -> None:
    """One that is alone in its micro-batch is compared with another answer of the step."""
    good, bad, pair = (
        TokenPair.of_answers(name, *(np.array(ids, dtype=np.int32) for ids in sides))
        for name, *sides in (
            ("good", [1], [2, 3], []),
            ("bad", [4], [], [5]),
            ("pair", [6], [7], [8]),
        )
    )
    rows = to_unpaired_rows([good, bad, pair], None, bad)
    assert [row["completion_ids"] for row in rows] == [[2, 3], [7], [5], [8]]
    assert [row["label"] for row in rows] == [True, True, False, False]
    assert [row["KL_completion_ids"] for row in rows] == [[8], [2, 3], [7], [5]]
    [alone] = to_unpaired_rows([good], None, bad)
    assert (alone["completion_ids"], alone["KL_completion_ids"]) == ([2, 3], [5])


@pytest.mark.parametrize("budget", [ONE_PACK, 1])
def test_kto_trains_on_single_answers(budget: int, tmp_path: Path) -> None:
    """The first loss is known: every answer has the loss 1 - sigmoid(0), times its weight.

    A step of six has two pairs, three good answers and one bad one, in one pack or in six.
    """
    pairs = demo_pairs("train", 6)
    none = np.zeros(0, dtype=np.int32)

    def without(pair: TokenPair, side: str) -> TokenPair:
        sides = {"chosen": pair.chosen, "rejected": pair.rejected, side: none}
        return TokenPair.of_answers(f"{pair.pair_id}-{side}", pair.prompt, **sides)

    train = [
        *pairs[:2],
        *(without(pair, "rejected") for pair in pairs[2:5]),
        without(pairs[5], "chosen"),
    ]
    held_out = [
        without(pair, side) for pair in demo_pairs("h1", 6) for side in ("chosen", "rejected")
    ]
    artifact = write_pairs(tmp_path, train, held_out)
    trained = train_locally(config(tmp_path, "trl", KTO, budget), artifact)
    assert trained.losses[0] == pytest.approx(0.5 * (5 + 3 * 0.8) / 8, abs=1e-6)
    assert trained.losses[-1] < trained.losses[0]
    first, *_, last = (line for line in trained.metrics if "eval/margin" in line)
    assert last["eval/margin"] > first["eval/margin"]
    assert 0 <= last["eval/accuracy"] <= 1


@pytest.fixture(scope="module")
def sft(artifact: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_locally(
        config(tmp_path_factory.mktemp("sft"), "fast", {"kind": "sft"}), artifact
    ).run_dir


@pytest.mark.parametrize("start", ["fresh", "sft", "sft with an embedding"])
def test_kto_starts_from_implicit_rewards_of_zero_and_learns(
    start: str, by_trl: ByTrl, artifact: Artifact, sft: Path, tmp_path: Path
) -> None:
    """Each answer's loss is 1 - sigmoid(0), times its weight.

    The reference is the model from which the run starts.
    """
    adapter: dict[str, Any] = {"init_from": str(sft)} if start == "sft" else {}
    if start == "sft with an embedding":
        targets = {"targets": ["q_proj", "embed_tokens"]}
        begun = train_locally(
            config(tmp_path / "sft", "fast", {"kind": "sft"}, adapter=targets), artifact
        )
        adapter = {**targets, "init_from": str(begun.run_dir)}
    if start == "fresh":
        trained, _ = by_trl("kto")
    else:
        trained = train_locally(config(tmp_path, "trl", KTO, adapter=adapter), artifact)
    assert trained.losses[0] == pytest.approx(0.5 * (1 + 0.8) / 2, abs=1e-6)
    assert trained.losses[-1] < trained.losses[0] - 1e-3
    assert all("ref" not in name.split(".") for name in trained.adapter)
    state = load_file(trained.run_dir / "checkpoints" / f"step-{STEPS:06d}" / "state.safetensors")
    assert not [name for name in state if ".ref." in name]


def test_the_reference_of_kto_has_no_dropout() -> None:
    """The trained adapter has dropout, which changes its rewards; the reference has none."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    base = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=1, vocab_size=32))
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, lora_dropout=0.5, target_modules=["q_proj"])
    model = get_peft_model(base, lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    keep_start_as_reference(model)
    model.train()
    ids = torch.arange(1, 20)[None]
    assert not torch.equal(model(ids).logits, model(ids).logits)
    model.set_adapter("ref")
    reference = model(ids).logits
    assert torch.equal(reference, model(ids).logits)
    model.eval()
    model.set_adapter("default")
    torch.testing.assert_close(model(ids).logits, reference)


@pytest.fixture(scope="module")
def nameless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's base with a tokenizer that names no padding token, as many do not."""
    folder = tmp_path_factory.mktemp("nameless")
    shutil.copytree(BASE, folder, dirs_exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder).pad_token is None
    return folder


@pytest.mark.parametrize("objective", [OBJECTIVES["orpo"], OBJECTIVES["dpo"]], ids=["orpo", "dpo"])
def test_a_tokenizer_without_padding_is_not_given_any(
    objective: dict[str, Any], artifact: Artifact, nameless: Path, tmp_path: Path
) -> None:
    trained = train_locally(
        config(tmp_path, "trl", objective, model={"base": str(nameless)}), artifact
    )
    assert AutoTokenizer.from_pretrained(trained.run_dir / "adapter").pad_token is None


@pytest.mark.parametrize(
    ("objective", "instead"),
    [
        (OBJECTIVES["ipo"], "leave the head out, or set training.engine=fast"),
        (KTO, "leave the head out"),
    ],
    ids=["ipo", "kto"],
)
def test_an_adapted_head_is_refused_if_trl_would_leave_it_out(
    objective: dict[str, Any], instead: str, artifact: Artifact, tmp_path: Path
) -> None:
    adapted = config(tmp_path, "trl", objective, adapter={"targets": ["v_proj", "lm_head"]})
    message = (
        r"^adapter\.targets: TRL's DPO and KTO use the weight of the head without its adapter; "
        rf"{re.escape(instead)}$"
    )
    with pytest.raises(ConfigError, match=message):
        train_locally(adapted, artifact)


@pytest.mark.parametrize("objective", [OBJECTIVES["dpo"], KTO], ids=["dpo", "kto"])
def test_a_run_is_resumed_exactly(
    objective: dict[str, Any], artifact: Artifact, tmp_path: Path
) -> None:
    class PlannedError(Exception):
        pass

    def fail(step: int, total: int, metrics: Any) -> None:
        if step == 3 and "train/loss" in metrics:
            raise PlannedError

    whole = train_locally(
        config(tmp_path / "whole", "trl", objective, adapter={"dropout": 0.1}), artifact
    )
    broken = config(tmp_path / "broken", "trl", objective, adapter={"dropout": 0.1})
    with pytest.raises(PlannedError):
        train_locally(broken, artifact, fail)
    resumed = train_locally(broken, artifact)
    assert "resuming at step 2 of 4" in resumed.said
    assert resumed.losses == whole.losses
    for name in (
        "adapter/adapter_model.safetensors",
        f"checkpoints/step-{STEPS:06d}/state.safetensors",
    ):
        assert (resumed.run_dir / name).read_bytes() == (whole.run_dir / name).read_bytes()


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("objective", "engine", "sections", "complaint"),
    [
        (
            {"kind": "kto"},
            "fast",
            {},
            "objective.kind: kto is computed by TRL's trainer; set training.engine=trl",
        ),
        (
            {"kind": "sft"},
            "trl",
            {},
            "objective.kind: TRL has no trainer that computes sft on pairs",
        ),
        (
            {"kind": "orpo"},
            "trl",
            {},
            "objective.nll_on: TRL's ORPO takes the likelihood over prompt and response",
        ),
        (
            {"kind": "orpo", "nll_on": "full", "nll_weight": 0},
            "trl",
            {},
            "objective: TRL's ORPO has no nll_weight, and no such beta; set both to 1",
        ),
        ({"kind": "cpo", "nll_on": "full"}, "trl", {}, "objective.nll_on: TRL's CPO takes"),
        (
            {"kind": "ipo"},
            "trl",
            {},
            "objective.log_probs: TRL's IPO takes means over tokens; set token-mean",
        ),
        (
            {"kind": "dpo", "loss": "sigmoid-norm", "label_smoothing": 0.1},
            "trl",
            {},
            "with training.engine: trl, dpo takes no nll_weight",
        ),
        (
            {"kind": "dpo", "nll_weight": 0.1},
            "trl",
            {},
            "with training.engine: trl, dpo takes no nll_weight",
        ),
        (
            {"kind": "simpo"},
            "trl",
            {"training": {"layout": "packed"}},
            "training.layout: TRL's trainers pad; packed",
        ),
    ],
)
def test_what_trl_means_otherwise_is_refused(
    objective: dict[str, Any], engine: str, sections: dict[str, Any], complaint: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as raised:
        config(tmp_path, engine, objective, **sections)
    assert complaint in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1


def test_kto_of_a_whole_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"adapter\.kind: TRL's KTO compares with the base below the adapter"
    ):
        run_config(
            tmp_path,
            objective=KTO,
            training={"engine": "trl"},
            model={"quantization": "none"},
            adapter={"kind": "none", "r": 16, "alpha": 16},
        )
