"""Which clusters a run refuses, given the reports of their servers."""

import os
from dataclasses import replace
from typing import Any

import pytest

from orpo_ray.distributed import network
from orpo_ray.distributed.servers import Report, describe_network, interface_of, refuse_unfit
from orpo_ray.errors import ConfigError, ResourceError

OURS = {"python": "3.11.7", "torch": "2.13.0", "ray": "2.60.0"}
HEAD = Report(
    address="10.0.0.1", versions=OURS, sees_storage=True, free_bytes=2**33, interface="eth0"
)
WORKER = replace(HEAD, address="10.0.0.2", interface="eno2")
STORAGE = "/data/runs"


def test_servers_that_agree_are_fit() -> None:
    refuse_unfit([HEAD, WORKER], OURS, STORAGE)
    assert describe_network([HEAD, replace(WORKER, interface=None)]) == (
        "2 servers agree in versions and see the storage; gloo and NCCL use eth0 on 10.0.0.1, "
        "an unknown interface on 10.0.0.2"
    )


@pytest.mark.parametrize(
    ("changes", "error", "told"),
    [
        (
            {"versions": {**OURS, "torch": "2.12.0"}},
            ConfigError,
            "server 10.0.0.2 has torch 2.12.0, but",
        ),
        (
            {"versions": {"python": "3.11.7", "torch": "2.13.0"}},
            ConfigError,
            "server 10.0.0.2 has ray none, but",
        ),
        (
            {"versions": {**OURS, "trl": "1.16.0"}},
            ConfigError,
            "has trl 1.16.0, but the run's driver has none",
        ),
        (
            {"sees_storage": False},
            ConfigError,
            "storage: /data/runs is not seen on 10.0.0.2; use s3://",
        ),
        ({"free_bytes": 2**20}, ResourceError, "server 10.0.0.2 has 1 MB free"),
    ],
)
def test_a_server_that_a_run_would_fail_on_is_named(
    changes: dict[str, Any], error: type[Exception], told: str
) -> None:
    with pytest.raises(error) as refused:
        refuse_unfit([HEAD, replace(WORKER, **changes)], OURS, STORAGE)
    assert told in str(refused.value)


def test_the_interface_is_the_one_with_the_address_that_peers_use() -> None:
    interfaces = {
        "lo": ["127.0.0.1", "::1"],
        "docker0": ["172.17.0.1"],
        "eth1": ["fe80::1", "10.0.0.2"],
    }
    assert interface_of("10.0.0.2", interfaces) == "eth1"
    assert interface_of("203.0.113.9", interfaces) is None


@pytest.mark.parametrize(
    ("address", "set_before", "found"),
    [
        ("10.0.0.2", None, "eth1"),
        ("10.0.0.2", "eth7", "eth7"),  # the operator's choice is kept
        ("127.0.0.1", None, None),
        ("203.0.113.9", None, None),
    ],
)
def test_a_worker_names_its_interface_to_gloo_and_nccl(
    address: str, set_before: str | None, found: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    interfaces = {"lo": ["127.0.0.1"], "docker0": ["172.17.0.1"], "eth1": ["10.0.0.2"]}
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: address)
    monkeypatch.setattr(network, "own_interfaces", lambda: interfaces)
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(variable, set_before or "")
        if set_before is None:
            monkeypatch.delenv(variable)
    network.use_peers_interface()
    assert [os.environ.get(name) for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")] == [
        found,
        found,
    ]
