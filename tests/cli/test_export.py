"""`orpo-ray export` as a person uses it: what is said, what is refused, and a killed command."""

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from support import random_base, wait_until
from terminal import FAILED, LACKING, WRONG, Command, Finished, one_line, start

from orpo_ray.evaluation import export_place, exporting
from orpo_ray.runs.lock import locked


def entries(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


def test_a_run_is_exported_and_told(command: Command, finished: Finished, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = command("export", finished.run_dir, "--to", out, "--answers", "1", "--json")
    assert done.code == 0, done.err
    assert done.result["merge"] == "dequantised"
    assert set(done.result["candidates"]) == {"original", "dequantised"}
    assert done.result["merge_error"] < done.result["tolerance"]
    told = [
        "writing the adapter merged into the base as it was published",
        "original",
        "writing the adapter merged into the dequantised base that it was trained on",
        "dequantised",
        "loading again what was written",
    ]
    # Between them are bars of progress, if a test before this one has loaded the libraries.
    said = [line.partition(":")[0] for line in done.said]
    assert [line for line in said if line in told] == told
    assert entries(tmp_path) == {"out"}
    assert {
        "Modelfile",
        "README.md",
        "SERVE.md",
        "chat_template.jinja",
        "config.json",
        "export.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    } == entries(out)
    assert (out / "model.safetensors").stat().st_mode == (out / "config.json").stat().st_mode
    one_line(command("export", finished.run_dir, "--to", out), WRONG, f"to: {out} exists")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--to", "s3://bucket/out"), "to: s3://bucket/out is a URL; export to a folder"),
        (("--to", "nowhere/out"), "to: no folder "),
        (("--to", "/"), "to: / exists"),
        (("--to", "x" * 245), "File name too long"),
        (("--to", "out", "--merge", "none"), "an adapter names its base, but "),
        (("--to", "out", "--adapter-only", "--merge", "original"), "leave out --merge original"),
        (("--to", "out", "--base-name", "a/b"), "add --adapter-only"),
        (("--to", "out", "--adapter", "gone"), "gone: no adapter_config.json"),
    ],
)
def test_wishes_that_cannot_be_met(
    arguments: tuple[str, ...],
    told: str,
    command: Command,
    finished: Finished,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    one_line(command("export", finished.run_dir, *arguments), WRONG, told)
    assert entries(tmp_path) == set()


def test_a_run_that_is_not_finished(command: Command, config: Path, tmp_path: Path) -> None:
    told = one_line(command("export", config, "--to", tmp_path / "out"), WRONG)
    assert "does not exist; train it, or name an adapter" in told
    missing = tmp_path / "missing"
    one_line(command("export", missing, "--to", tmp_path / "out"), WRONG, "no run is there")
    assert not (tmp_path / "out").exists()


def test_another_base_than_the_run_was_trained_on(
    command: Command, finished: Finished, tmp_path: Path
) -> None:
    other = random_base(tmp_path / "other", "llama")
    done = command("export", finished.run_dir, f"model.base={other}", "--to", tmp_path / "out")
    one_line(done, WRONG, f"model.base: {other} is not the base that run tiny was trained on")
    assert entries(tmp_path) == {"other"}


def test_a_disk_that_is_too_small(
    command: Command, finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = SimpleNamespace(disk_usage=lambda path: SimpleNamespace(free=1_000_000))
    monkeypatch.setattr(export_place, "shutil", small)
    done = command("export", finished.run_dir, "--to", tmp_path / "out")
    one_line(done, LACKING, f"to: {tmp_path} has 0.0 GB free, and 0.0 GB are written")
    assert entries(tmp_path) == set()


@contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """Writing fails in this process as on a disk that gets full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    former = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, former)


def test_a_disk_that_gets_full_leaves_nothing(
    command: Command, finished: Finished, tmp_path: Path
) -> None:
    with no_file_above(500_000):
        done = command("export", finished.run_dir, "--to", tmp_path / "out")
    one_line(done, LACKING, f"{tmp_path / 'out'}: cannot be written: ", "File too large")
    assert entries(tmp_path) == set()


def test_two_commands_do_not_write_one_folder(
    command: Command, finished: Finished, tmp_path: Path
) -> None:
    with locked(tmp_path / ".out.exporting.lock"):
        done = command("export", finished.run_dir, "--to", tmp_path / "out")
    one_line(done, WRONG, "another process is exporting to ")
    assert entries(tmp_path) == {".out.exporting.lock"}


def test_a_killed_command_is_given_again(
    command: Command, finished: Finished, tmp_path: Path
) -> None:
    out, building = tmp_path / "out", tmp_path / ".out.exporting"
    killed = start("export", finished.run_dir, "--to", out, "--answers", "4")
    wait_until(lambda: list(building.glob("*/model.safetensors")), "weights that are written")
    killed.send_signal(signal.SIGKILL)
    assert killed.end().code != 0
    assert entries(tmp_path) == {".out.exporting", ".out.exporting.lock"}
    (building / "left").mkdir(exist_ok=True)
    done = command("export", finished.run_dir, "--to", out, "--answers", "1")
    assert done.code == 0 and entries(tmp_path) == {"out"}, done.err


def test_what_does_not_load_as_it_was_is_rejected(
    command: Command, finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "rendered_ids", lambda tokenizer: object())
    done = command("export", finished.run_dir, "--to", tmp_path / "out", "--answers", "0")
    told = one_line(done, FAILED, "out.rejected: not fit for use: its tokenizer or template")
    assert "full log" in told and entries(tmp_path) == {"out.rejected"}
