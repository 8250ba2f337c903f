"""Where workers go, decided from a list of servers; no Ray is started here."""

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from orpo_ray.config import ScaleConfig
from orpo_ray.distributed import preflight
from orpo_ray.distributed.preflight import (
    Node,
    Placement,
    fit,
    place,
    runs_at_once,
    share_cores,
    wait_for_room,
)
from orpo_ray.errors import ConfigError, ResourceError

LAPTOP = [Node("127.0.0.1", cpus=2, gpus=0, is_driver=True)]
ONE_GPU = [Node("10.0.0.1", cpus=16, gpus=1, is_driver=True)]
SERVER = [Node("10.0.0.1", cpus=16, gpus=4, is_driver=True)]
HEAD_AND_SERVERS = [
    Node("10.0.0.1", 4, 0, is_driver=True),
    Node("10.0.0.2", 32, 8),
    Node("10.0.0.3", 32, 8),
]
CPU_SERVERS = [
    Node("10.0.0.1", 2, 0, is_driver=True),
    Node("10.0.0.2", 4, 0),
    Node("10.0.0.3", 8, 0),
]


def scale(**settings: Any) -> ScaleConfig:
    return ScaleConfig.model_validate(settings)


def placed(
    workers: int,
    cpus: float = 1.0,
    gpus: float = 0.0,
    nodes: int = 1,
    uses_ray: bool = True,
) -> Placement:
    return Placement(workers=workers, cpus=cpus, gpus=gpus, nodes=nodes, uses_ray=uses_ray)


FITS: dict[str, tuple[dict[str, Any], list[Node], Placement]] = {
    "auto, no GPU": ({}, LAPTOP, placed(2)),
    "auto, no GPU, one core": (
        {},
        [Node("127.0.0.1", 1, 0, True)],
        placed(1, uses_ray=False),
    ),
    "auto, no GPU, room for many": ({}, CPU_SERVERS, placed(2)),
    "auto, one GPU": ({}, ONE_GPU, placed(1, gpus=1.0, uses_ray=False)),
    "auto, every GPU of a server": ({}, SERVER, placed(4, gpus=1.0)),
    "auto, every GPU of a cluster": ({}, HEAD_AND_SERVERS, placed(16, gpus=1.0, nodes=2)),
    "auto, the GPU is elsewhere": (
        {},
        [Node("10.0.0.1", 4, 0, True), Node("10.0.0.2", 8, 1)],
        placed(1, gpus=1.0),
    ),
    "auto, tenths of a CPU lose nothing to rounding": (
        {"cpus_per_worker": 1.1, "gpus_per_worker": 0},
        [Node("10.0.0.1", cpus=2.2, gpus=0, is_driver=True)],
        placed(2, cpus=1.1),
    ),
    "one, with half a GPU": (
        {"workers": 1, "gpus_per_worker": 0.5},
        SERVER,
        placed(1, gpus=0.5, uses_ray=False),
    ),
    "auto, CPUs bound the GPUs": ({"cpus_per_worker": 5}, SERVER, placed(3, cpus=5.0, gpus=1.0)),
    "auto, GPUs not wanted": ({"gpus_per_worker": 0}, SERVER, placed(2)),
    "one of many": ({"workers": 1}, SERVER, placed(1, gpus=1.0, uses_ray=False)),
    "one, by Ray": ({"workers": 1, "ray": True}, LAPTOP, placed(1)),
    "one, with DeepSpeed": (
        {"workers": 1, "deepspeed": {"stage": 2}},
        LAPTOP,
        placed(1),
    ),
    "one, without DeepSpeed": (
        {"workers": 1, "deepspeed": "none"},
        LAPTOP,
        placed(1, uses_ray=False),
    ),
    "half cores": ({"workers": 3, "cpus_per_worker": 0.5}, LAPTOP, placed(3, cpus=0.5)),
    "tenths of cores": (
        {"workers": 20, "cpus_per_worker": 0.1},
        LAPTOP,
        placed(20, cpus=0.1),
    ),
    "all there is": ({"workers": 2}, LAPTOP, placed(2)),
    "over two servers": ({"workers": 9}, HEAD_AND_SERVERS, placed(9, gpus=1.0, nodes=2)),
    "the largest server first": ({"workers": 8}, CPU_SERVERS, placed(8)),
    "over all servers": ({"workers": 14}, CPU_SERVERS, placed(14, nodes=3)),
}


def test_the_first_ray_train_is_refused_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RAY_TRAIN_V2_ENABLED", "0")
    monkeypatch.setattr(preflight, "start_ray", lambda **how: pytest.fail("Ray was started"))
    with pytest.raises(ConfigError, match="RAY_TRAIN_V2_ENABLED=0 in the environment"):
        place(scale(workers=2), pytest.fail)


@pytest.mark.parametrize("name", FITS)
def test_workers_that_fit(name: str) -> None:
    settings, nodes, placement = FITS[name]
    assert fit(scale(**settings), nodes) == placement


@pytest.mark.parametrize(
    ("workers", "cores", "each"), [(2, 2, 1.0), (2, 9, 4.0), (3, 2, 0.5), (1, 8, 8.0)]
)
def test_workers_share_the_cores_of_a_machine(workers: int, cores: float, each: float) -> None:
    placement = placed(workers, cpus=min(each, 1.0))
    assert share_cores(placement, cores) == replace(placement, cpus=each)


def test_workers_with_gpus_leave_the_cores_to_the_data() -> None:
    placement = placed(2, gpus=1.0)
    assert share_cores(placement, 64) == placement


@pytest.mark.parametrize(
    ("settings", "owns", "others", "cpus", "said"),
    [
        ({}, True, False, 4.0, "workers 2: 4 CPU each, no GPU found"),
        ({"workers": 4}, True, False, 2.0, "workers 4: 2 CPU each, no GPU found"),
        ({}, True, True, 1.0, "workers 2: 1 CPU each, no GPU found"),
        ({}, False, False, 1.0, "workers 2: 1 CPU each, no GPU found"),
        ({"cpus_per_worker": 3}, True, False, 3.0, "workers 2: 3 CPU each, no GPU found"),
        ({"workers": 8}, True, False, 1.0, None),
    ],
    ids=[
        "all of it",
        "four workers",
        "other runs of the command",
        "a Ray of somebody else",
        "as set",
        "nothing to share",
    ],
)
def test_cores_are_shared_where_the_command_has_the_machine(
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    owns: bool,
    others: bool,
    cpus: float,
    said: str | None,
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(preflight, "has_ray", lambda: True)
    monkeypatch.setattr(preflight, "start_ray", lambda **how: None)
    monkeypatch.setattr(preflight, "has_ray_for_itself", lambda: owns)
    monkeypatch.setattr(preflight, "cluster_nodes", lambda: [Node("127.0.0.1", 8, 0, True)])
    heard: list[str] = []
    assert place(scale(**settings), heard.append, beside_others=others).cpus == cpus
    assert heard == ([] if said is None else [said])


@pytest.mark.parametrize("nodes", [LAPTOP, SERVER, HEAD_AND_SERVERS, CPU_SERVERS])
@pytest.mark.parametrize("settings", [{}, {"gpus_per_worker": 0}, {"cpus_per_worker": 0.5}])
def test_auto_never_asks_for_more_than_there_is(
    settings: dict[str, Any], nodes: list[Node]
) -> None:
    placement = fit(scale(**settings), nodes)
    assert placement.workers * placement.cpus <= sum(node.cpus for node in nodes)
    assert placement.workers * placement.gpus <= sum(node.gpus for node in nodes)


TOO_MUCH: dict[str, tuple[dict[str, Any], list[Node], tuple[str, ...]]] = {
    "CPUs": (
        {"workers": 64},
        LAPTOP,
        ("64 workers with 1 CPU each", "room for 2", "127.0.0.1: 2 CPU, 0 GPU"),
    ),
    "GPUs where there is none": (
        {"workers": 2, "gpus_per_worker": 1},
        LAPTOP,
        ("2 workers with 1 CPU and 1 GPU each", "room for 0", "127.0.0.1: 2 CPU, 0 GPU"),
    ),
    "auto, GPUs where there is none": (
        {"gpus_per_worker": 1},
        LAPTOP,
        ("1 worker with 1 CPU and 1 GPU each", "room for 0"),
    ),
    "GPUs over servers": (
        {"workers": 17},
        HEAD_AND_SERVERS,
        (
            "17 workers",
            "room for 16",
            "10.0.0.1: 4 CPU, 0 GPU; 10.0.0.2: 32 CPU, 8 GPU; 10.0.0.3: 32 CPU, 8 GPU",
        ),
    ),
    "a share of a GPU": (
        {"workers": 1, "gpus_per_worker": 0.5},
        LAPTOP,
        ("1 worker with 1 CPU and 0.5 GPU each", "room for 0"),
    ),
    "a worker larger than any server": (
        {"workers": 1, "cpus_per_worker": 9},
        CPU_SERVERS,
        ("1 worker with 9 CPU each", "room for 0"),
    ),
    "servers that only together would do": (
        {"workers": 2, "cpus_per_worker": 5},
        CPU_SERVERS,
        ("2 workers with 5 CPU each", "room for 1"),
    ),
    "no server at all": ({}, [], ("room for 0",)),
}


@pytest.mark.parametrize("name", TOO_MUCH)
def test_workers_that_do_not_fit_are_refused_with_what_was_asked_and_what_is_there(
    name: str,
) -> None:
    settings, nodes, told = TOO_MUCH[name]
    with pytest.raises(ResourceError) as caught:
        fit(scale(**settings), nodes)
    line = str(caught.value)
    assert line.startswith("scale.workers: ") and "\n" not in line
    for part in told:
        assert part in line, (part, line)
    assert caught.value.exit_code == 3


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a named cluster; a start of Ray fails the test."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("Ray is started")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(preflight, "start_ray", refuse)


@pytest.mark.parametrize(
    "settings", [{}, {"deepspeed": "none"}, {"cpus_per_worker": 0.5}, {"gpus_per_worker": 0}]
)
def test_one_worker_is_this_process_and_needs_no_ray(
    settings: dict[str, Any], no_ray: None
) -> None:
    placement = place(scale(workers=1, **settings), lambda line: None)
    assert (placement.workers, placement.nodes, placement.uses_ray) == (1, 1, False)
    assert (placement.gpus == 0) == ("gpus_per_worker" in settings)


def test_one_worker_that_asks_for_more_than_this_machine_has_is_refused(no_ray: None) -> None:
    with pytest.raises(
        ResourceError,
        match=r"^scale\.cpus_per_worker: 5000, but this machine has \d+ CPU; lower it$",
    ):
        place(scale(workers=1, cpus_per_worker=5000), lambda line: None)


@pytest.mark.parametrize(
    "settings",
    [{}, {"workers": 2}, {"workers": 1, "ray": True}, {"workers": 1, "deepspeed": {"stage": 0}}],
    ids=str,
)
def test_all_else_asks_the_cluster(settings: dict[str, Any], no_ray: None) -> None:
    with pytest.raises(AssertionError, match="Ray is started"):
        place(scale(**settings), lambda line: None)


def test_one_worker_of_a_named_cluster_is_placed_there(
    no_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(AssertionError, match="Ray is started"):
        place(scale(workers=1), lambda line: None)


@pytest.mark.parametrize(
    ("settings", "nodes", "said"),
    [
        ({}, LAPTOP, ["workers 2: 1 CPU each, no GPU found"]),
        ({}, SERVER, ["workers 4: 1 GPU each"]),
        ({"workers": 2}, LAPTOP, []),
    ],
    ids=str,
)
def test_what_auto_came_to_is_announced(
    settings: dict[str, Any], nodes: list[Node], said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "start_ray", lambda **kwargs: None)
    monkeypatch.setattr(preflight, "has_ray", lambda: False)
    monkeypatch.setattr(preflight, "cluster_nodes", lambda: nodes)
    heard: list[str] = []
    place(scale(**settings), heard.append)
    assert heard == ["starting Ray on this machine", *said]


def test_a_refusal_needs_no_torch() -> None:
    code = "import sys, orpo_ray.distributed.preflight; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("workers", "cpus", "gpus", "nodes", "at_once"),
    [
        (1, 1, 0, [(2, 0)], 2),
        (2, 1, 0, [(2, 0)], 1),
        (2, 1, 0, [(3, 0)], 1),  # one is left over
        (2, 0.5, 0, [(2, 0)], 2),
        (1, 1, 1, [(16, 4)], 4),
        (1, 4, 1, [(8, 4)], 2),  # the CPUs are scarcer
        (1, 1, 0.5, [(16, 4)], 8),
        (4, 1, 1, [(16, 8), (16, 2)], 2),
        (2, 1, 1, [(16, 3), (16, 3)], 3),  # the third spans both servers
        (2, 1, 1, [(16, 2), (0, 2)], 1),
    ],
)
def test_as_many_runs_at_once_as_the_cluster_holds(
    workers: int, cpus: float, gpus: float, nodes: list[tuple[float, float]], at_once: int
) -> None:
    cluster = [Node(str(number), *has) for number, has in enumerate(nodes)]
    placement = fit(
        ScaleConfig(workers=workers, cpus_per_worker=cpus, gpus_per_worker=gpus), cluster
    )
    assert runs_at_once(placement, cluster) == at_once


class Busy:
    """A cluster of two servers with its own clock; `free` has its free CPUs by second."""

    def __init__(self, *free: float) -> None:
        self.now, self.said, self._free = 0.0, [], list(free)

    def free(self) -> list[Node]:
        cpus = self._free[min(int(self.now), len(self._free) - 1)]
        return [Node("10.0.0.1", min(cpus, 1), 0), Node("10.0.0.2", max(cpus - 1, 0), 0)]

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def wait(self, queue_timeout: float) -> None:
        wait_for_room(
            placed(2),
            queue_timeout,
            self.said.append,
            self.free,
            lambda: self.now,
            self.sleep,
        )


def test_where_there_is_room_nothing_is_said() -> None:
    busy = Busy(2)
    busy.wait(0)
    assert (busy.now, busy.said) == (0, [])


def test_a_busy_cluster_is_waited_for_and_it_is_said_what_for() -> None:
    busy = Busy(0, 0, 1, 1, 2)
    busy.wait(10)
    waiting = "the cluster is busy; waiting for room for 2 workers with 1 CPU each; free are "
    assert busy.said == [
        waiting + "10.0.0.1: 0 CPU, 0 GPU; 10.0.0.2: 0 CPU, 0 GPU",
        waiting + "10.0.0.1: 1 CPU, 0 GPU; 10.0.0.2: 0 CPU, 0 GPU",
        "there is room now, after 4 s",
    ]


@pytest.mark.parametrize("timeout", [0, 3])
def test_a_cluster_that_stays_busy_is_given_up(timeout: float) -> None:
    busy = Busy(1)
    with pytest.raises(
        ResourceError, match=f"no room within {timeout} s for 2 workers with 1 CPU each"
    ) as refused:
        busy.wait(timeout)
    assert busy.now == timeout and refused.value.exit_code == 3
