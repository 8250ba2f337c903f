"""A base in a GGUF file: what it is converted to, and which files are refused."""

import sys
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType
from gguf_file import write_gguf
from support import BASE
from transformers import AutoModelForCausalLM, AutoTokenizer

from orpo_ray.config.model import ModelConfig
from orpo_ray.errors import ConfigError
from orpo_ray.models.gguf import convert_gguf, converted_folder
from orpo_ray.models.identity import base_fingerprint
from orpo_ray.models.tokenizer import base_location, load_tokenizer, make_local
from orpo_ray.runs.console import SILENT

MESSAGES = [{"role": "user", "content": "How do I boil 12 eggs?"}]
QUESTION = "How do I boil an egg, and how long does it take?"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "orpo-ray" / "gguf"


def logits(folder: Path | str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    ids = AutoTokenizer.from_pretrained(BASE)(QUESTION, return_tensors="pt").input_ids
    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=dtype)
    with torch.no_grad():
        return model(ids).logits


def converted(file: Path) -> ModelConfig:
    config = ModelConfig(base=str(file))
    make_local(config, SILENT.announce)
    return config


def test_an_unquantised_file_is_the_base_that_it_was_made_of(tmp_path: Path) -> None:
    config = converted(write_gguf(BASE, tmp_path / "demo.gguf"))
    assert torch.equal(logits(base_location(config)), logits(BASE))
    ours = load_tokenizer(config, SILENT.announce)
    theirs = load_tokenizer(ModelConfig(base=str(BASE)), SILENT.announce)
    assert ours.eos_token == "<|im_end|>" and len(ours) == len(theirs)
    rendered = [
        each.apply_chat_template(MESSAGES, add_generation_prompt=True)["input_ids"]
        for each in (ours, theirs)
    ]
    assert rendered[0] == rendered[1]


@pytest.mark.parametrize(
    ("kind", "dtype", "most"),
    [("Q8_0", "float16", 0.01), ("Q4_1", "float16", 0.15), ("BF16", "bfloat16", 0.01)],
)
def test_quantised_weights_come_near_and_take_half_of_float32(
    tmp_path: Path, kind: str, dtype: str, most: float
) -> None:
    config = converted(write_gguf(BASE, tmp_path / "demo.gguf", GGMLQuantizationType[kind]))
    ours, theirs = logits(base_location(config)), logits(BASE)
    assert 0 < (ours - theirs).norm() / theirs.norm() < most
    model = AutoModelForCausalLM.from_pretrained(base_location(config))
    assert str(model.dtype) == f"torch.{dtype}"


def test_a_file_is_converted_once_and_again_when_it_has_changed(
    tmp_path: Path, cache: Path
) -> None:
    said: list[str] = []
    file = write_gguf(BASE, tmp_path / "demo.gguf")
    for _ in range(2):
        convert_gguf(str(file), said.append)
    first = converted_folder(str(file))
    assert [path.name for path in cache.iterdir()] == [first.name]
    assert said == [f"dequantising {file}, once, to {first}"]
    before = base_fingerprint(ModelConfig(base=str(file)))
    write_gguf(BASE, file, GGMLQuantizationType.Q8_0)
    assert base_fingerprint(converted(file)) != before
    assert converted_folder(str(file)) != first


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"with_tokenizer": False}, r"demo\.gguf holds no tokenizer \(tokenizer\.ggml\.tokens\)"),
        ({"architecture": "bert"}, r"demo\.gguf cannot be converted: .*\bbert\b"),
    ],
)
def test_a_file_that_holds_no_whole_base_is_refused_by_name(
    tmp_path: Path, cache: Path, changes: dict[str, object], says: str
) -> None:
    file = write_gguf(BASE, tmp_path / "demo.gguf", **changes)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=rf"^model\.base: .*{says}"):
        converted(file)
    assert not list(cache.glob("*")), "nothing half converted is left"


def test_a_damaged_file_is_refused_by_name(tmp_path: Path) -> None:
    file = write_gguf(BASE, tmp_path / "demo.gguf")
    whole = file.read_bytes()
    cut = "it is cut short or damaged; fetch it again"
    for size, says in ((0, ""), (6, cut), (1000, cut), (len(whole) // 2, cut), (-1, cut)):
        file.write_bytes(whole[:size])
        with pytest.raises(
            ConfigError, match=rf"^model\.base: .*demo\.gguf cannot be read as a GGUF file: {says}"
        ):
            converted(file)
    file.write_bytes(b"not at all")
    with pytest.raises(ConfigError, match=r"cannot be read as a GGUF file: (?!it is cut)"):
        converted(file)


def test_weights_that_cannot_be_dequantised_are_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_gguf(BASE, tmp_path / "demo.gguf", GGMLQuantizationType.Q8_0)
    monkeypatch.delitem(sys.modules["gguf.quants"]._type_traits, GGMLQuantizationType.Q8_0)
    with pytest.raises(ConfigError, match=r"^model\.base: token_embd\.weight in .* is Q8_0, which"):
        converted(file)


def test_without_the_extra_the_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_gguf(BASE, tmp_path / "demo.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConfigError, match=r"pip install 'orpo_ray\[gguf\]'"):
        converted(file)


def test_a_missing_file_is_refused_as_a_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^model\.base: no file .*/none\.gguf$"):
        converted(tmp_path / "none.gguf")
