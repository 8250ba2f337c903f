"""Three servers for a cluster, and a fourth that does not belong to it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from lan import SERVERS, Lan, address, missing
from on_trio import cluster


@pytest.fixture(scope="session")
def lan(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lan]:
    """The servers and then the stranger, all of them on."""
    if lacks := missing():
        pytest.fail(f"tests of a cluster need {', '.join(lacks)} on this machine")
    servers = Lan(tmp_path_factory.mktemp("lan"))
    try:
        servers.start(len(SERVERS) + 1)
        yield servers
    finally:
        servers.stop()


@pytest.fixture(scope="module")
def hosts(lan: Lan, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """hosts.yaml of a cluster that is up."""
    path = tmp_path_factory.mktemp("cluster") / "hosts.yaml"
    path.write_text(yaml.safe_dump(lan.settings(path.parent)), encoding="utf-8")
    up = cluster("up", path)
    assert [(server["address"], server["joined"]) for server in up["servers"]] == [
        (address(number), True) for number in SERVERS
    ]
    yield path
    cluster("down", path)
    for number in SERVERS:
        assert "raylet" not in lan.ssh(number, "ps ax").stdout
