"""`orpo-ray doctor` on three real servers: over SSH before Ray runs, and as a job of their Ray."""

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from lan import GATEWAY, SERVERS, Lan, address
from on_trio import Given

pytestmark = pytest.mark.cluster

ADDRESSES = [address(number) for number in SERVERS]


def doctor(*words: object) -> Any:
    """Its result, and its exit code, whatever that is."""
    done = Given("doctor", *words, "--json").end()
    assert done.code in (0, 3), done.err
    return done.result


def by_subject(server: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {finding["subject"]: finding for finding in reversed(server["findings"])}


@pytest.fixture
def quiet(lan: Lan, tmp_path: Path) -> Path:
    """hosts.yaml of the same servers; whether Ray runs there does not matter."""
    path = tmp_path / "hosts.yaml"
    path.write_text(yaml.safe_dump(lan.settings(tmp_path)), encoding="utf-8")
    return path


def test_servers_over_ssh_before_ray_runs(quiet: Path, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    result = doctor("--hosts", quiet, "--storage", shared)
    assert [server["name"] for server in result["servers"]] == ADDRESSES
    for server in result["servers"]:
        assert server["facts"]["failures"] == {}
        found = by_subject(server)
        assert found["network"]["what"] == f"gloo and NCCL take eth0 ({server['name']})"
        assert "shared with the first server" in found["storage"]["what"]
        assert abs(server["facts"]["clock"]["offset"]) < 60
    together = {finding["subject"]: finding["level"] for finding in result["findings"]}
    assert together == {"versions": "ok", "clock": "ok", "GPUs": "ok"}
    assert list(shared.iterdir()) == []


def test_servers_stand_side_by_side(quiet: Path) -> None:
    done = Given("doctor", "--hosts", quiet, COLUMNS="120").end()
    assert done.out.split()[: len(ADDRESSES)] == ADDRESSES
    assert done.out.rstrip().endswith("a run on 3 servers")


def test_a_storage_that_is_not_shared_and_a_server_that_is_off(quiet: Path, lan: Lan) -> None:
    settings = yaml.safe_load(quiet.read_text(encoding="utf-8"))
    off = f"{GATEWAY[:-3]}99"
    settings["workers"] = [ADDRESSES[1], off]
    quiet.write_text(yaml.safe_dump(settings), encoding="utf-8")
    done = Given("doctor", "--hosts", quiet, "--storage", "/tmp/ray/runs", "--json").end()
    assert done.code == 3, done.err
    head, other, absent = done.result["servers"]
    assert by_subject(head)["storage"]["level"] == "ok"
    told = "/tmp/ray/runs is not the same here as on the first server"
    assert by_subject(other)["storage"]["what"] == told
    assert absent["findings"][0]["what"].startswith(f"{off}: cannot be reached as root")
    assert "runs" not in lan.ssh(SERVERS[0], "ls -a /tmp/ray").stdout


def test_a_server_without_orpo_ray_is_told(quiet: Path) -> None:
    settings = yaml.safe_load(quiet.read_text(encoding="utf-8"))
    quiet.write_text(yaml.safe_dump({**settings, "environment": "/nowhere"}), encoding="utf-8")
    done = Given("doctor", "--hosts", quiet, "--json").end()
    assert done.code == 3, done.err
    for server in done.result["servers"]:
        (finding,) = server["findings"]
        assert "/nowhere/bin/python" in finding["what"] and "pip install" in finding["fix"]


def test_every_server_of_a_running_cluster_by_a_job(hosts: Path, lan: Lan, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    asked = f"{sys.executable} -m orpo_ray.cli.main doctor --storage {shared} --json"
    token = "RAY_AUTH_TOKEN_PATH=~/.ray/orpo-ray.token"
    done = lan.ssh(SERVERS[0], f"{token} {asked} --address http://127.0.0.1:8265")
    assert done.returncode in (0, 3), done.stderr
    result = yaml.safe_load(done.stdout)
    assert [server["name"] for server in result["servers"]] == ADDRESSES
    for server in result["servers"]:
        assert server["facts"]["failures"] == {}, server["facts"]["failures"]
        found = by_subject(server)
        assert "a server of the cluster" in found["Ray"]["what"]
        assert "shared with the first server" in found["storage"]["what"]
        assert "NCCL_SOCKET_IFNAME=eth0" in found["network"]["what"], "as the launcher sets it"
        assert server["facts"]["system"]["address"] == server["name"]
    together = {finding["subject"]: finding["level"] for finding in result["findings"]}
    assert together == {"versions": "ok", "clock": "ok", "GPUs": "ok"}
    assert list(shared.iterdir()) == []
    jobs = Given("status", "--hosts", hosts, "--json").end()
    assert not [run for run in jobs.result["runs"] if run["run"].startswith("doctor")]
