"""What `export` writes, loaded by plain transformers, answers as the trained model does."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from support import BASE, DEMO, random_base, settings
from transformers import AutoModelForCausalLM, AutoTokenizer

import orpo_ray
from orpo_ray.config import RunConfig, build
from orpo_ray.errors import ConfigError, ResourceError, RunError
from orpo_ray.evaluation import exporting, methods
from orpo_ray.models import merge, placement
from orpo_ray.runs.console import SILENT
from orpo_ray.runs.run import Run

PLAIN = {"quantization": "none"}
FULL: dict[str, Any] = {"model": PLAIN, "adapter": {"kind": "none"}}
EXACT = 2e-5
"""Difference per token between two sums of 32-bit numbers in another order."""
BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "tied": ("llama", {"tie_word_embeddings": True}),
    "untied": ("qwen3", {"tie_word_embeddings": False, "head_dim": 8}),
    "padded": ("llama", {"padded": 37}),
    "experts": ("mixtral", {"num_local_experts": 2}),
    "turned": ("gpt2", {}),
}
KINDS: dict[str, tuple[str | None, dict[str, Any]]] = {
    "nf4": (None, {}),
    "int8": (None, {"model": {"quantization": "int8"}}),
    "dora": (None, {"adapter": {"dora": True}}),
    "full": (None, FULL),
    **{name: (name, {"model": PLAIN}) for name in BASES},
    "padded-nf4": ("padded", {}),
    "turned-nf4": ("turned", {}),
    "turned-int8": ("turned", {"model": {"quantization": "int8"}}),
    "experts-nf4": ("experts", {}),
}


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def short(storage: Path, name: str, rate: float = 0.01, **sections: Any) -> RunConfig:
    """A run that changes its model a lot in a few steps, unless its rate is low."""
    training = {
        "max_steps": 4,
        "pairs_per_step": 4,
        "eval_every": 4,
        "checkpoint_every": 4,
        "learning_rate": rate,
        "warmup": 0,
        "gradient_checkpointing": False,
    }
    tree = settings(storage, name, **{**sections, "training": training})
    tree["data"] = {
        "train": [{"source": str(DEMO / "train.jsonl"), "limit": 16}],
        "eval": [{"source": str(DEMO / "h1.jsonl"), "limit": 8}],
        "max_length": 96,
        "max_prompt_length": 48,
    }
    if tree["adapter"].get("kind") == "none":
        tree["adapter"] = {"kind": "none"}
    else:
        tree["adapter"] = {**tree["adapter"], "dropout": 0.0}
    return build(RunConfig, tree, {(): "tests"})


def trained(storage: Path, kind: str) -> RunConfig:
    """A finished run of a kind."""
    base, sections = KINDS[kind]
    model = dict(sections.get("model", {}))
    if base is not None:
        family, own = BASES[base]
        folder = storage / "bases" / base
        if not folder.exists():
            random_base(folder, family, **own)
        model["base"] = str(folder)
    config = short(storage, kind, **{**sections, "model": model})
    orpo_ray.train(config, console=SILENT)
    return config


def greedy(model: Any, tokenizer: Any, question: str) -> list[int]:
    """The greedy answer, as a program that knows only the folder asks for it."""
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    out = model.generate(**asked, max_new_tokens=24, do_sample=False)
    return out[0, asked["input_ids"].shape[1] :].tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", KINDS)
def test_plain_transformers_answer_as_the_unmerged_adapter(
    kind: str, storage: Path, tmp_path: Path
) -> None:
    config = trained(storage, kind)
    exported = orpo_ray.export(Run(config).folder, tmp_path / "out", answers=2, console=SILENT)
    is_quantised = config.model.quantization != "none"
    assert exported.merge == {
        "full": "none",
    }.get(kind, "dequantised" if is_quantised else "original")
    ours, tokenizer = orpo_ray.load(config)
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert not any(parameter.dtype == torch.uint8 for parameter in plain.parameters())
    for question in ("Please name the capital of Poland.", "What is 2 + 2?"):
        assert greedy(plain, again, question) == greedy(ours, tokenizer, question)
    # The demo's base is stored in 16 bits, and int8 rounds activations in training, too.
    rounded = {"nf4": 1e-3, "dora": 1e-3, "int8": 2e-2, "turned-int8": 2e-2}
    assert exported.reloaded.max_log_prob_difference <= rounded.get(kind, EXACT)
    assert exported.reloaded.greedy_agreement == 1.0
    if is_quantised:
        near, far = (
            exported.candidates[name].max_log_prob_difference
            for name in ("dequantised", "original")
        )
        assert near < far / (2 if "int8" in kind else 10)


def test_the_weights_of_a_base_stay_as_they_are_but_for_the_adapter(
    storage: Path, tmp_path: Path
) -> None:
    """Embeddings keep all their rows, experts their names, and tied heads stay tied."""
    for kind in ("padded", "experts", "tied"):
        config = trained(storage, kind)
        orpo_ray.export(config, tmp_path / kind, answers=0, console=SILENT)
        before, after = (tensors(Path(folder)) for folder in (config.model.base, tmp_path / kind))
        assert {name: t.shape for name, t in before.items()} == {
            name: t.shape for name, t in after.items()
        }
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        others = {n for n in changed if not re.search(r"\.(self_attn|mlp|block_sparse_moe)\.", n)}
        assert changed and not others
    tied = AutoModelForCausalLM.from_pretrained(tmp_path / "tied")
    assert tied.lm_head.weight is tied.model.embed_tokens.weight


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            found.update({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118
    return found


def in_stages(
    storage: Path, name: str, stage: Mapping[str, Any] = MappingProxyType({}), **sections: Any
) -> RunConfig:
    """SFT, then DPO. Each stage has the settings of `stage` as well."""
    config = short(storage, name, **sections)
    tree = json.loads(config.model_dump_json(by_alias=True))
    if tree["adapter"]["kind"] == "none":
        tree["adapter"] = {"kind": "none"}
    objectives = ({"kind": "sft"}, {"kind": "dpo", "beta": 0.3})
    tree["stages"] = [{**stage, "objective": objective} for objective in objectives]
    return build(RunConfig, tree, {(): "tests"})


@pytest.mark.parametrize("kind", ["adapters", "whole"])
def test_a_chain_is_exported_whole_and_the_card_names_it(
    kind: str, storage: Path, tmp_path: Path
) -> None:
    config = in_stages(storage, f"chain-{kind}", **(FULL if kind == "whole" else {}))
    orpo_ray.train(config, console=SILENT)
    exported = orpo_ray.export(config, tmp_path / "out", answers=2, console=SILENT)
    assert exported.reloaded.max_log_prob_difference <= 5e-3
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    ours, tokenizer = orpo_ray.load(config)
    question = "Please name the capital of Poland."
    assert greedy(plain, again, question) == greedy(ours, tokenizer, question)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "1. SFT in 4 steps\n2. DPO in 4 steps\n" in card


def test_the_last_stage_says_whether_there_is_an_adapter(storage: Path, tmp_path: Path) -> None:
    """The stages train every weight, and the settings above them name an adapter."""
    whole = {"adapter": {"kind": "none"}}
    config = in_stages(storage, "chain-of-kinds", stage=whole, model=PLAIN)
    orpo_ray.train(config, console=SILENT)
    with pytest.raises(ConfigError, match="the run trained every weight, so it has no adapter"):
        orpo_ray.export(config, tmp_path / "out", adapter_only=True, console=SILENT)
    for way in ("auto", "none"):
        out = tmp_path / way
        exported = orpo_ray.export(config, out, merge=way, answers=0, console=SILENT)
        assert (exported.merge, exported.reloaded.greedy_agreement) == ("none", None)
        card = (out / "README.md").read_text(encoding="utf-8")
        assert "Fine-tuned from `base`" in card and "library_name" not in card


def test_an_adapter_alone_loads_in_peft_and_names_no_folder_of_this_machine(
    storage: Path, tmp_path: Path
) -> None:
    config = trained(storage, "nf4")
    wanted = {"adapter_only": True, "answers": 2, "console": SILENT}
    with pytest.raises(ConfigError, match=r"means nothing on another one; name it .* --base-name"):
        orpo_ray.export(config, tmp_path / "out", **wanted)
    exported = orpo_ray.export(config, tmp_path / "out", base_name="owner/demo", **wanted)
    assert (exported.merge, exported.merge_error) == ("none", 0.0)
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text(encoding="utf-8"))
    assert (written["base_model_name_or_path"], written["revision"]) == ("owner/demo", None)
    for file in (tmp_path / "out").iterdir():
        if file.suffix in (".json", ".md"):
            text = file.read_text(encoding="utf-8")
            assert str(BASE) not in text and str(storage) not in text, file
    for name in ("/root/models/x", "a/b; rm x", "a/b/c", "name"):
        with pytest.raises(ConfigError, match=r"^--base-name: must be OWNER/NAME"):
            orpo_ray.export(config, tmp_path / "no", base_name=name, **wanted)
    base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, tmp_path / "out")
    assert loaded.peft_config["default"].r == config.adapter.r
    stops = json.loads((tmp_path / "out" / "generation_config.json").read_text(encoding="utf-8"))
    assert stops["eos_token_id"] == loaded.generation_config.eos_token_id
    serve = (tmp_path / "out" / "SERVE.md").read_text(encoding="utf-8")
    assert (
        "--generation-config ." in serve
        and "vllm serve owner/demo " in serve
        and "--max-lora-rank 8 " in serve
    )


def test_vllm_does_not_serve_dora(storage: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="because it is a DoRA adapter; export the merged"):
        orpo_ray.export(
            trained(storage, "dora"),
            tmp_path / "out",
            adapter_only=True,
            base_name="owner/demo",
            console=SILENT,
        )
    assert not list(tmp_path.iterdir())


def test_layers_stay_on_disk_if_they_do_not_fit_into_memory(
    storage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = trained(storage, "nf4")
    whole = orpo_ray.export(config, tmp_path / "whole", answers=2, console=SILENT)
    monkeypatch.setattr(placement, "free_memory", lambda device: 0)
    monkeypatch.setattr(exporting, "free_memory", lambda device: 2**40)
    layers = orpo_ray.export(config, tmp_path / "layers", answers=2, console=SILENT)
    assert layers.candidates == whole.candidates
    assert not (tmp_path / "layers" / ".offloaded").exists()
    with pytest.raises(ResourceError, match="no room in memory for that; use dequantised"):
        orpo_ray.export(config, tmp_path / "out", merge="original", console=SILENT)
    assert {entry.name for entry in tmp_path.iterdir()} == {"whole", "layers"}


def test_what_does_not_fit_into_memory_is_told(
    storage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = trained(storage, "experts")
    for place, told in (
        (merge, "the files of .* hold the weights in other parts than the model"),
        (exporting, "the model as it was trained takes 0.0 GB, and 0.0 GB are free on cpu"),
    ):
        monkeypatch.setattr(place, "free_memory", lambda device: 1000)
        with pytest.raises(ResourceError, match=f"no room in memory: {told}"):
            orpo_ray.export(config, tmp_path / "out", console=SILENT)
    assert not list(tmp_path.iterdir())


def test_memory_that_runs_out_meanwhile_is_told(
    storage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_large(*arguments: Any) -> None:
        torch.empty(2**60)

    monkeypatch.setattr(exporting, "score", too_large)
    with pytest.raises(ResourceError, match="no room in memory for the model and what it computes"):
        orpo_ray.export(trained(storage, "untied"), tmp_path / "out", console=SILENT)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("rate", [0.01, 0.0001])
def test_a_model_that_lost_its_training_is_rejected(
    rate: float, storage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounding could explain the difference of a run that changed little; the base tells it."""
    base = random_base(tmp_path / "base", "llama")
    config = short(storage, f"lost-{rate}", rate=rate, model={**PLAIN, "base": str(base)})
    config = config.model_copy(
        update={"model": config.model.model_copy(update={"dtype": "bfloat16"})}
    )
    orpo_ray.train(config, console=SILENT)

    def forgetful(model: Any, base: Any, adapter: str, into: Any, folder: Path) -> None:
        methods.write_copy(base, folder, torch.float32)

    wanted = {"answers": 0, "console": SILENT}
    assert orpo_ray.export(config, tmp_path / "right", **wanted).merge == "original"
    monkeypatch.setattr(methods, "write_merged", forgetful)
    with pytest.raises(RunError, match=r"not fit for use: it.* (differ|answers as the base)"):
        orpo_ray.export(config, tmp_path / "out", **wanted)
    assert {entry.name for entry in tmp_path.iterdir()} == {"base", "right", "out.rejected"}
    with pytest.raises(ConfigError, match=r"out\.rejected exists"):
        orpo_ray.export(config, tmp_path / "out", **wanted)


def test_an_original_base_under_a_quantised_adapter_is_told_from_a_lost_adapter(
    storage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = trained(storage, "nf4")

    def forgetful(model: Any, base: Any, adapter: str, into: Any, folder: Path) -> None:
        methods.write_copy(base, folder, torch.float16)

    monkeypatch.setattr(methods, "write_merged", forgetful)
    for wanted in ("dequantised", "original"):
        with pytest.raises(RunError, match=r"not fit for use: its log-probs per token differ"):
            orpo_ray.export(config, tmp_path / wanted, merge=wanted, answers=0, console=SILENT)


def test_an_adapter_of_another_run_is_exported(storage: Path, tmp_path: Path) -> None:
    """The other run has settings and pairs, and was never trained."""
    config, other = trained(storage, "nf4"), short(storage, "other")
    for number, (run, adapter) in enumerate(((config, None), (other, Run(config).adapter))):
        exported = orpo_ray.export(
            run, tmp_path / str(number), adapter=adapter, answers=2, console=SILENT
        )
        assert exported.merge == "dequantised" and exported.reloaded.greedy_agreement == 1.0
    one, two = (tensors(tmp_path / name) for name in "01")
    assert all(torch.equal(one[name], two[name]) for name in one | two)


def test_an_adapter_that_makes_up_for_rounding_fits_the_rounded_base_only(
    storage: Path, tmp_path: Path
) -> None:
    """LoftQ starts the first stage, and the second goes on with it."""
    config = in_stages(storage, "loftq", adapter={"init": "loftq"})
    orpo_ray.train(config, console=SILENT)
    with pytest.raises(ConfigError, match=r"^merge: the adapter makes up for the rounding to 4 "):
        orpo_ray.export(config, tmp_path / "out", merge="original", console=SILENT)
    with pytest.raises(ConfigError, match=r"^--adapter-only: the adapter makes up for the round"):
        orpo_ray.export(
            config, tmp_path / "out", adapter_only=True, base_name="a/b", console=SILENT
        )
    exported = orpo_ray.export(config, tmp_path / "out", answers=0, console=SILENT)
    assert exported.merge == "dequantised" and list(exported.candidates) == ["dequantised"]


def test_an_adapter_of_pissa_is_merged_into_the_base_as_it_is(
    storage: Path, tmp_path: Path
) -> None:
    started = {"init": "pissa", "dropout": 0.0}
    config = short(storage, "pissa", model=PLAIN, adapter=started)
    orpo_ray.train(config, console=SILENT)
    exported = orpo_ray.export(config, tmp_path / "out", answers=2, console=SILENT)
    assert exported.merge == "original" and exported.reloaded.greedy_agreement == 1.0
