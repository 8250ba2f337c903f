"""Probes of `orpo-ray doctor`: what they see, that they end in time, and leave nothing."""

import errno
import http.server
import importlib.metadata
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
from s3_server import serve
from support import BASE, run_config

from orpo_ray.config import RunConfig, stage_configs
from orpo_ray.config.model import ModelConfig
from orpo_ray.doctor.facts import ASKED, Asked, Cards, Facts, Hub
from orpo_ray.doctor.limited import limited
from orpo_ray.doctor.marker import holds, leave_marker, nearest, remove_marker
from orpo_ray.doctor.probes import (
    base,
    disks,
    gpus,
    hub,
    kernels,
    ray_state,
    settings,
    software,
    storage,
    system,
)
from orpo_ray.doctor.server import Probe, gather
from orpo_ray.doctor.urls import is_web_url
from orpo_ray.errors import ResourceError
from orpo_ray.models.hardware import CPU, Hardware, choose_numerics

SOON_S = 0.5


def everything(folder: Path) -> list[tuple[str, int]]:
    """All folders below a folder, and all files with the time of their last change."""
    return sorted(
        (str(path), path.stat().st_mtime_ns if path.is_file() else 0) for path in folder.rglob("*")
    )


# --- limits of time -------------------------------------------------------------------------------


def hang() -> bytes:
    signal.pause()
    return b"never"


def die() -> bytes:
    os.kill(os.getpid(), signal.SIGKILL)
    return b"never"


def fail() -> bytes:
    raise RuntimeError("CUDA error:\n  no kernel image")


def litter() -> bytes:
    os.write(1, b"a library says something")
    Path(tempfile.mkdtemp(), "left").touch()
    return hang()


def test_what_a_probe_answers_comes_back() -> None:
    assert limited(lambda: b'{"a": 1}', 60).answer == b'{"a": 1}'
    assert limited(lambda: b"x" * 2**20, 60).answer == b"x" * 2**20


def test_a_probe_that_hangs_is_killed_and_its_temporary_files_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    began = time.monotonic()
    outcome = limited(litter, SOON_S)
    assert (outcome.answer, outcome.problem) == (b"", "no answer within 0.5 s")
    assert SOON_S <= time.monotonic() - began < 60
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("work", "problem"),
    [
        (die, "its process died (exit code -9)"),
        (fail, "RuntimeError: CUDA error: no kernel image"),
    ],
)
def test_a_probe_that_crashes_or_fails_says_so(work: Any, problem: str) -> None:
    assert limited(work, 60).problem == problem


def test_one_probe_that_hangs_costs_the_others_nothing() -> None:
    cards = Cards(on_bus=3)
    probes = [
        Probe("storage", Any, SOON_S, lambda asked, facts: hang()),
        Probe("cards", Cards, 60, lambda asked, facts: cards),
        Probe("hub", Any, 60, lambda asked, facts: fail()),
    ]
    facts = gather(Asked(), probes)
    assert facts.cards == cards
    assert facts.failures == {
        "storage": "no answer within 0.5 s",
        "hub": "RuntimeError: CUDA error: no kernel image",
    }


def test_all_probes_together_end_in_time() -> None:
    probes = [Probe("storage", Any, 60, lambda asked, facts: hang()) for _ in range(3)]
    began = time.monotonic()
    gather(Asked(), probes, total_s=SOON_S)
    assert time.monotonic() - began < 60


def test_a_probe_knows_what_those_before_it_found() -> None:
    cards = Cards(on_bus=2)
    seen = Probe("ray", Any, 60, lambda asked, facts: {"cards": facts.cards.on_bus})
    assert gather(Asked(), [Probe("cards", Cards, 60, lambda *_: cards), seen]).ray == {"cards": 2}


# --- software and system --------------------------------------------------------------------------


def test_what_is_supported_is_what_the_package_requires() -> None:
    seen = software.look()
    assert seen.packages["torch"] == importlib.metadata.version("torch")
    assert seen.supported["torch"] == ">=2.11" and seen.supported["python"] == "<3.14,>=3.11"
    assert "ray" in seen.supported and "gguf" not in seen.supported, "that is an extra"


def test_the_system_is_read_below_its_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_P2P_DISABLE", "1")
    for name in ("dev/shm", "sys/class/infiniband/mlx5_0"):
        (tmp_path / name).mkdir(parents=True)
    plain = system.look(Asked(), tmp_path)
    (tmp_path / ".dockerenv").touch()
    shut = system.look(Asked(), tmp_path)
    assert (plain.in_container, shut.in_container, shut.has_infiniband) == (False, True, True)
    assert shut.variables["NCCL_P2P_DISABLE"] == "1" and "127.0.0.1" in shut.interfaces["lo"]
    assert system.look(Asked(address="10.0.0.1")).address == "10.0.0.1"


# --- GPUs -----------------------------------------------------------------------------------------


def pci(root: Path, *cards: tuple[str, str]) -> Path:
    for number, (vendor, kind) in enumerate(cards):
        folder = root / "sys/bus/pci/devices" / f"0000:0{number}:00.0"
        folder.mkdir(parents=True)
        (folder / "vendor").write_text(f"{vendor}\n")
        (folder / "class").write_text(f"{kind}\n")
    return root


TWO = (("0x10de", "0x030000"), ("0x10de", "0x030200"), ("0x10de", "0x040300"), ("0x8086", "0x0300"))
"""A display card, one without a display, the first one's sound, and another maker's card."""


def says(code: int, out: str, err: str = "") -> gpus.Run:
    def run(words: Sequence[str]) -> "subprocess.CompletedProcess[str]":
        return subprocess.CompletedProcess(words, code, out, err)

    return run


def test_cards_are_counted_on_the_bus_and_named_by_the_driver(tmp_path: Path) -> None:
    out = "580.95.05, NVIDIA GeForce RTX 4090\n580.95.05, NVIDIA GeForce RTX 4090\n"
    names = ("NVIDIA GeForce RTX 4090",) * 2
    seen = gpus.look_at_cards(pci(tmp_path, *TWO), says(0, out))
    assert seen == Cards(on_bus=2, driver="580.95.05", names=names)


def test_a_driver_that_does_not_work_is_quoted(tmp_path: Path) -> None:
    told = "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n"
    seen = gpus.look_at_cards(pci(tmp_path, *TWO), says(9, told))
    assert (seen.on_bus, seen.problem) == (2, told.strip())
    assert gpus.look_at_cards(tmp_path, says(0, "")).problem == "nvidia-smi lists no card"


def test_a_driver_that_is_not_there_or_hangs(tmp_path: Path) -> None:
    def absent(words: Sequence[str]) -> Any:
        raise FileNotFoundError(words[0])

    def hangs(words: Sequence[str]) -> Any:
        raise subprocess.TimeoutExpired(list(words), 10)

    assert gpus.look_at_cards(pci(tmp_path, *TWO), absent) == Cards(on_bus=2)
    assert "does not answer" in gpus.look_at_cards(tmp_path, hangs).problem


# --- kernels --------------------------------------------------------------------------------------


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


def test_four_bits_compute_what_their_weights_say(on_cpu: None) -> None:
    seen = kernels.try_nf4()
    assert (seen.device, seen.dtype) == ("cpu", "float32")
    assert 0 < max(seen.forward, seen.backward) < seen.bound < 1e-5
    assert 0.14 < seen.rounding < seen.rounding_bound, "half of NF4's widest gap is 0.152"


def test_a_kernel_that_is_wrong_is_seen(on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    right = bitsandbytes.nn.Linear4bit.forward
    monkeypatch.setattr(
        bitsandbytes.nn.Linear4bit, "forward", lambda self, rows: right(self, rows) * 1.001
    )
    seen = kernels.try_nf4()
    assert min(seen.forward, seen.backward) == pytest.approx(1e-3, rel=0.01)
    assert min(seen.forward, seen.backward) > seen.bound


def test_a_cpu_has_no_flash_attention(on_cpu: None) -> None:
    seen = kernels.try_attention()
    assert (seen.device, seen.is_flash) == ("cpu", False)


# --- disks and storage ----------------------------------------------------------------------------


def test_a_disk_is_timed_and_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "ray").mkdir()
    before = everything(tmp_path)
    kept, cache, rays = disks.look(
        Asked(storage=str(tmp_path / "not/yet"), ray_folder=str(tmp_path / "ray"))
    )
    assert everything(tmp_path) == before
    assert (kept.what, kept.path, kept.problem) == ("storage", str(tmp_path), "")
    assert kept.write_bytes_per_s and kept.read_bytes_per_s
    assert (rays.path, rays.write_bytes_per_s) == (str(tmp_path / "ray"), None), "one disk, once"
    assert cache.what == "hub cache" and kept.free_bytes > 0


def test_a_bucket_is_no_disk_of_this_machine(tmp_path: Path) -> None:
    asked = Asked(storage="s3://bucket/runs", ray_folder=str(tmp_path))
    assert [disk.what for disk in disks.look(asked)] == ["hub cache", "Ray's files"]


def test_a_storage_is_tried_and_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    for place in ("runs", "runs/not/yet"):
        before = everything(tmp_path / "runs")
        seen = storage.look(Asked(storage=str(tmp_path / place)))
        assert seen is not None and seen.problem == "" and seen.sees_marker is None
        assert everything(tmp_path / "runs") == before
    assert storage.look(Asked()) is None


def test_a_storage_that_is_a_file_is_refused_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "runs").touch()
    seen = storage.look(Asked(storage=str(tmp_path / "runs")))
    assert seen is not None
    assert seen.problem.startswith(f"{tmp_path}/runs/_seen-")
    assert seen.problem.endswith(": Not a directory")
    assert seen.error == "ENOTDIR"
    (disk, *_) = disks.look(Asked(storage=str(tmp_path / "runs"), ray_folder=str(tmp_path)))
    assert (disk.problem, disk.error) == ("Not a directory", "ENOTDIR")


def test_no_other_owner_helps_root(monkeypatch: pytest.MonkeyPatch) -> None:
    refused, full = PermissionError(errno.EACCES, "no"), OSError(errno.ENOSPC, "full")
    for user, names in ((1000, ["EACCES", "ENOSPC"]), (0, ["", "ENOSPC"])):
        monkeypatch.setattr(os, "geteuid", lambda user=user: user)
        assert [disks.name_of(error) for error in (refused, full)] == names
    assert disks.name_of(OSError("without a number")) == ""


def test_a_marker_is_seen_by_those_who_share_the_storage(tmp_path: Path) -> None:
    shared, other = str(tmp_path / "shared"), str(tmp_path / "other")
    (tmp_path / "shared").mkdir()
    marker = leave_marker(shared)
    assert holds(shared, marker) and not holds(shared, marker.replace("shared", "other"))
    seen = storage.look(Asked(storage=shared, marker=marker))
    assert seen is not None and seen.sees_marker
    remove_marker(shared, marker)
    assert not holds(shared, marker)
    remove_marker(shared, marker)
    assert list((tmp_path / "shared").iterdir()) == []
    (tmp_path / "other").touch()
    assert leave_marker(other) == "", "why is for the probe of the storage to say"


def test_the_nearest_folder_is_one_that_exists(tmp_path: Path) -> None:
    assert nearest(tmp_path / "a" / "b") == tmp_path
    assert nearest(Path("not/here")) == Path.cwd()


def test_a_bucket_is_tried_and_neither_it_nor_the_cache_keeps_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with serve() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        place = "s3://bucket/runs"
        marker = leave_marker(place)
        assert marker.startswith(place) and len(server.bucket.under("")) == 1
        seen = storage.look(Asked(storage=place, marker=marker))
        assert seen is not None and (seen.problem, seen.sees_marker) == ("", True)
        remove_marker(place, marker)
        assert server.bucket.under("") == {}
        methods = [method for method, _ in server.bucket.requests]
        assert {"PUT", "GET"} <= set(methods)
        missing = storage.look(Asked(storage="s3://nowhere/runs"))
        assert missing is not None and "there is no bucket nowhere" in missing.problem
    assert list(tmp_path.iterdir()) == []


# --- bases ----------------------------------------------------------------------------------------


def base_of(place: str | Path, **settings: Any) -> Any:
    return base.look(Asked(model=ModelConfig(base=str(place), **settings)), None)


def test_the_template_and_the_end_of_a_base() -> None:
    seen = base_of(BASE)
    assert (seen.problem, seen.has_own_template, seen.end) == ("", True, "<|im_end|>")
    other = base_of(BASE, chat_template="llama3")
    assert other.template == "llama3" and other.said[-1].startswith("model.chat_template: llama3")
    assert base.look(Asked(), None) is None


def test_a_base_without_a_template_and_one_that_is_none(tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(BASE, bare)
    (bare / "chat_template.jinja").unlink()
    seen = base_of(bare)
    assert (seen.template, seen.has_own_template) == ("plain", False)
    (tmp_path / "none").mkdir()
    assert base_of(tmp_path / "none").problem.startswith("model.base: ")
    (tmp_path / "x.gguf").touch()
    assert "converts" in base_of(tmp_path / "x.gguf").skipped
    assert "bucket" in base_of("s3://bucket/base").skipped


@pytest.mark.parametrize("offline", [True, False])
def test_a_base_that_no_hub_can_send_is_not_waited_for(
    offline: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "_load", lambda model: pytest.fail("it was asked for"))
    away = Hub(endpoint="https://huggingface.co", offline=offline, has_base=False)
    seen = base.look(Asked(model=ModelConfig(base="no/such")), away)
    assert seen is not None and seen.skipped == "it is not in the cache, and no hub answers"


# --- the hub --------------------------------------------------------------------------------------


def test_a_hub_answers_or_says_what_is_in_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "*")
    with dashboard(404, b"") as url:
        seconds, problem = hub.ask(url)
        assert seconds is not None and problem == ""
    assert "refused" in hub.ask(url)[1]
    with greeting(b"SSH-2.0-OpenSSH\r\n") as url:
        assert "SSH-2.0-OpenSSH" in hub.ask(url)[1]
    assert hub.ask("foo") == (None, "it is no URL")


def test_a_search_for_the_address_that_hangs_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *words, **options: released.wait())
    monkeypatch.setenv("NO_PROXY", "*")
    try:
        answer = hub.ask("http://hub.example", total_s=SOON_S)
    finally:
        released.set()
    assert answer == (None, "its address is not found within 0.5 s")


def test_a_name_that_the_hub_refuses_fails_the_base_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert hub.look(Asked(model=ModelConfig(base="no such name"))).has_base is None


def test_an_endpoint_that_the_library_of_the_hub_cannot_read_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://hub:port")
    seen = gather(Asked(), [Probe("hub", Hub, 60, lambda asked, facts: afresh(asked))]).hub
    assert seen is not None and seen.endpoint == "http://hub:port" and "port" in seen.problem


def afresh(asked: Asked) -> Hub:
    """The hub as a process sees it that has not imported its library; it is a probe's own."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]:
        del sys.modules[name]
    return hub.look(asked)


@pytest.mark.parametrize(
    ("text", "is_one"),
    [
        ("http://127.0.0.1:8265", True),
        ("https://huggingface.co", True),
        ("http://[::1]:8265", True),
        ("garbage", False),
        ("127.0.0.1:8265", False),
        ("localhost:8265", False),
        ("ray://head:10001", False),
        ("http://", False),
        ("http://head:port", False),
        ("http://[head", False),
        ("", False),
    ],
)
def test_what_is_a_url_of_a_server(text: str, is_one: bool) -> None:
    assert is_web_url(text) is is_one


# --- settings -------------------------------------------------------------------------------------

H100 = Hardware(device="cuda", name="H100", bfloat16=True, flash_attention=True, memory=2**36)
T4 = Hardware(device="cuda", name="T4", bfloat16=False, flash_attention=False, memory=2**34)
WHOLE = {"model": {"quantization": "none"}, "adapter": {"kind": "none"}}
GALORE = {"training": {"optimizer": "galore-adamw-8bit", "weight_decay": 0}, **WHOLE}
FLASH = {"model": {"attention": "flash_attention_2"}}


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """All packages are there, as far as their names are looked for."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())


@pytest.mark.parametrize(
    ("sections", "gpus", "begins"),
    [
        (GALORE, [], ["training.optimizer: galore-adamw-8bit runs on a GPU only; "]),
        (GALORE, [H100], []),
        (FLASH, [], ["model.attention: flash_attention_2 needs a GPU"]),
        (FLASH, [H100], []),
        (FLASH, [H100, T4], ["model.attention: flash_attention_2 needs a GPU"]),
        ({"model": {"dtype": "float16"}}, [], ["model.dtype: float16 trains only on a GPU"]),
        ({"model": {"dtype": "float16"}, "scale": {"gpus_per_worker": 0}}, [T4], ["model.dtype: "]),
        ({"model": {"dtype": "bfloat16"}}, [T4], ["model.dtype: T4 has no bfloat16; "]),
        ({"model": {"dtype": "bfloat16"}, "scale": {"gpus_per_worker": 0}}, [T4], []),
        ({**GALORE, "scale": {"gpus_per_worker": 1}}, [], []),
        ({}, [], []),
    ],
)
def test_what_a_server_cannot_compute_is_what_a_run_refuses(
    installed: None, tmp_path: Path, sections: Any, gpus: list[Hardware], begins: list[str]
) -> None:
    seen = settings.judged([run_config(tmp_path, **sections)], gpus)
    assert (seen.has_gpu, seen.missing) == (bool(gpus), ())
    assert len(seen.unfit) == len(begins)
    assert all(told.startswith(start) for told, start in zip(seen.unfit, begins, strict=True)), (
        seen.unfit
    )


def test_packages_and_keys_are_missing_whatever_the_workers_compute_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    tracked = {**GALORE, "training": {**GALORE["training"], "trackers": ["wandb"]}}
    for found in ([], [H100]):
        seen = settings.judged([run_config(tmp_path, **tracked)], found)
        assert seen.missing == (
            "training.trackers: wandb is not installed; pip install wandb",
            "training.optimizer: galore-adamw-8bit needs the package galore-torch; pip install "
            "'orpo_ray[galore]'",
        )
        assert seen.unfit == (), "each is said once"


def in_stages(config: RunConfig, *changes: dict[str, Any]) -> list[RunConfig]:
    return stage_configs(config.model_copy(update={"stages": changes}))


def test_every_stage_is_looked_at_and_a_message_comes_once(installed: None, tmp_path: Path) -> None:
    stages = in_stages(run_config(tmp_path), {"objective": {"kind": "sft"}}, FLASH, FLASH)
    seen = settings.judged(stages, [])
    with pytest.raises(ResourceError) as refused:
        choose_numerics(stages[1].model, CPU)
    assert seen.unfit == (str(refused.value),)
    assert settings.look(Asked()) is None


def test_the_runs_that_are_asked_about_travel_as_json(tmp_path: Path) -> None:
    config = run_config(tmp_path, **GALORE)
    asked = Asked(
        model=config.model, runs=(config, *in_stages(config, {"objective": {"kind": "dpo"}}, {}))
    )
    assert ASKED.validate_json(ASKED.dump_json(asked)) == asked


# --- Ray ------------------------------------------------------------------------------------------

SECRET = "0123456789abcdef"


@contextmanager
def dashboard(code: int, told: bytes) -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(code)
            self.end_headers()
            self.wfile.write(told)

        def log_message(self, *arguments: object) -> None:
            """Nothing is logged."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@contextmanager
def greeting(told: bytes) -> Iterator[str]:
    """A server of something else, which speaks first."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with suppress(OSError):  # the server was closed
                connection, _ = server.accept()
                with connection:
                    connection.sendall(told)
                    connection.recv(2**16)

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without a token, and no variable that names one."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / ".ray").mkdir()
    return tmp_path


def test_the_token_is_found_where_ray_and_we_look_and_its_text_is_not_told(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Asked(token_file="~/.ray/orpo-ray.token")
    assert ray_state.look(asked).token == ""
    rays, ours, named = home / ".ray/auth_token", home / ".ray/orpo-ray.token", home / "named"
    seen = []
    for file in (rays, ours, named):
        file.write_text(SECRET)
        file.chmod(0o600)
        if file == named:
            monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(named))
        seen.append(ray_state.look(asked))
    assert [state.token for state in seen] == [str(rays), str(ours), str(named)]
    assert {state.token_problem for state in seen} == {""}
    named.chmod(0o644)
    assert ray_state.look(asked).token_problem == "others may read it"
    named.write_text("\n")
    assert ray_state.look(asked).token_problem == "it is empty"
    named.unlink()
    assert ray_state.look(asked).token_problem == "it cannot be read: No such file or directory"
    monkeypatch.setenv("RAY_AUTH_TOKEN", SECRET)
    last = ray_state.look(asked)
    assert (last.token, last.token_problem) == ("RAY_AUTH_TOKEN", "")
    assert SECRET not in "".join(map(repr, [*seen, last]))


@pytest.mark.parametrize(
    ("code", "told", "answer"),
    [
        (200, json.dumps({"ray_version": "2.60.0"}).encode(), "open"),
        (401, b"", "asks for a token"),
        (200, b"<html>", "other"),
        (404, b"", "other"),
    ],
)
def test_what_a_dashboard_answers(home: Path, code: int, told: bytes, answer: str) -> None:
    with dashboard(code, told) as url:
        assert ray_state.look(Asked(dashboard=url)).answer == answer
    assert ray_state.look(Asked(dashboard=url)).answer == ""


def test_what_answers_at_no_dashboard(home: Path) -> None:
    with greeting(b"SSH-2.0-OpenSSH\r\n") as url:
        assert ray_state.look(Asked(dashboard=url)).answer == "other"
    for text in ("garbage", "http://head:port", "127.0.0.1:8265"):
        assert ray_state.look(Asked(dashboard=text)).answer == "no URL"


def test_facts_of_no_probe_are_empty() -> None:
    assert gather(Asked(), []) == Facts()
