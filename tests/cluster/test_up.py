"""A cluster that the command starts and stops over real SSH: what runs, and who can connect."""

import sys
import time
from pathlib import Path

import pytest
import yaml
from lan import GATEWAY, SERVERS, STRANGER, Lan, address
from on_trio import Given, cluster

from orpo_ray.jobs import ports
from orpo_ray.jobs.token import make_token

pytestmark = pytest.mark.cluster


def test_every_server_has_joined_with_all_it_has(hosts: Path) -> None:
    for server in cluster("status", hosts)["servers"]:
        assert server["joined"] and server["cpus"] > 0


def test_the_token_is_its_owners_alone_and_in_no_process_list(hosts: Path, lan: Lan) -> None:
    token = (hosts.parent / "token").read_text(encoding="ascii").strip()
    for number in SERVERS:
        kept = lan.ssh(
            number, "stat -c %a ~/.ray/orpo-ray.token; cat ~/.ray/orpo-ray.token; ps axww"
        ).stdout
        assert kept.startswith(f"600\n{token}\n") and kept.count(token) == 1


def test_strangers_reach_no_port_of_the_cluster_once_the_firewall_is_up(
    hosts: Path, lan: Lan
) -> None:
    cluster("render", hosts, "--out", str(hosts.parent))
    documented = [ports.GCS, ports.CLIENT, *ports.OF_EACH_SERVER.values()]
    before = open_ports(lan, documented)
    for number in SERVERS:
        loaded = lan.ssh(number, f"nft -f {hosts.parent / 'trio.firewall.nft'}")
        assert not loaded.returncode, loaded.stderr
    assert before == set(documented), "what the firewall shuts was open"
    workers = range(ports.WORKERS[0], ports.WORKERS[0] + 10)
    assert open_ports(lan, [*documented, ports.DASHBOARD, *workers]) == set()
    assert all(server["joined"] for server in cluster("status", hosts)["servers"])


def test_who_has_no_token_or_another_gets_no_answer(hosts: Path, lan: Lan) -> None:
    asked = f"curl -s -o /dev/null -w '%{{http_code}}' http://127.0.0.1:{ports.DASHBOARD}/api/jobs/"
    assert lan.ssh(SERVERS[0], asked).stdout == "401"
    assert (
        lan.ssh(SERVERS[0], f"{asked} -H 'Authorization: Bearer 0123456789abcdef'").stdout == "403"
    )
    assert lan.ssh(SERVERS[1], asked.replace("127.0.0.1", address(SERVERS[0]))).stdout == "000", (
        "on loopback only"
    )
    other = hosts.parent / "other.token"
    make_token(other)
    for token, told in (
        (other, "does not take this token"),
        (hosts.parent / "none", "the token cannot be read"),
    ):
        began = time.monotonic()
        refused = Given("status", "--hosts", hosts, "--token", token).end()
        assert time.monotonic() - began < 5
        assert refused.code == 2 and told in refused.err and len(refused.err.splitlines()) == 1


def open_ports(lan: Lan, documented: list[int]) -> set[int]:
    """The ports of the cluster's servers to which the stranger can connect."""
    asked = (
        "import socket\n"
        f"for host in {[address(number) for number in SERVERS]!r}:\n"
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
    before = [lan.ssh(number, raylets).stdout for number in SERVERS]
    cluster("up", hosts)
    assert [lan.ssh(number, raylets).stdout for number in SERVERS] == before


def test_a_server_that_is_off_is_named(hosts: Path, lan: Lan, tmp_path: Path) -> None:
    settings = yaml.safe_load(hosts.read_text(encoding="utf-8"))
    changed = tmp_path / "hosts.yaml"
    changed.write_text(
        yaml.safe_dump({**settings, "name": "other", "workers": [f"{GATEWAY[:-3]}99"]})
    )
    answer = cluster("up", changed, code=3)
    assert answer["error"].startswith("10.77.0.99: cannot be reached as root")
