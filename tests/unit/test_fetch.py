"""The base's files are fetched from the hub once; if that fails, one line says why."""

from pathlib import Path
from typing import Any

import pytest
from support import BASE

from orpo_ray.config import ModelConfig
from orpo_ray.errors import ConfigError
from orpo_ray.models import base


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None]]:
    """Stands in for the hub and records what it is asked for."""
    asked: list[tuple[str, str | None]] = []

    def download(
        name: str, revision: str | None, allow_patterns: list[str], ignore_patterns: list[str]
    ) -> str:
        asked.append((name, revision))
        assert "*.safetensors" in allow_patterns and not any(
            "bin" in pattern for pattern in allow_patterns
        )
        return "fetched"

    monkeypatch.setattr(base, "snapshot_download", download)
    return asked


def test_a_hub_name_is_fetched_at_its_revision(asked: list[Any]) -> None:
    found = base.fetch_base(ModelConfig(base="someone/model", revision="v2"))
    assert found == Path("fetched")
    assert asked == [("someone/model", "v2")]


def test_a_folder_is_not_fetched(asked: list[Any]) -> None:
    assert base.fetch_base(ModelConfig(base=str(BASE))) == BASE
    assert asked == []


def test_a_name_that_cannot_be_fetched_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("no such repository\nand many more lines")

    monkeypatch.setattr(base, "snapshot_download", fail)
    with pytest.raises(ConfigError, match=r"^model\.base: .*someone/model") as caught:
        base.fetch_base(ModelConfig(base="someone/model"))
    assert "\n" not in str(caught.value)
