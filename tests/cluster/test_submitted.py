"""Runs submitted to the three servers from a fourth machine next to them."""

import contextlib
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.request import Request, urlopen

import psutil
import pytest
from lan import GATEWAY, SERVERS, Lan, address
from on_trio import Given, project
from project import weights
from ray_head import free_ports
from support import ENVIRONMENT, last_step, wait_until

pytestmark = pytest.mark.cluster

MOTO = Path(__file__).parents[2] / ".moto" / "bin" / "moto_server"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose storage all servers share."""
    return project(tmp_path_factory.mktemp("project"))


def submit(hosts: Path, config: Path, *words: str, command: str = "train") -> Given:
    return Given(
        "submit", command, config.name, *words, "--hosts", hosts, "--json", cwd=config.parent
    )


def test_two_workers_on_two_servers_make_the_adapter_of_one_machine(
    hosts: Path, config: Path, tmp_path: Path
) -> None:
    done = submit(hosts, config).end()
    assert done.code == 0, done.err
    interfaces = ", ".join(f"eth0 on {address(number)}" for number in SERVERS)
    assert "3 servers agree in versions and see the storage; gloo and NCCL use " in done.err
    assert all(part in done.err for part in interfaces.split(", "))
    here = Given(
        "train",
        config.name,
        f"storage={tmp_path}",
        "scale.cpus_per_worker=1",
        "--json",
        cwd=config.parent,
    ).end()
    assert here.code == 0, here.err
    assert weights(done.result["adapter"]) == weights(here.result["adapter"])


def test_of_two_runs_without_room_for_both_one_waits_and_then_runs(
    hosts: Path, config: Path
) -> None:
    each = ["scale.cpus_per_worker=2", "scale.workers=2"]
    endless = [
        "training.max_steps=2000",
        "training.eval_every=1.0",
        "training.checkpoint_every=1.0",
    ]
    first = submit(hosts, config, "name=first", *each, *endless)
    wait_until(
        lambda: last_step(config.parent.parent / "shared" / "first") >= 0, "the first one trains"
    )
    second = submit(hosts, config, "name=second", *each)
    impatient = submit(hosts, config, "name=third", *each, "scale.queue_timeout=1").end()
    assert (
        impatient.code == 3
        and "scale.queue_timeout: no room within 1 s for 2 workers with 2 CPU" in impatient.err
    )
    waiting = "the cluster is busy; waiting for room for 2 workers with 2 CPU each; free are"
    wait_until(
        lambda: waiting in Given("logs", "second", "--hosts", hosts).end().out,
        "the second one waits",
    )
    stopped = Given("stop", "first", "--hosts", hosts).end()
    assert stopped.code == 0, stopped.err
    one, other = first.end(), second.end()
    assert (one.code, other.code) == (4, 0), one.err + other.err
    assert waiting in other.err
    assert "there is room now, after " in other.err


def test_who_follows_a_run_survives_a_broken_connection(hosts: Path, config: Path) -> None:
    run = submit(hosts, config, "name=followed", "training.max_steps=20")
    wait_until(lambda: last_step(config.parent.parent / "shared" / "followed") >= 0, "it trains")
    (tunnel,) = (child for child in psutil.Process(run.pid).children() if child.name() == "ssh")
    tunnel.kill()
    done = run.end()
    assert done.code == 0, done.err
    assert (
        "the connection is lost; asking again until it answers" in done.err
        and "answers again" in done.err
    )
    steps = [line.split()[1] for line in done.err.splitlines() if line.startswith("step ")]
    assert len(steps) == len(set(steps)), "no line comes twice"


def test_a_search_runs_on_the_cluster(hosts: Path, config: Path) -> None:
    space = (
        "search={searcher: grid, scheduler: none, space: {objective.lambda: {grid: [0.5, 1.0]}}}"
    )
    done = submit(hosts, config, "name=sought", space, "scale.workers=1", command="tune").end()
    assert done.code == 0, done.err
    assert [trial["state"] for trial in done.result["trials"]] == ["finished", "finished"]


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Variables that lead to the bucket `runs` of an S3-compatible server next to the cluster."""
    if not MOTO.exists():
        pytest.fail(f"{MOTO} is not there; make test-cluster installs it")
    folder, port = tmp_path_factory.mktemp("bucket"), free_ports(1)[0]
    credentials = folder / "credentials"
    credentials.write_text(
        "[default]\naws_access_key_id = id\naws_secret_access_key = key\n", encoding="utf-8"
    )
    url = f"http://{GATEWAY}:{port}"
    with (folder / "log").open("w") as log:
        server = subprocess.Popen([MOTO, "-H", GATEWAY, "-p", str(port)], stdout=log, stderr=log)
    try:
        wait_until(lambda: answers(port), "the server listens")
        urlopen(Request(f"{url}/runs", method="PUT")).close()
        yield {
            "AWS_ENDPOINT_URL": url,
            "AWS_REGION": "us-east-1",
            "AWS_SHARED_CREDENTIALS_FILE": str(credentials),
        }
    finally:
        server.terminate()
        server.wait()


@pytest.fixture(scope="module")
def mounted(lan: Lan, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of the head's own disk, at the same path on the other servers through sshfs."""
    folder, disk = tmp_path_factory.mktemp("mounted"), tmp_path_factory.mktemp("disk")
    head, *others = SERVERS
    options = (
        f"-o reconnect -o IdentityFile={lan.key} -o StrictHostKeyChecking=no -o "
        "UserKnownHostsFile=/dev/null"
    )
    commands = {
        number: f"sshfs root@{address(head)}:{folder} {folder} {options}" for number in others
    }
    for number, command in {head: f"mount --bind {disk} {folder}", **commands}.items():
        done = lan.ssh(number, command)
        assert not done.returncode, done.stderr
    return str(folder)


def test_a_folder_that_servers_mount_from_one_of_them(
    hosts: Path, config: Path, mounted: str, lan: Lan, tmp_path: Path
) -> None:
    done = submit(hosts, config, "name=mounted", f"storage={mounted}").end()
    assert done.code == 0, done.err
    assert not list(Path(mounted).iterdir()), "this machine does not see it"
    shown = lan.ssh(
        SERVERS[2], f"sha256sum {mounted}/mounted/adapter/adapter_model.safetensors"
    ).stdout
    here = Given(
        "train",
        config.name,
        f"storage={tmp_path}",
        "scale.cpus_per_worker=1",
        "--json",
        cwd=config.parent,
    )
    assert shown.split()[0] == weights(here.end().result["adapter"])


def answers(port: int) -> bool:
    with contextlib.closing(socket.socket()) as probe:
        return probe.connect_ex((GATEWAY, port)) == 0


def test_a_bucket_serves_servers_that_share_no_folder(
    hosts: Path, config: Path, bucket: dict[str, str], tmp_path: Path
) -> None:
    variables = [word for name, value in bucket.items() for word in ("--env", f"{name}={value}")]
    done = submit(hosts, config, "name=kept", "storage=s3://runs/here", *variables).end()
    assert done.code == 0, done.err
    assert done.result["adapter"] == "s3://runs/here/kept/adapter"
    assert "servers agree in versions and see the storage" in done.err
    here = Given(
        "train",
        config.name,
        f"storage={tmp_path}",
        "scale.cpus_per_worker=1",
        "--json",
        cwd=config.parent,
    )
    fetching = (
        "from orpo_ray.storage import fetched_folder; "
        "print(fetched_folder('s3://runs/here/kept/adapter'))"
    )
    fetched = subprocess.run(
        [sys.executable, "-c", fetching],
        env={**ENVIRONMENT, **bucket, "XDG_CACHE_HOME": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert weights(fetched.stdout.strip()) == weights(here.end().result["adapter"])
    refused = submit(hosts, config, "name=none", "storage=s3://missing/here", *variables).end()
    assert refused.code == 3 and "there is no bucket missing" in refused.err


def test_a_storage_that_is_not_shared_is_refused(hosts: Path, config: Path, lan: Lan) -> None:
    done = submit(hosts, config, "name=apart", "storage=/tmp/ray/runs").end()
    assert done.code == 2, done.err
    unseen = [address(number) for number in SERVERS[1:]]
    assert "storage: /tmp/ray/runs is not seen on " in done.err and all(
        one in done.err for one in unseen
    )


def test_the_token_is_in_no_log_and_no_process_list(hosts: Path, lan: Lan) -> None:
    token = (hosts.parent / "token").read_text(encoding="ascii").strip()
    for number in SERVERS:
        found = lan.ssh(
            number,
            f"grep -rl --exclude='*.sock' {token} /tmp/ray; ps axww | grep -v grep | grep {token}",
        )
        assert not found.stdout, found.stdout
    assert (
        token
        not in subprocess.run(["ps", "axww"], capture_output=True, text=True, check=True).stdout
    )
    assert sys.prefix in lan.ssh(SERVERS[0], "ps axww").stdout, "the list shows whole commands"
