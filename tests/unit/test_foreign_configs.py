"""Configs of TRL, LLaMA-Factory and Axolotl in our words: meaning is kept, no line is lost."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from orpo_ray.config import RunConfig, load_config
from orpo_ray.config.foreign import Draft, read_foreign
from orpo_ray.config.foreign.file import translated
from orpo_ray.config.foreign.recognise import AXOLOTL, LLAMA_FACTORY, TRL, project_of
from orpo_ray.config.foreign.written import as_yaml, tree_of
from orpo_ray.errors import ConfigError

FILES = {
    "axolotl_instruct-dpo-lora-8b.yml": AXOLOTL,
    "axolotl_mistral-qlora-orpo.yml": AXOLOTL,
    "axolotl_qlora-1b-kto.yaml": AXOLOTL,
    "handbook_constitutional-ai_dpo_config_anthropic.yaml": TRL,
    "handbook_pref_align_scan_dpo_config_openhermes.yaml": TRL,
    "handbook_smollm2_dpo_config.yaml": TRL,
    "handbook_smollm2_dpo_config_smol.yaml": TRL,
    "handbook_starchat2-15b_dpo_config_v0.1.yaml": TRL,
    "handbook_zephyr-141b-A35b_orpo_config_full.yaml": TRL,
    "handbook_zephyr-7b-beta_dpo_config_qlora.yaml": TRL,
    "handbook_zephyr-7b-gemma_dpo_config_full.yaml": TRL,
    "llamafactory_qwen3_lora_dpo.yaml": LLAMA_FACTORY,
    "llamafactory_qwen3_lora_kto.yaml": LLAMA_FACTORY,
}

TRL_FILE = """\
model_name_or_path: some/model
dataset_name: some/pairs
output_dir: out/second
per_device_train_batch_size: 2
gradient_accumulation_steps: 4
learning_rate: 5e-6
use_peft: true
"""
LLAMA_FACTORY_FILE = """\
model_name_or_path: some/model
stage: dpo
finetuning_type: lora
dataset: ONE
output_dir: saves/x
"""
AXOLOTL_FILE = """\
base_model: some/model
rl: dpo
adapter: lora
lora_r: 8
lora_target_linear: true
datasets: [{path: some/pairs, split: train_prefs, type: chatml.intel}]
micro_batch_size: 4
sequence_len: 1024
learning_rate: 2e-4
output_dir: ./out
"""


@pytest.fixture(scope="session")
def foreign_file(shared_data: Path) -> Callable[[str], Path]:
    folder = shared_data / "foreign_configs"
    if not folder.is_dir():
        pytest.skip(f"the other projects' configs are not on this machine ({folder})")
    return lambda name: folder / name


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., Draft]:
    """Translates a text, or one with some of its lines replaced."""

    def translate(text: str, stem: str = "file", **changes: Any) -> Draft:
        path = tmp_path / f"{stem}.yaml"
        path.write_text(yaml.safe_dump(yaml.safe_load(text) | changes), encoding="utf-8")
        draft = translated(path)
        written = tmp_path / "ours.yaml"
        written.write_text(as_yaml(draft, path.name), encoding="utf-8")
        load_config(written)
        return draft

    return translate


def config_of(draft: Draft) -> RunConfig:
    return load_config(tree_of(draft))


def said(draft: Draft, key: str) -> str:
    """The remarks above one of our settings."""
    return " | ".join(draft.remarks.get(key, ()))


# The thirteen files


@pytest.mark.parametrize(("name", "project"), FILES.items())
def test_a_file_comes_to_a_config_that_loads(
    foreign_file: Callable[[str], Path], tmp_path: Path, name: str, project: str
) -> None:
    draft = translated(foreign_file(name))
    assert draft.project == project
    written = tmp_path / "run.yaml"
    written.write_text(as_yaml(draft, name), encoding="utf-8")
    assert load_config(written) == config_of(draft)
    assert max(len(line) for line in written.read_text(encoding="utf-8").splitlines()) <= 100


@pytest.mark.parametrize("name", FILES)
def test_no_line_of_a_file_is_lost(foreign_file: Callable[[str], Path], name: str) -> None:
    draft = translated(foreign_file(name))
    comments = [line for line in as_yaml(draft, name).splitlines() if line.lstrip().startswith("#")]
    told = " ".join(" ".join(line.lstrip(" #") for line in comments).split())
    keys = yaml.safe_load(foreign_file(name).read_text(encoding="utf-8"))
    for key in keys:
        if key in draft.lacking:
            assert f"{key}: " in told and draft.lacking[key] in told
        elif key in draft.unset:
            assert key in told
        else:
            assert key in draft.translated
    assert not set(draft.lacking) & DECIDING
    assert "orpo_ray has no such setting" not in told, "each of these keys has an answer of its own"


DECIDING = {
    *("model_name_or_path", "base_model", "use_peft", "adapter", "load_in_4bit", "load_in_8bit"),
    *("lora_r", "lora_rank", "lora_alpha", "lora_dropout", "lora_target", "lora_target_modules"),
    *("beta", "rl_beta", "pref_beta", "orpo_alpha", "loss_type", "pref_loss", "stage", "rl"),
    *(
        "max_length",
        "max_prompt_length",
        "cutoff_len",
        "sequence_len",
        "dataset_mixture",
        "datasets",
    ),
    *("dataset", "dataset_mixer", "dataset_name", "learning_rate", "warmup_ratio", "warmup_steps"),
    *("per_device_train_batch_size", "micro_batch_size", "gradient_accumulation_steps", "optim"),
    *("optimizer", "lr_scheduler", "lr_scheduler_type", "num_epochs", "num_train_epochs", "bf16"),
    *(
        "chat_template",
        "template",
        "output_dir",
        "save_steps",
        "eval_steps",
        "kto_desirable_weight",
    ),
}
"""Keys that decide what a run computes, and are never left out."""


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "axolotl_mistral-qlora-orpo.yml",
            {
                "name": "mistral-qlora-orpo-out",
                "model.base": "mistralai/Mistral-7B-v0.1",
                "model.quantization": "nf4",
                "model.chat_template": "chatml",
                "adapter.r": 32,
                "adapter.alpha": 16,
                "adapter.dropout": 0,
                "adapter.targets": "all-linear",
                "objective.kind": "orpo",
                "objective.lambda": 0.1,
                "objective.nll_on": "full",
                "data.eval_fraction": 0.1,
                "data.max_length": 4096,
                "training.pairs_per_step": 8,
                "training.optimizer": "adamw-8bit",
                "training.eval_every": 0.25,
                "training.checkpoint_every": 1.0,
            },
        ),
        (
            "axolotl_instruct-dpo-lora-8b.yml",
            {
                "model.quantization": "int8",
                "model.chat_template": "llama3",
                "objective.kind": "dpo",
                "data.columns": {
                    "prompt": "conversation",
                    "chosen": "chosen",
                    "rejected": "rejected",
                },
                "training.epochs": 4,
                "training.eval_every": 0.0625,
            },
        ),
        (
            "axolotl_qlora-1b-kto.yaml",
            {
                "objective.kind": "kto",
                "objective.beta": 0.5,
                "objective.desirable_weight": 0.2,
                "training.engine": "trl",
                "training.pairs_per_step": 2,
            },
        ),
        (
            "handbook_zephyr-141b-A35b_orpo_config_full.yaml",
            {
                "objective.kind": "orpo",
                "objective.lambda": 0.05,
                "objective.nll_on": "full",
                "adapter.kind": "none",
                "model.quantization": "none",
                "data.max_prompt_length": 1792,
                "training.warmup": 100,
                "training.schedule": "linear",
                "training.trackers": ["wandb"],
            },
        ),
        (
            "handbook_zephyr-7b-beta_dpo_config_qlora.yaml",
            {
                "model.quantization": "nf4",
                "adapter.r": 128,
                "data.train": [
                    {"source": "HuggingFaceH4/ultrafeedback_binarized", "split": "train_prefs"}
                ],
                "data.eval": [
                    {"source": "HuggingFaceH4/ultrafeedback_binarized", "split": "test_prefs"}
                ],
                "training.pairs_per_step": 16,
                "training.checkpoint_every": 100,
                "training.keep": 1,
            },
        ),
        (
            "llamafactory_qwen3_lora_dpo.yaml",
            {
                "name": "dpo",
                "storage": "saves/qwen3-4b/lora",
                "adapter.r": 8,
                "adapter.alpha": 16,
                "objective.kind": "dpo",
                "data.train": [{"source": "data/dpo_en_demo.json", "limit": 1000}],
                "training.pairs_per_step": 8,
                "training.epochs": 3,
            },
        ),
        (
            "llamafactory_qwen3_lora_kto.yaml",
            {"objective.kind": "kto", "training.pairs_per_step": 8},
        ),
    ],
)
def test_the_settings_of_a_file_are_kept(
    foreign_file: Callable[[str], Path], name: str, expected: dict[str, Any]
) -> None:
    settings = translated(foreign_file(name)).settings
    assert {key: settings.get(key) for key in expected} == expected


# Methods and their weights


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ({"output_dir": "x/orpo", "beta": 0.2}, {"kind": "orpo", "lambda": 0.2, "nll_on": "full"}),
        ({"loss_type": "sigmoid", "beta": 0.3}, {"kind": "dpo", "beta": 0.3}),
        ({"loss_type": "hinge"}, {"kind": "dpo", "beta": 0.1, "loss": "hinge"}),
        ({"loss_type": "apo_down"}, {"kind": "dpo", "beta": 0.1, "loss": "apo-down"}),
        ({"loss_type": "nca_pair"}, {"kind": "dpo", "beta": 0.1, "loss": "nca"}),
        (
            {"loss_type": "sigmoid_norm", "beta": 5},
            {"kind": "dpo", "beta": 5, "loss": "sigmoid-norm"},
        ),
        (
            {"loss_type": "robust", "label_smoothing": 0.1},
            {"kind": "dpo", "beta": 0.1, "loss": "robust", "label_smoothing": 0.1},
        ),
        ({"loss_type": "ipo"}, {"kind": "ipo", "beta": 0.1, "log_probs": "token-mean"}),
        ({"beta": 0.1, "rpo_alpha": 1.0}, {"kind": "dpo", "beta": 0.1, "nll_weight": 1}),
        (
            {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2]},
            {"kind": "dpo", "beta": 0.1, "nll_weight": 0.2},
        ),
        (
            {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 0.0},
            {"kind": "simpo", "beta": 2, "gamma_beta_ratio": 0.5},
        ),
        (
            {"beta": 10, "gamma_beta_ratio": 0.3},
            {"kind": "simpo", "beta": 10, "gamma_beta_ratio": 0.3},
        ),
        ({"cpo_alpha": 0.5}, {"kind": "cpo", "beta": 0.1, "alpha": 0.5}),
        (
            {"desirable_weight": 1.5},
            {"kind": "kto", "beta": 0.1, "desirable_weight": 1.5, "undesirable_weight": 1},
        ),
        ({}, {"kind": "sft", "nll_on": "response"}),
    ],
)
def test_a_method_of_trl_keeps_its_weights(
    read: Callable[..., Draft], lines: dict[str, Any], expected: dict[str, Any]
) -> None:
    assert tree_of(read(TRL_FILE, **lines))["objective"] == expected


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (
            {"pref_loss": "orpo", "pref_beta": 0.2},
            {"kind": "orpo", "lambda": 0.2, "nll_on": "response"},
        ),
        ({"pref_loss": "ipo"}, {"kind": "ipo", "beta": 0.1, "log_probs": "token-mean"}),
        ({"pref_ftx": 0.5}, {"kind": "dpo", "beta": 0.1, "nll_weight": 0.5}),
        (
            {"pref_loss": "simpo", "pref_beta": 2.0, "simpo_gamma": 1.0},
            {"kind": "simpo", "beta": 2, "gamma_beta_ratio": 0.5},
        ),
        ({"stage": "sft"}, {"kind": "sft", "nll_on": "response"}),
    ],
)
def test_a_method_of_llamafactory_keeps_its_weights(
    read: Callable[..., Draft], lines: dict[str, Any], expected: dict[str, Any]
) -> None:
    assert tree_of(read(LLAMA_FACTORY_FILE, **lines))["objective"] == expected


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ({"rl": "orpo", "orpo_alpha": 0.3}, {"kind": "orpo", "lambda": 0.3, "nll_on": "full"}),
        ({"rl": "orpo", "rl_beta": 0.4}, {"kind": "orpo", "lambda": 0.4, "nll_on": "full"}),
        ({"rl": "dpo", "trl": {"beta": 0.2}}, {"kind": "dpo", "beta": 0.2}),
        ({"rl": "ipo"}, {"kind": "ipo", "beta": 0.1, "log_probs": "token-mean"}),
        (
            {"rl": "simpo", "rl_beta": 2.0, "simpo_gamma": 0.5},
            {"kind": "simpo", "beta": 2, "gamma_beta_ratio": 0.25},
        ),
        ({"rl": None}, {"kind": "sft", "nll_on": "response"}),
    ],
)
def test_a_method_of_axolotl_keeps_its_weights(
    read: Callable[..., Draft], lines: dict[str, Any], expected: dict[str, Any]
) -> None:
    assert tree_of(read(AXOLOTL_FILE, **lines))["objective"] == expected


@pytest.mark.parametrize(
    ("text", "lines", "train_on"),
    [
        (LLAMA_FACTORY_FILE, {"stage": "sft"}, "all-assistant"),
        (LLAMA_FACTORY_FILE, {"stage": "sft", "mask_history": True}, "last"),
        (LLAMA_FACTORY_FILE, {"stage": "sft", "train_on_prompt": True}, "last"),
        (LLAMA_FACTORY_FILE, {}, "last"),
        (AXOLOTL_FILE, {"rl": None}, "all-assistant"),
        (AXOLOTL_FILE, {"rl": None, "train_on_inputs": True}, "last"),
        (AXOLOTL_FILE, {}, "last"),
    ],
)
def test_the_turns_that_supervised_training_covers_are_kept(
    read: Callable[..., Draft], text: str, lines: dict[str, Any], train_on: str
) -> None:
    draft = read(text, **lines)
    assert config_of(draft).data.train_on == train_on
    assert bool(said(draft, "data.train_on")) == (train_on == "all-assistant")
    assert "mask_history" not in draft.lacking


def test_what_the_likelihood_of_a_loss_runs_over_is_said(read: Callable[..., Draft]) -> None:
    draft = read(TRL_FILE, output_dir="x/orpo", beta=0.1)
    assert "over prompt and response" in said(draft, "objective.nll_on")
    assert "cpo_alpha: 1: TRL adds" in said(read(AXOLOTL_FILE, rl="simpo"), "objective.kind")


def test_a_loss_that_is_not_here_is_never_replaced_in_silence(read: Callable[..., Draft]) -> None:
    for losses, told in [
        ("exo_pair", "exo_pair is not here"),
        (["sigmoid", "bco_pair", "sft"], "bco_pair"),
    ]:
        draft = read(TRL_FILE, loss_type=losses)
        assert told in said(draft, "objective.kind") + said(draft, "objective.loss")
    draft = read(TRL_FILE, desirable_weight=1.0, loss_type="apo_zero_unpaired")
    assert "apo_zero_unpaired" in said(draft, "objective.kind")
    assert "max_tokens: not here" in said(
        read(AXOLOTL_FILE, trl={"beta": 0.1, "max_tokens": 1}), "objective.kind"
    )


def test_how_the_method_was_found_out_is_said(read: Callable[..., Draft]) -> None:
    assert "output_dir says orpo" in said(read(TRL_FILE, output_dir="x/orpo"), "objective.kind")
    assert "its name says kto" in said(read(TRL_FILE, stem="my-kto"), "objective.kind")
    assert read(TRL_FILE, output_dir="runs/sft-then-dpo").settings["objective.kind"] == "dpo"
    assert read(TRL_FILE, output_dir="runs/from-sft", beta=0.1).settings["objective.kind"] == "dpo"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (LLAMA_FACTORY_FILE, {"stage": "ppo"}),
        (LLAMA_FACTORY_FILE, {"stage": "rm"}),
        (AXOLOTL_FILE, {"rl": "grpo"}),
    ],
)
def test_a_method_that_is_not_here_is_refused(
    read: Callable[..., Draft], text: str, line: dict[str, str]
) -> None:
    ((key, value),) = line.items()
    with pytest.raises(
        ConfigError, match=rf"file\.yaml: {key}: {value}: orpo_ray trains orpo, dpo"
    ):
        read(text, **line)


# Model and adapter


@pytest.mark.parametrize(
    ("text", "lines", "expected"),
    [
        (TRL_FILE, {"use_peft": False}, ("none", "none")),
        (TRL_FILE, {"load_in_4bit": True}, ("lora", "nf4")),
        (TRL_FILE, {"load_in_8bit": True}, ("lora", "int8")),
        (TRL_FILE, {}, ("lora", "none")),
        (LLAMA_FACTORY_FILE, {"finetuning_type": "full"}, ("none", "none")),
        (LLAMA_FACTORY_FILE, {"quantization_bit": 4}, ("lora", "nf4")),
        (LLAMA_FACTORY_FILE, {"quantization_bit": 8}, ("lora", "int8")),
        (AXOLOTL_FILE, {"adapter": None}, ("none", "none")),
        (AXOLOTL_FILE, {"adapter": "qlora", "load_in_4bit": True}, ("lora", "nf4")),
        (AXOLOTL_FILE, {"load_in_8bit": True}, ("lora", "int8")),
    ],
)
def test_what_is_trained_and_how_the_base_is_held(
    read: Callable[..., Draft], text: str, lines: dict[str, Any], expected: tuple[str, str]
) -> None:
    config = config_of(read(text, **lines))
    assert (config.adapter.kind, config.model.quantization) == expected


@pytest.mark.parametrize(
    ("text", "lines", "targets"),
    [
        (TRL_FILE, {"lora_target_modules": ["q_proj", "v_proj"]}, ("q_proj", "v_proj")),
        (TRL_FILE, {"lora_target_modules": "all-linear"}, "all-linear"),
        (TRL_FILE, {"lora_target_modules": "q_proj"}, ("q_proj",)),
        (LLAMA_FACTORY_FILE, {"lora_target": "all"}, "all-linear"),
        (LLAMA_FACTORY_FILE, {"lora_target": "q_proj, v_proj"}, ("q_proj", "v_proj")),
        (AXOLOTL_FILE, {"lora_target_modules": ["q_proj"]}, "all-linear"),
        (
            AXOLOTL_FILE,
            {"lora_target_linear": False, "lora_target_modules": ["q_proj"]},
            ("q_proj",),
        ),
    ],
)
def test_the_layers_that_lora_adapts(
    read: Callable[..., Draft], text: str, lines: dict[str, Any], targets: Any
) -> None:
    assert config_of(read(text, **lines)).adapter.targets == targets


def test_peft_s_own_choice_of_layers_is_not_kept_in_silence(read: Callable[..., Draft]) -> None:
    assert "q_proj and v_proj alone" in said(read(TRL_FILE), "adapter.targets")


@pytest.mark.parametrize(
    ("text", "data"),
    [
        (TRL_FILE, {"dataset_name": "mine/a.csv"}),
        (TRL_FILE, {"dataset_name": "mine/a.csv", "dataset_train_split": "x"}),
        (TRL_FILE, {"dataset_mixer": {"mine/a.csv": 1.0}}),
        (TRL_FILE, {"datasets": [{"path": "json", "data_files": "mine/a.csv", "split": "x"}]}),
        (AXOLOTL_FILE, {"datasets": [{"path": "mine/a.csv", "split": "train[:10%]"}]}),
    ],
)
def test_a_file_is_read_whole_and_a_share_of_it_is_held_out(
    read: Callable[..., Draft], text: str, data: dict[str, Any]
) -> None:
    draft = read(text, eval_strategy="steps", **data)
    assert draft.settings["data.train"] == [{"source": "mine/a.csv"}]
    assert "data.eval" not in draft.settings and "data.eval_fraction" in draft.settings
    if any(split in str(data) for split in ("'x'", "10%")):
        assert "a file is read whole here" in said(draft, "data.train")


@pytest.mark.parametrize("datasets", [5, [5], ["name"]])
def test_datasets_that_are_no_sections_are_refused(
    read: Callable[..., Draft], datasets: Any
) -> None:
    with pytest.raises(ConfigError, match="datasets: must be a list of datasets"):
        read(TRL_FILE, datasets=datasets)


def test_what_lora_would_be_without_peft_is_listed(read: Callable[..., Draft]) -> None:
    draft = read(TRL_FILE, use_peft=False, lora_r=64)
    assert draft.lacking["lora_r"] == "has no effect there without use_peft"


def test_a_quantised_base_without_an_adapter_is_not_trained_in_silence(
    read: Callable[..., Draft],
) -> None:
    draft = read(TRL_FILE, use_peft=False, load_in_4bit=True)
    assert draft.settings["model.quantization"] == "none"
    assert "load_in_4bit: quantised weights" in said(draft, "model.quantization")


def test_a_rank_stabilised_scale_is_kept(read: Callable[..., Draft]) -> None:
    adapter = config_of(read(TRL_FILE, lora_r=64, lora_alpha=16, use_rslora=True)).adapter
    assert (adapter.alpha, adapter.r, adapter.rslora) == (16, 64, True)


@pytest.mark.parametrize(
    ("lines", "init", "is_told"),
    [
        ({"init_lora_weights": "pissa_niter_4"}, "pissa", False),
        ({"init_lora_weights": "olora"}, "olora", False),
        ({"init_lora_weights": "eva", "load_in_4bit": True}, "eva", False),
        ({"init_lora_weights": "loftq", "load_in_4bit": True}, "loftq", False),
        ({"init_lora_weights": "loftq"}, "default", True),
        ({"init_lora_weights": "pissa", "load_in_4bit": True}, "default", True),
        ({"init_lora_weights": "corda"}, "default", True),
        ({"init_lora_weights": True}, "default", False),
    ],
)
def test_the_start_of_an_adapter_is_kept_or_its_loss_is_told(
    read: Callable[..., Draft], lines: dict[str, Any], init: str, is_told: bool
) -> None:
    draft = read(TRL_FILE, **{"load_in_4bit": False, "lora_dropout": 0.1, **lines})
    adapter = config_of(draft).adapter
    assert adapter.init == init
    assert (f"the start {lines['init_lora_weights']}" in said(draft, "adapter.kind")) == is_told
    assert (adapter.dropout == 0) == (init in ("pissa", "olora"))


def test_lora_plus_is_kept(read: Callable[..., Draft]) -> None:
    assert config_of(read(TRL_FILE, loraplus_lr_ratio=16)).adapter.lora_plus_ratio == 16
    draft = read(TRL_FILE, loraplus_lr_ratio=0.5)
    assert config_of(draft).adapter.lora_plus_ratio is None
    assert "loraplus_lr_ratio: 0.5: not here" in said(draft, "adapter.kind")


def test_galore_is_kept_with_its_settings(read: Callable[..., Draft]) -> None:
    lines = {
        "use_peft": False,
        "optim": "galore_adamw",
        "optim_args": "rank=64, update_proj_gap=100, scale=0.10",
        "optim_target_modules": ["attn", "mlp"],
        "weight_decay": 0.1,
    }
    draft = read(TRL_FILE, **lines)
    training = config_of(draft).training
    assert (training.optimizer, training.weight_decay) == ("galore-adamw", 0)
    assert training.galore.model_dump() == {"rank": 64, "update_every": 100, "scale": 0.1}
    assert "every linear layer of the body" in said(draft, "training.optimizer")
    assert "transformers leaves it out" in said(draft, "training.weight_decay")
    with_adapter = read(TRL_FILE, optim="galore_adamw")
    assert config_of(with_adapter).training.optimizer == "adamw"
    assert "GaLore trains whole weights here" in said(with_adapter, "training.optimizer")


def test_galore_of_llama_factory_has_its_own_defaults(read: Callable[..., Draft]) -> None:
    lines = {"finetuning_type": "full", "use_galore": True, "galore_rank": 32}
    training = config_of(read(LLAMA_FACTORY_FILE, **lines)).training
    assert training.optimizer == "galore-adamw"
    assert training.galore.model_dump() == {"rank": 32, "update_every": 200, "scale": 2.0}
    started = read(LLAMA_FACTORY_FILE, pissa_init=True, loraplus_lr_ratio=16)
    adapter = config_of(started).adapter
    assert (adapter.init, adapter.lora_plus_ratio) == ("pissa", 16)


def test_schedule_free_has_no_other_schedule(read: Callable[..., Draft]) -> None:
    training = config_of(read(TRL_FILE, optim="schedule_free_adamw")).training
    assert (training.optimizer, training.schedule) == ("schedule-free-adamw", "constant")


def test_dropout_is_what_the_trainer_uses(read: Callable[..., Draft]) -> None:
    """TRL's preference trainers switch it off in the wrapped model, LoRA's too."""
    on, off = {"lora_dropout": 0.1, "beta": 0.1}, {"disable_dropout": False}
    assert read(TRL_FILE, **on).settings["adapter.dropout"] == 0
    assert read(TRL_FILE, **on, **off).settings["adapter.dropout"] == 0.1
    assert read(TRL_FILE, lora_dropout=0.1).settings["adapter.dropout"] == 0.1, "SFT keeps it"


@pytest.mark.parametrize(
    ("lines", "dtype"),
    [
        ({"bf16": True, "torch_dtype": None}, "bfloat16"),
        ({"fp16": True}, "float16"),
        ({"torch_dtype": "float32"}, "float32"),
        ({"bf16": "auto"}, "auto"),
    ],
)
def test_the_number_format(read: Callable[..., Draft], lines: dict[str, Any], dtype: str) -> None:
    assert config_of(read(TRL_FILE, **lines)).model.dtype == dtype


@pytest.mark.parametrize(
    ("text", "lines", "template", "remark"),
    [
        (AXOLOTL_FILE, {"chat_template": "chatml"}, "chatml", ""),
        (AXOLOTL_FILE, {"chat_template": "tokenizer_default"}, None, "the base's own"),
        (AXOLOTL_FILE, {"chat_template": "alpaca"}, None, "no template here has this name"),
        (LLAMA_FACTORY_FILE, {"template": "llama3"}, "llama3", ""),
        (TRL_FILE, {"chat_template": "{% for m in messages %}{% endfor %}"}, None, "save it"),
    ],
)
def test_templates(
    read: Callable[..., Draft], text: str, lines: dict[str, Any], template: str | None, remark: str
) -> None:
    draft = read(text, **lines)
    assert draft.settings.get("model.chat_template") == template
    assert remark in said(draft, "model.chat_template")


# Training


def test_the_batch_is_global(read: Callable[..., Draft]) -> None:
    draft = read(TRL_FILE)
    assert draft.settings["training.pairs_per_step"] == 8
    assert "multiply by the number of GPUs" in said(draft, "training.pairs_per_step")
    draft = read(LLAMA_FACTORY_FILE, per_device_train_batch_size=2, ray_num_workers=4)
    assert draft.settings["training.pairs_per_step"] == 8
    assert "x 4 GPUs" in said(draft, "training.pairs_per_step")
    assert read(AXOLOTL_FILE, batch_size=32).settings["training.pairs_per_step"] == 32


@pytest.mark.parametrize(
    ("written", "ours", "is_told"),
    [
        ("cosine", "cosine", False),
        ("linear", "linear", False),
        ("constant_with_warmup", "constant", False),
        ("cosine_with_min_lr", "cosine", True),
        ("cosine_with_restarts", "cosine", True),
        ("polynomial", "linear", True),
        ("warmup_stable_decay", "constant", True),
        ("something_new", "cosine", True),
    ],
)
def test_a_schedule_that_is_not_here_is_never_replaced_in_silence(
    read: Callable[..., Draft], written: str, ours: str, is_told: bool
) -> None:
    draft = read(TRL_FILE, lr_scheduler_type=written)
    assert draft.settings["training.schedule"] == ours
    assert (written in said(draft, "training.schedule")) == is_told


@pytest.mark.parametrize(
    ("written", "ours", "is_told"),
    [
        ("adamw_torch", "adamw", False),
        ("adamw_torch_fused", "adamw", False),
        ("adamw_bnb_8bit", "adamw-8bit", False),
        ("paged_adamw_8bit", "paged-adamw-8bit", False),
        ("paged_adamw_32bit", "paged-adamw", False),
        ("lion_8bit", "lion-8bit", True),
        ("paged_ademamix_8bit", "paged-ademamix-8bit", True),
        ("grokadamw", "adamw", True),
        ("rmsprop", "adamw", True),
    ],
)
def test_an_optimizer_that_is_not_here_is_never_replaced_in_silence(
    read: Callable[..., Draft], written: str, ours: str, is_told: bool
) -> None:
    draft = read(TRL_FILE, optim=written)
    assert draft.settings["training.optimizer"] == ours
    assert (written in said(draft, "training.optimizer")) == is_told


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ({"save_steps": 500}, 500),
        ({"save_steps": 0.25}, 0.25),
        ({"save_strategy": "epoch", "num_train_epochs": 4}, 0.25),
        ({"save_strategy": False}, 0.1),
    ],
)
def test_checkpoints(read: Callable[..., Draft], lines: dict[str, Any], expected: float) -> None:
    every = config_of(read(TRL_FILE, **lines)).training.checkpoint_every
    assert (every, type(every)) == (expected, type(expected))


def test_the_best_checkpoint(read: Callable[..., Draft]) -> None:
    training = config_of(read(TRL_FILE, load_best_model_at_end=True, save_total_limit=1)).training
    assert (training.adapter_from, training.keep) == ("best", 2)


def test_steps_win_over_epochs_and_over_a_ratio_of_warmup(read: Callable[..., Draft]) -> None:
    lines = {"num_train_epochs": 3, "max_steps": 100, "warmup_ratio": 0.1, "warmup_steps": 10}
    training = config_of(read(TRL_FILE, **lines)).training
    assert (training.epochs, training.max_steps, training.warmup) == (None, 100, 10)
    assert config_of(read(TRL_FILE, max_steps=-1)).training.epochs == 3


def test_what_is_not_set_is_their_default_and_said_to_be(read: Callable[..., Draft]) -> None:
    draft = read("model_name_or_path: m\ndataset_name: d/p\nuse_peft: true\nbeta: 0.1\n")
    assert draft.settings["training.learning_rate"] == 1e-6
    assert draft.settings["training.schedule"] == "linear"
    assert draft.settings["training.epochs"] == 3
    assert "this is the default of TRL" in said(draft, "training.learning_rate")
    assert (draft.settings["adapter.alpha"], draft.settings["data.max_length"]) == (32, 1024)


@pytest.mark.parametrize(
    ("lines", "deepspeed"),
    [
        ({"deepspeed": "examples/deepspeed/ds_z3_config.json"}, {"stage": 3}),
        ({"deepspeed": "deepspeed_configs/zero2.json"}, {"stage": 2}),
        ({"deepspeed": {"zero_optimization": {"stage": 1}}}, {"stage": 1}),
        ({"deepspeed": "mine.json"}, "auto"),
        ({"deepspeed": "zero2.json", "optim": "adamw_bnb_8bit"}, "auto"),
    ],
)
def test_the_stage_of_deepspeed(
    read: Callable[..., Draft], lines: dict[str, Any], deepspeed: Any
) -> None:
    assert read(TRL_FILE, **lines).settings["scale.deepspeed"] == deepspeed


# Data


@pytest.mark.parametrize(
    ("text", "lines", "sources"),
    [
        (TRL_FILE, {"dataset_train_split": "train_prefs"}, ["some/pairs:train_prefs"]),
        (
            TRL_FILE,
            {
                "dataset_name": None,
                "dataset_mixer": {"a/b": 0.5, "c/d": 1},
                "dataset_splits": ["train", "test"],
            },
            ["a/b x0.5", "c/d"],
        ),
        (
            TRL_FILE,
            {
                "dataset_name": None,
                "datasets": [{"path": "json", "data_files": "mine.jsonl"}, {"path": "a/b"}],
            },
            ["mine.jsonl", "a/b"],
        ),
        (
            LLAMA_FACTORY_FILE,
            {"dataset": "one,two", "dataset_dir": "sets"},
            ["sets/one.json", "sets/two.json"],
        ),
        (LLAMA_FACTORY_FILE, {"dataset": "a/b", "dataset_dir": "ONLINE"}, ["a/b"]),
        (
            AXOLOTL_FILE,
            {
                "datasets": [
                    {"path": "mine.jsonl", "ds_type": "json"},
                    {"path": "a/b", "data_files": ["x.parquet"]},
                ]
            },
            ["mine.jsonl", "hf://datasets/a/b/x.parquet"],
        ),
    ],
)
def test_where_the_pairs_come_from(
    read: Callable[..., Draft], text: str, lines: dict[str, Any], sources: list[str]
) -> None:
    train = config_of(read(text, **lines)).data.train
    splits = ["" if source.split == "train" else f":{source.split}" for source in train]
    weights = ["" if source.weight == 1 else f" x{source.weight}" for source in train]
    assert [
        s.source + split + weight for s, split, weight in zip(train, splits, weights, strict=True)
    ] == sources


def test_a_dataset_may_be_a_name_alone(read: Callable[..., Draft]) -> None:
    assert read(AXOLOTL_FILE, datasets=["a/b"]).settings["data.train"] == [{"source": "a/b"}]


def test_what_is_evaluated_on(read: Callable[..., Draft]) -> None:
    data = config_of(read(TRL_FILE, eval_strategy="steps", eval_steps=50)).data
    assert [(source.source, source.split) for source in data.eval] == [("some/pairs", "test")]
    assert config_of(read(TRL_FILE)).data.eval == ()
    assert config_of(read(LLAMA_FACTORY_FILE, val_size=0.2)).data.eval_fraction == 0.2
    draft = read(AXOLOTL_FILE, val_set_size=500)
    assert "write 500 / the number of pairs" in said(draft, "data.eval_fraction")


def test_lengths(read: Callable[..., Draft]) -> None:
    data = config_of(read(TRL_FILE, max_length=512, max_prompt_length=128)).data
    assert (data.max_length, data.max_prompt_length, data.overlong) == (
        512,
        128,
        "truncate-prompt-left",
    )
    data = config_of(read(AXOLOTL_FILE, sequence_len=512)).data
    assert (data.max_length, data.overlong) == (512, "drop")
    draft = read(TRL_FILE, max_length=256, max_prompt_length=512)
    assert "leaves no room for an answer" in said(draft, "data.max_length")


# Which project, and mistakes


@pytest.mark.parametrize(
    ("text", "project"),
    [
        (TRL_FILE, TRL),
        (LLAMA_FACTORY_FILE, LLAMA_FACTORY),
        (AXOLOTL_FILE, AXOLOTL),
        (
            "name: a\nmodel: {base: m}\noutput_dir: x\nstage: dpo\ncutoff_len: 8\n",
            None,
        ),
        ("name: a\nlearning_rate: 1\n", None),
        ("{}", None),
    ],
)
def test_a_project_is_told_by_its_keys(text: str, project: str | None) -> None:
    assert project_of(yaml.safe_load(text)) == project


@pytest.mark.parametrize("text", [TRL_FILE, LLAMA_FACTORY_FILE, AXOLOTL_FILE])
def test_a_foreign_config_is_refused_with_what_to_do(tmp_path: Path, text: str) -> None:
    path = tmp_path / "theirs.yaml"
    path.write_text(text, encoding="utf-8")
    project = project_of(yaml.safe_load(text))
    says = f"{path}: looks like a config of {project}; write ours with: "
    says += f"orpo-ray config from {path} > run.yaml"
    with pytest.raises(ConfigError) as caught:
        load_config(path, ["name=second"])
    assert str(caught.value) == says


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: 1\n", "its keys are not those of a TRL, LLaMA-Factory or Axolotl config"),
        (TRL_FILE + "lora_r: many\n", "lora_r: must be a number, not 'many'"),
        (TRL_FILE.replace("5e-6", "-1"), "training.learning_rate: must be greater than 0, not -1"),
        (AXOLOTL_FILE + "rl_beta: 0\n", "objective.beta: must be greater than 0, not 0"),
        ("- a\n", "1: a config is a YAML mapping of sections such as model, data and training"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "theirs.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        translated(path)
    assert str(caught.value).removeprefix(f"{path}:").strip() == says


def test_nothing_is_set_where_a_key_stands_alone(read: Callable[..., Draft]) -> None:
    draft = read(AXOLOTL_FILE, wandb_entity=None, special_tokens={})
    assert draft.unset == ["special_tokens", "wandb_entity"]
    assert "special_tokens, wandb_entity: nothing is set there" in as_yaml(draft, "x.yaml")


def test_an_unknown_key_of_theirs_is_kept_as_a_comment() -> None:
    draft = read_foreign(yaml.safe_load(AXOLOTL_FILE) | {"brand_new": 3}, "x")
    assert draft is not None
    assert "# brand_new: 3: orpo_ray has no such setting" in as_yaml(draft, "x.yaml")
