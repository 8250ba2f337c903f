"""The number of threads is that which computes fastest, and a resumed run keeps it."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from orpo_ray.config import ScaleConfig
from orpo_ray.training.set_threads import VARIABLE, set_threads, threads_set_by
from orpo_ray.training.threads import (
    are_worth_it,
    settle_threads,
    threads_restored,
    time_in_turns,
)
from orpo_ray.training.world import ALONE, World


class WithAnother(World):
    """A world of two, whose other process found that one thread is best."""

    def gather(self, value: Any) -> list[Any]:
        return [value, 1]


TWO = WithAnother(rank=0, size=2, local_rank=0)


class Machine:
    """A clock, and work that takes `seconds` by the number of threads at that time."""

    def __init__(self, seconds: Callable[[int], float]) -> None:
        self.now, self.seconds = 0.0, seconds
        self.tried: list[int] = []

    def clock(self) -> float:
        return self.now

    def work(self) -> None:
        threads = torch.get_num_threads()
        self.tried.append(threads)
        self.now += self.seconds(threads)

    def settle(self, recorded: int | None = None, world: World = ALONE) -> tuple[int, list[str]]:
        said: list[str] = []
        return settle_threads(recorded, self.work, world, said.append, self.clock), said


@pytest.fixture(autouse=True)
def four_cores(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(VARIABLE, raising=False)
    with threads_restored():
        torch.set_num_threads(4)
        yield


def test_threads_are_worth_it_if_they_are_clearly_faster() -> None:
    assert are_worth_it([1.0, 1.0, 9.0], [1.2, 1.2, 1.2])
    assert not are_worth_it([1.0, 1.0, 1.0], [1.05, 1.05, 9.0])


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (lambda threads: 1 / threads, 4),
        (lambda threads: 1 / min(threads, 2), 2),
        (lambda threads: 1.0, 1),
        (lambda threads: float(threads), 1),
    ],
    ids=["all cores are free", "two are", "one is", "threads get in each other's way"],
)
def test_threads_are_those_that_gain(seconds: Callable[[int], float], expected: int) -> None:
    count, said = Machine(seconds).settle()
    assert count == expected == torch.get_num_threads()
    found = "one for each core" if expected == 4 else "more are no faster on this machine now"
    noun = "thread" if expected == 1 else "threads"
    assert said == [f"{expected} {noun}: {found} ({VARIABLE} sets them)"]


def test_workers_take_the_same_number_of_threads() -> None:
    machine = Machine(lambda threads: 1 / threads)
    count, said = machine.settle(world=TWO)
    assert count == 1 == torch.get_num_threads()
    assert said == [f"1 thread each: more are no faster on this machine now ({VARIABLE} sets them)"]


def test_a_resumed_run_keeps_its_number_and_measures_nothing() -> None:
    machine = Machine(lambda threads: 1.0)
    assert machine.settle(recorded=2) == (2, [])
    assert torch.get_num_threads() == 2 and machine.tried == []
    count, said = machine.settle(recorded=16)
    assert count == 16, "what is recorded stays, for the next server"
    assert torch.get_num_threads() == 2
    assert said == ["2 threads: the run began with 16, which are not here"]
    torch.set_num_threads(1)
    assert machine.settle(2, TWO)[1] == ["1 thread each: the run began with 2, which are not here"]


@pytest.mark.parametrize(("cpus", "threads"), [("auto", None), (0.5, 1), (1, 1), (2.7, 2)])
def test_the_config_sets_threads_and_the_environment_comes_first(
    monkeypatch: pytest.MonkeyPatch, cpus: Any, threads: int | None
) -> None:
    scale = ScaleConfig(cpus_per_worker=cpus)
    assert threads_set_by(scale) == threads
    monkeypatch.setenv(VARIABLE, "3")
    assert threads_set_by(scale) == 3


@pytest.mark.parametrize("value", ["", "0", "all", "-1"])
def test_a_variable_that_sets_no_number_decides_nothing(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv(VARIABLE, value)
    assert set_threads() is None


def test_the_first_number_of_a_list_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "2,1")
    assert set_threads() == 2


def test_one_core_needs_no_measurement() -> None:
    torch.set_num_threads(1)
    machine = Machine(lambda threads: 1.0)
    assert machine.settle() == (1, [])
    assert machine.tried == []


def test_turns_alternate_and_end_early_if_they_take_long() -> None:
    short, long = Machine(lambda threads: 0.1), Machine(lambda threads: 2.0)
    assert [len(taken) for taken in time_in_turns((4, 2), short.work, short.clock)] == [3, 3]
    assert short.tried == [4, 2, 4, 2, 4, 2]
    assert time_in_turns((4, 2), long.work, long.clock) == [[2.0], [2.0]]


def test_the_process_gets_its_threads_back() -> None:
    with pytest.raises(ZeroDivisionError), threads_restored():
        torch.set_num_threads(1)
        1 / 0  # noqa: B018
    assert torch.get_num_threads() == 4
