"""The ports of a cluster's servers; the start commands and the firewall are filled in from here."""

GCS = 6379
CLIENT = 10001
DASHBOARD = 8265
"""On the head's loopback interface only."""
OF_EACH_SERVER = {
    "node-manager-port": 6380,
    "object-manager-port": 6381,
    "runtime-env-agent-port": 6382,
    "dashboard-agent-grpc-port": 6383,
    "dashboard-agent-listen-port": 52365,
    "metrics-export-port": 6384,
}
"""Each port by the option of `ray start` that sets it."""
WORKERS = (20000, 20999)
"""First and last port; each process of Ray that runs tasks or actors takes one."""
EPHEMERAL = (32768, 60999)
"""First and last port of Linux's default range, in which torch's rendezvous and gloo listen."""


def shut_to_strangers() -> list[str]:
    """Ports below the ephemeral range that only peers may reach, in the syntax of nftables."""
    single = sorted({GCS, CLIENT, DASHBOARD, *OF_EACH_SERVER.values()})
    return [*map(str, single), f"{WORKERS[0]}-{WORKERS[1]}"]
