"""An adapter merged into its base, against the formula; files of weights against the library."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from support import decided, random_base, run_config

from orpo_ray.config.model import ModelConfig
from orpo_ray.errors import ConfigError
from orpo_ray.evaluation.methods import methods_of
from orpo_ray.models.base import load_base
from orpo_ray.models.merge import AsTrained, Merging, as_published, quantised_in, write_merged
from orpo_ray.models.weights import INDEX, Weights, write_weights

RANK, ALPHA = 4, 6.0
QUERY = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_base(tmp_path_factory.mktemp("base"), "llama", tie_word_embeddings=True)


def adapter(base: Path, folder: Path, *, dora: bool = False) -> dict[str, torch.Tensor]:
    """An adapter with random numbers on every linear layer; its tensors."""
    model = load_base(plain(base), "cpu", "float32", "eager", trainable=False)
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=RANK,
        lora_alpha=ALPHA,  # type: ignore[arg-type]
        target_modules="all-linear",
        use_dora=dora,
        init_lora_weights=False,
    )
    get_peft_model(model, lora).save_pretrained(str(folder))
    return load_file(folder / "adapter_model.safetensors")


def plain(base: Path) -> ModelConfig:
    return ModelConfig(base=str(base), quantization="none")


def merged(base: Path, adapter_folder: Path, out: Path) -> dict[str, torch.Tensor]:
    out.mkdir()
    write_merged(plain(base), Weights(base), str(adapter_folder), as_published, out)
    return load_file(out / "model.safetensors")


def test_a_lora_adapter_adds_its_product_to_the_weight(base: Path, tmp_path: Path) -> None:
    tensors = adapter(base, tmp_path / "adapter")
    written = merged(base, tmp_path / "adapter", tmp_path / "out")
    before = load_file(base / "model.safetensors")
    assert written.keys() == before.keys()
    down, up = (
        tensors[f"base_model.model.{QUERY}.lora_{side}.weight"].double().numpy() for side in "AB"
    )
    expected = before[f"{QUERY}.weight"].double().numpy() + ALPHA / RANK * up @ down
    np.testing.assert_allclose(written[f"{QUERY}.weight"].numpy(), expected, rtol=1e-6, atol=1e-7)
    norm = "model.layers.0.input_layernorm.weight"
    assert torch.equal(written[norm], before[norm])


def test_a_dora_adapter_rescales_the_rows_of_the_sum(base: Path, tmp_path: Path) -> None:
    """Equation 5 of the paper: each row gets the length that the adapter learnt."""
    tensors = adapter(base, tmp_path / "adapter", dora=True)
    written = merged(base, tmp_path / "adapter", tmp_path / "out")
    weight = load_file(base / "model.safetensors")[f"{QUERY}.weight"].double().numpy()
    names = {side: f"base_model.model.{QUERY}.lora_{side}" for side in ("A", "B")}
    down, up = (tensors[f"{name}.weight"].double().numpy() for name in names.values())
    lengths = tensors[f"base_model.model.{QUERY}.lora_magnitude_vector"].double().numpy()
    total = weight + ALPHA / RANK * up @ down
    expected = lengths[:, None] * total / np.linalg.norm(total, axis=1, keepdims=True)
    np.testing.assert_allclose(written[f"{QUERY}.weight"].numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_weights_as_trained_are_those_that_a_quantised_base_holds(
    quantization: str, base: Path
) -> None:
    config = ModelConfig(base=str(base), quantization=quantization)
    model = load_base(config, "cpu", "bfloat16", "eager", trainable=False)
    quantised = quantised_in(model)
    assert len(quantised.names) == 14 and not quantised.turned
    as_trained = AsTrained(quantised, quantization, torch.bfloat16, "cpu")
    stored = Weights(base)
    for name in quantised.names:
        held = model.get_submodule(name.removesuffix(".weight")).weight
        if quantization == "nf4":
            expected = dequantize_4bit(held.data, held.quant_state)
        else:
            expected = (held.CB.float() * held.SCB.float()[:, None] / 127).bfloat16()
        assert torch.equal(as_trained(name, stored.read(name)), expected), name
    head = stored.read("model.embed_tokens.weight")
    assert as_trained("model.embed_tokens.weight", head) is head


def test_an_adapter_of_another_base_is_refused(base: Path, tmp_path: Path) -> None:
    adapter(base, tmp_path / "adapter")
    narrow = random_base(tmp_path / "narrow", "llama", num_hidden_layers=1)
    with pytest.raises(ConfigError, match="this adapter does not fit the base: "):
        Merging(plain(narrow), str(tmp_path / "adapter"))


def test_files_are_cut_by_size_and_read_as_the_library_reads_them(tmp_path: Path) -> None:
    tensors = {
        "a": torch.arange(600, dtype=torch.float32).reshape(20, 30),
        "b": torch.ones(700, dtype=torch.bfloat16),
        "c": torch.tensor(3.5, dtype=torch.float16),
        "d": torch.tensor([True, False]),
    }
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir(), out.mkdir()  # type: ignore[func-returns-value]
    save_file(tensors, source / "model.safetensors")
    weights = Weights(source)
    assert weights.bytes == sum(t.numel() * t.element_size() for t in tensors.values())
    write_weights(out, weights.shapes, weights.read, most=2500)
    files = sorted(file.name for file in out.glob("*.safetensors"))
    assert files == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = json.loads((out / INDEX).read_text(encoding="utf-8"))["weight_map"]
    for name, tensor in tensors.items():
        found = load_file(out / index[name])[name]
        assert found.dtype == tensor.dtype and torch.equal(found, tensor)
        assert torch.equal(Weights(out).read(name), tensor)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ({}, "no model.safetensors in it"),
        ({"model.safetensors": b"{}"}, "cannot be read"),
        ({INDEX: b"{"}, "cannot be read"),
        ({INDEX: b'{"weight_map": {"a": "one.safetensors"}}'}, "no one.safetensors in it"),
        ({INDEX: b'{"weight_map": {"a": "../x.safetensors"}}'}, "no ../x.safetensors in it"),
    ],
)
def test_a_folder_without_whole_weights_is_refused(
    content: dict[str, bytes], complaint: str, tmp_path: Path
) -> None:
    for name, text in content.items():
        (tmp_path / name).write_bytes(text)
    with pytest.raises(ConfigError, match=complaint):
        Weights(tmp_path)


def test_a_number_format_that_is_not_known_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(4).to(torch.float8_e5m2)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match="a is stored as F8_E5M2; name the base as it was"):
        Weights(tmp_path)


def test_a_base_that_was_published_in_a_quantised_form_is_refused(
    base: Path, tmp_path: Path
) -> None:
    shutil.copytree(base, tmp_path / "base")
    path = tmp_path / "base" / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "quantization_config": {}}), encoding="utf-8")
    run = run_config(tmp_path, model={"base": str(tmp_path / "base")})
    with pytest.raises(ConfigError, match="was published in a quantised form"):
        methods_of(run, "adapter", "auto", decided(run))
