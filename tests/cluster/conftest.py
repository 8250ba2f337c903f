"""Three servers that Ray may be started on, and a fourth that is none of theirs."""

from collections.abc import Iterator

import pytest
from lan import Lan, missing

SERVERS = 3


@pytest.fixture(scope="session")
def lan(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lan]:
    """The servers, and the stranger after them, all of them on."""
    if lacks := missing():
        pytest.fail(f"tests of a cluster need {', '.join(lacks)} on this machine")
    servers = Lan(tmp_path_factory.mktemp("lan"))
    try:
        servers.start(SERVERS + 1)
        yield servers
    finally:
        servers.stop()
