"""A storage that cannot be used is refused in one line, before anything is prepared."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from s3_server import Server, serve
from terminal import LACKING, WRONG, Command, write_config


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """It stays empty."""
    with serve() as server:
        yield server


@pytest.mark.parametrize("name", ["train", "tune", "prepare"])
@pytest.mark.parametrize(
    ("storage", "code", "says"),
    [
        ("s3://other/runs", LACKING, "storage: there is no bucket other at http://127.0.0.1:"),
        ("s3://AKIA:se/cret@bucket/runs", WRONG, "storage: a URL carries no user or password"),
        ("s3://bucket/runs?secret_key=cret", WRONG, "storage: a URL carries no query"),
        (
            "gs://bucket/runs",
            WRONG,
            "storage: gs:// is not supported; use s3://bucket/folder, or a folder",
        ),
        (
            "http://host/runs",
            WRONG,
            "storage: http:// is not supported; use s3://bucket/folder, or a folder",
        ),
    ],
)
def test_a_storage_that_cannot_be_is_refused(
    server: Server,
    name: str,
    storage: str,
    code: int,
    says: str,
    command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for variable, value in {
        **server.environment,
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }.items():
        monkeypatch.setenv(variable, value)
    search = ["search.space={objective.lambda: {loguniform: [0.1, 1.0]}}"] if name == "tune" else []
    done = command(name, write_config(tmp_path), f"storage={storage}", *search)
    assert server.bucket.objects == {}
    assert done.code == code, done.err
    assert len(done.said) == 1 and says in done.said[0]
    assert "cret" not in done.err.replace("secret_key", "")


def test_a_server_that_is_not_there_is_told(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable, value in {
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_REGION": "us-east-1",
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }.items():
        monkeypatch.setenv(variable, value)
    done = command("train", write_config(tmp_path), "storage=s3://bucket/runs")
    assert done.code == LACKING
    assert len(done.said) == 1
    assert "storage: s3://bucket at http://127.0.0.1:9 cannot be used" in done.said[0]
