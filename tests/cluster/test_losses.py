"""Runs on three servers that lose a server, its cable or the head: they end in the same bytes."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from lan import SERVERS, Lan
from on_trio import Given, cluster, project
from project import weights
from support import Done, last_step, wait_until

pytestmark = pytest.mark.cluster

LONG = ["training.max_steps=60", "training.eval_every=30", "training.checkpoint_every=10"]
CUT_S = 30.0


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose storage all servers share."""
    return project(tmp_path_factory.mktemp("losses"))


@pytest.fixture(scope="module")
def unbroken(config: Path) -> str:
    """The result of the run on one machine, undisturbed."""
    words = [
        "train",
        config.name,
        *LONG,
        f"storage={config.parent}/alone",
        "scale.cpus_per_worker=1",
        "--json",
    ]
    done = Given(*words, cwd=config.parent).end()
    assert done.code == 0, done.err
    return weights(done.result["adapter"])


def submit(hosts: Path, config: Path, name: str) -> Given:
    return Given(
        "submit",
        "train",
        config.name,
        f"name={name}",
        *LONG,
        "--hosts",
        hosts,
        "--json",
        cwd=config.parent,
    )


def run_dir(config: Path, name: str) -> Path:
    return config.parent.parent / "shared" / name


def worker_besides_the_head(lan: Lan) -> int:
    """The number of a server, other than the head, on which a worker trains."""
    for number in SERVERS[1:]:
        if "ray::RayTrainWorker" in lan.ssh(number, "ps axww").stdout:
            return number
    raise AssertionError("both workers are on the head")


@contextmanager
def held_in_the_middle(folder: Path, lan: Lan) -> Iterator[None]:
    """Hold a run's workers when there is a checkpoint, so that a loss meets them at work."""

    def in_the_middle() -> bool:
        return any(folder.glob("checkpoints/step-*/MANIFEST.json")) and last_step(folder) > 12

    wait_until(in_the_middle, "a checkpoint is there")
    held = workers(lan)
    assert held, "the run has ended"
    send(signal.SIGSTOP, held)
    try:
        yield
    finally:
        send(signal.SIGCONT, held)


def workers(lan: Lan) -> list[psutil.Process]:
    """All processes that train, on any server."""
    servers = [psutil.Process(server.pid) for server in lan.running.values()]
    family = [process for server in servers for process in server.children(recursive=True)]
    return [process for process in family if trains(process)]


def trains(process: psutil.Process) -> bool:
    """Whether a process, which may have ended meanwhile, is a worker's."""
    with suppress(psutil.NoSuchProcess):
        return "ray::RayTrainWorker" in " ".join(process.cmdline())
    return False


def send(number: signal.Signals, processes: list[psutil.Process]) -> None:
    """Send a signal to the processes that are alive."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def went_on(done: Done, unbroken: str) -> None:
    assert done.code == 0, done.err
    assert any(line.startswith("resuming at step ") for line in done.said), done.err
    assert weights(done.result["adapter"]) == unbroken


def test_a_run_that_loses_a_server_goes_on_on_the_third(
    hosts: Path, config: Path, lan: Lan, unbroken: str
) -> None:
    run = submit(hosts, config, "killed")
    with held_in_the_middle(run_dir(config, "killed"), lan):
        lost = worker_besides_the_head(lan)
        lan.kill(lost)
    done = run.end()
    went_on(done, unbroken)
    assert "resuming from the last checkpoint (2 retries left)" in done.err
    lan.boot(lost)
    wait_until(
        lambda: all(server["joined"] for server in cluster("status", hosts)["servers"]),
        "it is back",
    )


def test_a_run_survives_a_cable_that_is_out_for_a_while(
    hosts: Path, config: Path, lan: Lan, unbroken: str
) -> None:
    run = submit(hosts, config, "cut")
    with held_in_the_middle(run_dir(config, "cut"), lan):
        lost = worker_besides_the_head(lan)
        lan.cut(lost, off=True)
    lan.wait(CUT_S)
    lan.cut(lost, off=False)
    went_on(run.end(), unbroken)


def test_after_a_restart_of_the_head_the_same_submit_goes_on(
    hosts: Path, config: Path, lan: Lan, unbroken: str
) -> None:
    run = submit(hosts, config, "headless")
    with held_in_the_middle(run_dir(config, "headless"), lan):
        lan.kill(SERVERS[0])
    lan.boot(SERVERS[0])
    cluster("up", hosts)
    told = run.end()
    assert told.code == 4 and "the cluster was started anew and has no job headless" in told.err
    went_on(submit(hosts, config, "headless").end(), unbroken)
