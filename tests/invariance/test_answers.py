"""Answers by several Ray Data actors: those of one process, and errors in plain words."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from support import DEMO, Listener, run_config

from orpo_ray import api
from orpo_ray.distributed.generation import answers_by_actors
from orpo_ray.distributed.preflight import Placement
from orpo_ray.errors import ConfigError, RunError, StoppedError
from orpo_ray.runs.console import SILENT, Console

pytestmark = [pytest.mark.slow, pytest.mark.ray]

TWO = {"workers": 2, "gpus_per_worker": 0, "cpus_per_worker": 0.5}


def generate(storage: Path, name: str, **scale: object) -> bytes:
    """The file that the base's answers fill."""
    config = run_config(storage, scale={"workers": 1, **scale})
    out = storage / name
    prompts = DEMO / "h1.jsonl"
    api.generate(config, prompts, out, model="base", max_new_tokens=8, console=Listener())
    return out.read_bytes()


def test_two_actors_give_what_one_process_gives(ray_session: None, tmp_path: Path) -> None:
    assert generate(tmp_path, "two.jsonl", **TWO) == generate(tmp_path, "one.jsonl")


def load_for(kind: str) -> Callable[[], Callable[[str], str]]:
    """Loads what ends in a way; a function inside a function travels to the actor whole."""

    def answer(batch: str) -> str:
        if kind == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "broken":
            raise TypeError("a fault in the code")
        if kind == "refused":
            raise ConfigError("model.base: it is broken")
        return batch

    return lambda: answer


class Stops(Console):
    def stop_requested(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("kind", "console", "expected", "told"),
    [
        ("killed", SILENT, RunError, "an actor that answers was lost; the same command"),
        ("broken", SILENT, RunError, "a fault in the code"),
        ("refused", SILENT, ConfigError, "it is broken"),
        ("well", Stops(), StoppedError, "stopped here"),
    ],
)
def test_what_ends_the_actors_is_said_in_plain_words(
    kind: str, console: Console, expected: type[Exception], told: str, ray_session: None
) -> None:
    placement = Placement(workers=1, cpus=0.5, gpus=0, nodes=1, uses_ray=True)
    with pytest.raises(expected, match=told):
        list(answers_by_actors(placement, load_for(kind), ["{}"], console, "stopped here"))
