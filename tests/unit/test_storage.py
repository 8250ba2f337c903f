"""What a bucket keeps and gives back, on a server that speaks S3, and the errors without one."""

import hashlib
import json
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from run_folders import keep_scores, lines_of, scores_of, write_run
from s3_server import Server, serve
from support import run_config

from orpo_ray.config.storage import inside, local_path, refuse_url, without_secrets
from orpo_ray.errors import ConfigError, ResourceError
from orpo_ray.models.trained import fetch_trained
from orpo_ray.report.write import write_report
from orpo_ray.runs.console import SILENT
from orpo_ray.runs.run import Run
from orpo_ray.runs.shown import named_shown
from orpo_ray.storage import LOCAL, fetched, storage_at

MANIFEST = "MANIFEST.json"
URL = "s3://bucket/runs"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """An empty bucket, and no copy of it yet."""
    with serve() as server:
        enter(monkeypatch, tmp_path / "cache", server)
        yield server


def enter(monkeypatch: pytest.MonkeyPatch, cache: Path, server: Server | None = None) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in (server.environment if server else {}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HOME", str(cache.parent))
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))


def write_folder(name: str, files: dict[str, str]) -> Path:
    """A folder of the bucket's copy with a manifest."""
    folder = local_path(inside(URL, name))
    for file, text in files.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(text, encoding="utf-8")
    entries = {
        file: {"size": len(text), "sha256": hashlib.sha256(text.encode()).hexdigest()}
        for file, text in files.items()
    }
    (folder / MANIFEST).write_text(json.dumps({"files": entries}), encoding="utf-8")
    return folder


def texts(folder: Path) -> dict[str, str]:
    """Every file of a folder but its manifest, by name."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8") for path in files}


# --- what a place is ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("gs://bucket/runs", "gs:// is not supported; use s3://bucket/folder, or a folder"),
        ("http://host/bucket", "http:// is not supported; use s3://bucket/folder, or a folder"),
        (
            "s3://AKIA:se/cret@bucket/runs",
            "a URL carries no user or password; credentials and endpoint are those of",
        ),
        (
            "s3://bucket/runs?secret_key=x",
            "a URL carries no query; credentials and endpoint are those of",
        ),
        (
            "s3://",
            "s3:// needs the name of a bucket (3 to 63 of a-z, 0-9, . and -); use "
            "s3://bucket/folder",
        ),
        ("s3://Bucket/runs", "s3:// needs the name of a bucket"),
        ("s3://AKIA:secret/runs", "s3:// needs the name of a bucket"),
        ("s3://bucket/../runs", "has a folder that is not made of letters, digits and . _ - ="),
        ("s3://bucket/AKIA:secret", "has a folder that is not made of letters"),
        ("s3://bucket//runs", "has a folder that is not made of letters"),
    ],
)
def test_other_urls_are_refused(url: str, says: str) -> None:
    assert says in (refuse_url(url) or "")
    assert "cret" not in (refuse_url(url) or "")  # nor any other part of it
    with pytest.raises(ConfigError, match=r"supported|carries|name of a bucket|folder that"):
        storage_at(url)


@pytest.mark.parametrize("url", ["s3://bucket", "s3://bucket/", "s3://my.bucket-1/a/b_c/v=1.2"])
def test_a_place_in_a_bucket_is_accepted(url: str) -> None:
    assert refuse_url(url) is None


def test_secrets_in_a_text_are_not_shown() -> None:
    assert (
        without_secrets("storage=s3://AKIA:se/cret@bucket/runs?key=cret")
        == "storage=s3://...@bucket/runs?..."
    )
    assert without_secrets("model.base=what?") == "model.base=what?"
    assert without_secrets("storage='s3://AKIA:secret/runs' b") == "storage='s3://...' b", (
        "the @ was forgotten"
    )
    for address in ("http://127.0.0.1:8265/x", "'http://host:80'", "http://[::1]:80/"):
        assert without_secrets(address) == address


def test_the_copy_of_a_bucket_lies_in_the_cache_folder_of_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter(monkeypatch, tmp_path / "cache")
    assert (
        local_path("s3://bucket/a/b/")
        == tmp_path / "cache" / "orpo-ray" / "s3" / "bucket" / "a" / "b"
    )
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert local_path("s3://bucket/a") == tmp_path / ".cache" / "orpo-ray" / "s3" / "bucket" / "a"
    assert local_path("~/runs") == tmp_path / "runs"


@pytest.mark.parametrize("variable", ["XDG_CACHE_HOME", "AWS_CONFIG_FILE"])
def test_a_missing_home_is_reported_with_the_variable_that_names_it(
    variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter(monkeypatch, tmp_path / "cache")
    monkeypatch.setenv(variable, "~nosuchuser/x")
    with pytest.raises(
        ConfigError, match=f"^{variable}: ~nosuchuser/x: no user of this server has that name"
    ):
        fetched(f"{URL}/x")


# --- files and folders ----------------------------------------------------------------------------


def test_a_file_comes_back_on_a_server_that_never_saw_it(
    server: Server, tmp_path: Path, monkeypatch
) -> None:
    path = local_path(inside(URL, "a", "x.txt"))
    path.parent.mkdir(parents=True)
    path.write_text("hello", encoding="utf-8")
    storage_at(URL).store(path)
    assert server.bucket.under("") == {"runs/a/x.txt": b"hello"}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    found = fetched("s3://bucket/runs/a/x.txt")
    assert (
        found.is_relative_to(tmp_path / "elsewhere")
        and found.read_text(encoding="utf-8") == "hello"
    )
    assert storage_at(URL).place_of(found) == "s3://bucket/runs/a/x.txt"


def test_a_large_file_comes_back(server: Server) -> None:
    path = local_path(inside(URL, "large"))
    path.parent.mkdir(parents=True)
    content = os.urandom(25 * 2**20)
    path.write_bytes(content)
    storage_at(URL).store(path)
    path.unlink()
    assert storage_at(URL).fetch(path) and path.read_bytes() == content


def test_a_file_that_the_bucket_lacks_is_gone_here_too(server: Server) -> None:
    path = local_path(inside(URL, "stale.json"))
    path.parent.mkdir(parents=True)
    path.write_text("stale", encoding="utf-8")
    assert not storage_at(URL).fetch(path)
    assert not path.exists()


def test_a_folder_is_kept_with_its_manifest_last_and_an_earlier_one_is_gone(server: Server) -> None:
    storage = storage_at(URL)
    storage.store_folder(write_folder("step-1", {"old": "1", "both": "1"}), MANIFEST)
    (local_path(inside(URL, "step-1")) / "old").unlink()
    folder = write_folder("step-1", {"new": "22", "both": "22"})
    server.bucket.requests.clear()
    storage.store_folder(folder, MANIFEST)
    assert {
        name: text.decode()
        for name, text in server.bucket.under("runs/step-1/").items()
        if name != MANIFEST
    } == {
        "new": "22",
        "both": "22",
    }
    changes = [
        (method, Path(key).name)
        for method, key in server.bucket.requests
        if method in ("PUT", "DELETE")
    ]
    changes = [change for change in changes if change != ("PUT", "step-1")]  # what marks a folder
    assert changes[0] == ("DELETE", MANIFEST) and changes[-1] == ("PUT", MANIFEST)


def test_only_what_differs_is_fetched_and_a_tampered_copy_does_not_win(server: Server) -> None:
    storage = storage_at(URL)
    folder = write_folder("step-1", {"same": "abc", "changed": "abc", "sub/gone": "abc"})
    storage.store_folder(folder, MANIFEST)
    (folder / "changed").write_text("xyz", encoding="utf-8")
    (folder / "sub" / "gone").unlink()
    (folder / "added").write_text("more", encoding="utf-8")
    server.bucket.requests.clear()
    assert storage.fetch_folder(folder, MANIFEST)
    assert texts(folder) == {"same": "abc", "changed": "abc", "sub/gone": "abc"}
    read = {Path(key).name for method, key in server.bucket.requests if method == "GET"}
    assert read == {MANIFEST, "changed", "gone"}


def test_a_folder_whose_upload_was_cut_is_none(server: Server) -> None:
    storage = storage_at(URL)
    storage.store_folder(write_folder("checkpoints/step-1", {"a": "1"}), MANIFEST)
    server.bucket.refuses = lambda method, key: method == "PUT" and key.endswith("step-2/b")
    with pytest.raises(ConfigError):
        storage.store_folder(write_folder("checkpoints/step-2", {"a": "1", "b": "2"}), MANIFEST)
    assert set(server.bucket.under("runs/checkpoints/")) == {
        f"step-1/{MANIFEST}",
        "step-1/a",
        "step-2/a",
    }
    parent = local_path(inside(URL, "checkpoints"))
    storage.fetch_folders(parent, MANIFEST)
    assert sorted(path.name for path in parent.iterdir()) == ["step-1"]
    assert not storage.fetch_folder(parent / "step-2", MANIFEST)


def test_manifests_alone_tell_which_folders_there_are(
    server: Server, tmp_path: Path, monkeypatch
) -> None:
    storage = storage_at(URL)
    storage.store_folder(write_folder("checkpoints/step-1", {"a": "1"}), MANIFEST)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    write_folder("checkpoints/step-9", {"a": "never stored"})
    parent = local_path(inside(URL, "checkpoints"))
    storage.fetch_folders(parent, MANIFEST, only_manifests=True)
    assert [path.relative_to(parent).as_posix() for path in parent.rglob("*")] == [
        "step-1",
        f"step-1/{MANIFEST}",
    ]


def test_a_folder_without_a_manifest_is_fetched_as_it_is(server: Server) -> None:
    storage = storage_at(URL)
    folder = write_folder("adapter", {"a": "1", "sub/b": "2"})
    storage.store_folder(folder)
    (folder / "a").write_text("9", encoding="utf-8")
    (folder / "c").write_text("3", encoding="utf-8")
    assert storage.fetch_folder(folder)
    assert texts(folder) == {"a": "1", "sub/b": "2"}
    assert storage.holds(folder) and storage.holds(folder / "a") and not storage.holds(folder / "c")


def test_a_removed_folder_loses_its_manifest_first(server: Server) -> None:
    storage = storage_at(URL)
    folder = write_folder("step-1", {"a": "1"})
    storage.store_folder(folder, MANIFEST)
    server.bucket.requests.clear()
    storage.remove_folder(folder, MANIFEST)
    assert server.bucket.under("runs/step-1/") == {}
    assert next(request for request in server.bucket.requests) == (
        "DELETE",
        f"runs/step-1/{MANIFEST}",
    )


@pytest.mark.parametrize("name", ["../../escaped", "/tmp/escaped"])
def test_a_manifest_cannot_name_a_file_elsewhere(server: Server, name: str) -> None:
    folder = write_folder("step-1", {"a": "1"})
    (folder / MANIFEST).write_text(
        json.dumps({"files": {name: {"size": 1, "sha256": ""}}}), encoding="utf-8"
    )
    storage_at(URL).store_folder(folder, MANIFEST)
    with pytest.raises(ResourceError, match="would lie outside of it"):
        storage_at(URL).fetch_folder(folder, MANIFEST)


def test_a_folder_on_this_server_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1", encoding="utf-8")
    assert storage_at(str(tmp_path)) is LOCAL
    LOCAL.check()
    LOCAL.store(tmp_path)
    LOCAL.store_folder(tmp_path, MANIFEST)
    LOCAL.fetch_folders(tmp_path.parent, MANIFEST)
    LOCAL.remove_folder(tmp_path, MANIFEST)
    assert (
        LOCAL.fetch(tmp_path / "a")
        and LOCAL.holds(tmp_path / "a")
        and not LOCAL.fetch(tmp_path / "b")
    )
    assert LOCAL.fetch_folder(tmp_path) and LOCAL.place_of(tmp_path) == str(tmp_path)
    assert texts(tmp_path) == {"a": "1"}


# --- no such storage ------------------------------------------------------------------------------


def test_a_bucket_that_can_be_written_passes_the_check_and_its_copy_is_for_its_owner_only(
    server: Server, tmp_path: Path
) -> None:
    storage_at(URL).check()
    assert server.bucket.under("") == {}
    assert stat.S_IMODE((tmp_path / "cache" / "orpo-ray").stat().st_mode) == 0o700


def test_a_missing_bucket_is_reported(server: Server) -> None:
    with pytest.raises(
        ResourceError,
        match=r"^storage: there is no bucket other at http://127\.0\.0\.1:\d+; make it",
    ):
        storage_at("s3://other/runs").check()


def test_refused_credentials_are_reported(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody-else")
    with pytest.raises(
        ConfigError,
        match=r"^storage: s3://bucket at \S+ refuses these credentials; set those of the",
    ):
        storage_at(URL).check()


def test_a_bucket_that_may_only_be_read_is_reported(server: Server) -> None:
    server.bucket.refuses = lambda method, key: method == "PUT"
    with pytest.raises(ConfigError, match="refuses these credentials"):
        storage_at(URL).check()


def test_a_missing_server_is_reported_within_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter(monkeypatch, tmp_path / "cache")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    began = time.monotonic()
    with pytest.raises(
        ResourceError, match=r"^storage: s3://bucket at http://127.0.0.1:9 cannot be used"
    ):
        storage_at(URL).check()
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    "endpoint",
    [
        "http://u:secret@127.0.0.1:abc",
        "http://127.0.0.1:9?x=secret",
        "http://127.0.0.1:9/#secret",
        "u:secret@127.0.0.1:9",
        "http://u:secret",
    ],
)
@pytest.mark.parametrize("in_file", [False, True])
def test_an_endpoint_is_shown_in_messages_and_so_may_hold_no_secret(
    endpoint: str, in_file: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter(monkeypatch, tmp_path / "cache")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    if in_file:
        (tmp_path / "config").write_text(
            f"[default]\nendpoint_url = {endpoint}\n", encoding="utf-8"
        )
    else:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    with pytest.raises(
        ConfigError, match=r"must be a server's URL such as http://10\.0\.0\.9:9000"
    ) as refused:
        storage_at(URL).check()
    assert str(refused.value).startswith(
        f"{tmp_path / 'config'}: endpoint_url: " if in_file else "AWS_ENDPOINT_URL: "
    )
    assert "secret" not in str(refused.value)


def test_a_broken_file_of_the_aws_sdk_is_not_quoted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter(monkeypatch, tmp_path / "cache")
    (tmp_path / "config").write_text("aws_secret_access_key = secret\n", encoding="utf-8")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    with pytest.raises(
        ConfigError, match="not a file of the AWS SDK; write sections in brackets"
    ) as refused:
        storage_at(URL)
    assert "secret" not in str(refused.value)


def test_endpoint_and_credentials_may_stand_in_the_files_of_the_aws_sdk(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = server.environment
    enter(monkeypatch, tmp_path / "cache")
    (tmp_path / "config").write_text(
        f"[profile lab]\nendpoint_url = {server.url}\nregion = us-east-1\n", "utf-8"
    )
    keys = f"aws_access_key_id = {environment['AWS_ACCESS_KEY_ID']}\n"
    keys += f"aws_secret_access_key = {environment['AWS_SECRET_ACCESS_KEY']}\n"
    (tmp_path / "keys").write_text(f"[lab]\n{keys}", encoding="utf-8")
    monkeypatch.setenv("AWS_PROFILE", "lab")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "keys"))
    storage_at(URL).check()
    assert ("PUT", server.bucket.requests[0][1]) == server.bucket.requests[0]


# --- what others are at work on -------------------------------------------------------------------


def test_naming_a_run_as_an_adapter_leaves_its_own_files_alone(server: Server) -> None:
    run = local_path(inside(URL, "other"))
    run.mkdir(parents=True)
    own = (".lock", "metrics.jsonl", "run.json", "config.json")
    for name in own:
        (run / name).write_text("here", encoding="utf-8")
        server.bucket.put(f"runs/other/{name}", b"older")
    fetch_trained(inside(URL, "other"))
    assert texts(run) == dict.fromkeys(own, "here")
    server.bucket.put("runs/other/adapter/adapter_config.json", b"{}")
    fetch_trained(inside(URL, "other"))
    assert (run / "adapter" / "adapter_config.json").read_text(encoding="utf-8") == "{}"


def test_an_upload_that_is_interrupted_leaves_no_half_of_a_file(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = local_path(inside(URL, "run.json"))
    path.parent.mkdir(parents=True)
    path.write_text("{}", encoding="utf-8")

    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("shutil.copyfileobj", interrupted)
    with pytest.raises(KeyboardInterrupt):
        storage_at(URL).store(path)
    assert "runs/run.json" not in server.bucket.objects


def test_a_log_that_is_being_written_or_was_never_stored_is_left_alone(server: Server) -> None:
    run = Run(run_config(Path("unused")).model_copy(update={"storage": URL}))
    server.bucket.put("runs/run/config.json", b"{}")
    with run.lock():
        run.path("run.log").write_text("begun", encoding="utf-8")
        run.refresh()
        assert run.path("run.log").read_text(encoding="utf-8") == "begun"
        assert run.path("config.json").exists()
    run.refresh()
    assert run.path("run.log").exists(), "its command was killed before it stored it"
    server.bucket.put("runs/run/run.log", b"begun, and resumed")
    run.refresh()
    assert run.path("run.log").read_text(encoding="utf-8") == "begun, and resumed"


def test_an_onlooker_deletes_nothing_while_workers_train(server: Server) -> None:
    run = Run(run_config(Path("unused")).model_copy(update={"storage": URL}))
    unsent = write_folder("run/checkpoints/step-000004", {"state.safetensors": "x"})
    server.bucket.put("runs/run/config.json", b"{}")
    with run.only_group(patience_s=0):
        run.refresh()
        assert unsent.is_dir() and not run.path("config.json").exists()
    run.refresh()
    assert not unsent.is_dir() and run.path("config.json").exists()


def test_a_page_is_made_and_kept_on_a_server_that_never_saw_the_run(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = write_run(URL, "shown", lines=lines_of(4, 2))
    keep_scores(first, 4, scores_of(48))
    first.store("config.json", "run.json", "metrics.jsonl", "evaluations")
    enter(monkeypatch, tmp_path / "another", server)
    shown = named_shown(f"{URL}/shown")
    assert write_report(shown, SILENT.announce) == "s3://bucket/runs/shown/report.html"
    kept = server.bucket.objects["runs/shown/report.html"].decode()
    assert "held-out accuracy" in kept
    assert "95 % 0.632 to 0.840" in kept, "the scores came along"
