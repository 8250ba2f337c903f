"""A cluster brought up by the command over real SSH: what runs there, who is let in, and how it is taken down."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from lan import GATEWAY, Lan, address
from support import ENVIRONMENT

from orpo_ray.jobs import ports

pytestmark = pytest.mark.cluster

TRIO, STRANGER = (1, 2, 3), 4


def cluster(command: str, hosts: Path, *options: str, code: int = 0) -> Any:
    """What a command about the cluster answers."""
    words = [sys.executable, "-m", "orpo_ray.cli.main", "cluster", command, str(hosts), *options, "--json"]
    done = subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def hosts(lan: Lan, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """hosts.yaml of a cluster that is up."""
    folder = tmp_path_factory.mktemp("cluster")
    settings = {
        "name": "trio",
        "head": address(1),
        "workers": [address(number) for number in TRIO[1:]],
        "ssh": {"user": "root", "key": str(lan.key)},
        "token": str(folder / "token"),
        "environment": sys.prefix,
    }
    path = folder / "hosts.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    up = cluster("up", path)
    assert [(server["address"], server["joined"]) for server in up["servers"]] == [
        (address(number), True) for number in TRIO
    ]
    yield path
    cluster("down", path)
    for number in TRIO:
        assert "raylet" not in lan.ssh(number, "ps ax").stdout


def test_every_server_has_joined_with_all_it_has(hosts: Path) -> None:
    for server in cluster("status", hosts)["servers"]:
        assert server["joined"] and server["cpus"] > 0


def test_the_token_is_its_owners_alone_and_in_no_process_list(hosts: Path, lan: Lan) -> None:
    token = (hosts.parent / "token").read_text(encoding="ascii").strip()
    for number in TRIO:
        kept = lan.ssh(number, "stat -c %a ~/.ray/orpo-ray.token; cat ~/.ray/orpo-ray.token; ps axww").stdout
        assert kept.startswith(f"600\n{token}\n") and kept.count(token) == 1


def test_strangers_reach_no_port_of_the_cluster_once_the_firewall_is_up(hosts: Path, lan: Lan) -> None:
    cluster("render", hosts, "--out", str(hosts.parent))
    documented = [ports.GCS, ports.CLIENT, *ports.OF_EACH_SERVER.values()]
    before = open_ports(lan, documented)
    for number in TRIO:
        loaded = lan.ssh(number, f"nft -f {hosts.parent / 'trio.firewall.nft'}")
        assert not loaded.returncode, loaded.stderr
    assert {ports.GCS, ports.CLIENT} <= before, "what the firewall shuts was open"
    assert open_ports(lan, documented) == set()
    assert all(server["joined"] for server in cluster("status", hosts)["servers"])


def open_ports(lan: Lan, documented: list[int]) -> set[int]:
    """Those ports of any server of the cluster that the stranger can connect to."""
    asked = (
        "import socket\n"
        f"for host in {[address(number) for number in TRIO]!r}:\n"
        f"    for port in {documented!r}:\n"
        "        try:\n"
        "            socket.create_connection((host, port), timeout=0.5).close()\n"
        "        except OSError:\n"
        "            continue\n"
        "        print(port)\n"
    )
    return set(map(int, lan.ssh(STRANGER, f'{sys.executable} -c "{asked}"').stdout.split()))


def test_up_again_leaves_a_cluster_that_is_up_alone(hosts: Path, lan: Lan) -> None:
    raylets = "ps axo pid,comm | grep raylet"
    before = [lan.ssh(number, raylets).stdout for number in TRIO]
    cluster("up", hosts)
    assert [lan.ssh(number, raylets).stdout for number in TRIO] == before


def test_a_server_that_is_off_is_named(hosts: Path, lan: Lan, tmp_path: Path) -> None:
    settings = yaml.safe_load(hosts.read_text(encoding="utf-8"))
    changed = tmp_path / "hosts.yaml"
    changed.write_text(yaml.safe_dump({**settings, "name": "other", "workers": [f"{GATEWAY[:-3]}99"]}))
    answer = cluster("up", changed, code=3)
    assert answer["error"].startswith("10.77.0.99: cannot be reached as root")
