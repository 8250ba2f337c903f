"""A base's sizes come from its folder, the hub's cache, the table or the hub, the nearest first."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from s3_server import serve
from test_shapes import SMALL
from test_storage import enter

from orpo_ray.errors import CannotTellError, ConfigError
from orpo_ray.planner.bases import HuggingFace, find_shape
from orpo_ray.planner.shapes import known_shape, read_shape

LLAMA = {"model_type": "llama", **SMALL}
COMMON = "mistralai/Mistral-7B-v0.1"


class StandInHub:
    """A hub with a cache and an online side, which notes what is fetched."""

    def __init__(self, cached: dict[str, Path], online: dict[str, Path]) -> None:
        self._cached, self._online = cached, online
        self.fetched: list[tuple[str, str | None]] = []

    def cached(self, name: str, revision: str | None) -> Path | None:
        return self._cached.get(name)

    def download(self, name: str, revision: str | None) -> Path:
        self.fetched.append((name, revision))
        if name not in self._online:
            raise OSError("401 Client Error.\n\nYou have no access to it.")
        return self._online[name]


EMPTY = StandInHub({}, {})


def written(folder: Path, config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    text = config if isinstance(config, str) else json.dumps(config)
    (folder / "config.json").write_text(text, encoding="utf-8")
    return folder / "config.json"


def test_a_folder_is_read(tmp_path):
    written(tmp_path / "base", LLAMA)
    found = find_shape(str(tmp_path / "base"), hub=EMPTY)
    assert found.shape == read_shape(LLAMA, str(tmp_path / "base"))
    assert found.source == f"config.json in {tmp_path / 'base'}"


def test_a_relative_folder_comes_before_a_hub_name(tmp_path, monkeypatch):
    (tmp_path / "owner").mkdir()
    written(tmp_path / "owner" / "base", LLAMA)
    monkeypatch.chdir(tmp_path)
    assert find_shape("owner/base", hub=EMPTY).shape.hidden == SMALL["hidden_size"]


def test_of_a_bucket_config_json_alone_is_fetched(tmp_path, monkeypatch):
    with serve() as server:
        enter(monkeypatch, tmp_path / "cache", server)
        server.bucket.put("bases/tiny/config.json", json.dumps(LLAMA).encode())
        server.bucket.put("bases/tiny/model.safetensors", b"many numbers")
        found = find_shape("s3://bucket/bases/tiny", hub=EMPTY)
        assert found.shape.hidden == SMALL["hidden_size"]
        assert [key for _, key in server.bucket.requests] == ["bases/tiny/config.json"]
        with pytest.raises(ConfigError, match=r"s3://bucket/bases/none has no config\.json$"):
            find_shape("s3://bucket/bases/none", hub=EMPTY)


def test_the_demo_s_base_is_read():
    import orpo_ray

    base = Path(orpo_ray.__file__).parent / "demo" / "base"
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    assert find_shape(str(base)).shape.hidden == config["hidden_size"]


def test_the_cache_comes_before_the_table(tmp_path):
    hub = StandInHub({COMMON: written(tmp_path, LLAMA)}, {})
    found = find_shape(COMMON, hub=hub)
    assert found.shape.hidden == SMALL["hidden_size"]
    assert found.source == "config.json in the hub's local cache"


def test_a_common_base_needs_no_network():
    hub = StandInHub({}, {})
    found = find_shape(COMMON, hub=hub)
    assert found.shape == known_shape(COMMON)
    assert found.source == "the planner's table of common bases"
    assert hub.fetched == []


def test_any_other_base_is_asked_of_the_hub_at_its_revision(tmp_path):
    hub = StandInHub({}, {"owner/new": written(tmp_path, LLAMA)})
    said: list[str] = []
    found = find_shape("owner/new", "abc123", hub, said.append)
    assert said == ["looking for owner/new on the Hugging Face hub"]
    assert (found.shape.name, found.source) == ("owner/new", "config.json on the hub")
    assert hub.fetched == [("owner/new", "abc123")]


def test_a_base_that_nobody_gives_is_told_of_in_one_line():
    with pytest.raises(ConfigError) as caught:
        find_shape("owner/gated", hub=EMPTY)
    assert str(caught.value) == (
        "model.base: owner/gated is no folder here, not in the hub's local cache and not in the "
        "planner's table, and the hub gives no config.json: 401 Client Error. You have no access "
        "to it."
    )


@pytest.mark.parametrize("name", ["owner/no-such-base", "a name/of no/hub"])
def test_the_hub_s_own_client_without_a_network(name, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert HuggingFace().cached(name, None) is None
    with pytest.raises(ConfigError, match=f"{name} is no folder here"):
        find_shape(name)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ("{", r"config\.json of .* cannot be read: Expecting property name"),
        ([1], r"config\.json of .* holds no settings"),
    ],
)
def test_a_broken_file_is_told_of(config, says, tmp_path):
    written(tmp_path / "base", config)
    with pytest.raises(ConfigError, match=says):
        find_shape(str(tmp_path / "base"))


def test_a_folder_without_a_base_is_told_of(tmp_path):
    with pytest.raises(ConfigError, match=r"has no config\.json$"):
        find_shape(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"it holds an adapter: set adapter\.init_from="):
        find_shape(str(tmp_path))


@pytest.mark.parametrize("base", ["./nowhere", "/no/where", "~/nowhere-at-all"])
def test_a_path_with_nothing_there_is_no_hub_name(base):
    with pytest.raises(ConfigError, match=f"model.base: no folder {base}"):
        find_shape(base, hub=EMPTY)


def test_a_gguf_file_is_not_guessed(tmp_path):
    with pytest.raises(ConfigError, match=r"no file .*base\.gguf"):
        find_shape(str(tmp_path / "base.gguf"))
    (tmp_path / "base.gguf").write_bytes(b"GGUF")
    with pytest.raises(CannotTellError, match="the planner reads no GGUF file; plan with"):
        find_shape(str(tmp_path / "base.gguf"))


def test_weights_that_are_quantised_already_are_not_guessed(tmp_path):
    config = {**LLAMA, "quantization_config": {"quant_method": "gptq", "bits": 4}}
    written(tmp_path / "base", config)
    with pytest.raises(CannotTellError, match=r"quantised already \(gptq\)"):
        find_shape(str(tmp_path / "base"))


def test_a_common_base_is_found_in_under_a_second_of_computing_and_loads_nothing_heavy():
    code = (
        "import sys, time\n"
        "from orpo_ray.planner.bases import find_shape\n"
        f"assert find_shape({COMMON!r}).shape.layers == 32\n"
        "print(time.process_time(), *{name.partition('.')[0] for name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, *loaded = done.stdout.split()
    assert {"torch", "ray", "transformers", "peft", "datasets"}.isdisjoint(loaded)
    assert float(seconds) < 1
