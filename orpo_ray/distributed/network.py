"""Has every worker's collectives go through the interface that the other servers reach it by.

gloo and NCCL guess one, and where a server has several the first all-reduce may never end. Ray starts the process group
before our code runs in a worker, so this stands in between.
"""

import os
import warnings
from typing import Any

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from ray.train.torch import TorchConfig
    from ray.train.torch.config import _TorchBackend

from orpo_ray.distributed.servers import interface_of, own_interfaces

_LOOPBACK = ("127.0.0.1", "::1")


class PeerTorchConfig(TorchConfig):
    """torch.distributed over the interface that has the server's own address in the cluster."""

    @property
    def backend_cls(self) -> Any:
        """What sets up the process group."""
        return _PeerBackend


class _PeerBackend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        """Settle the interface in each worker, then let Ray go on."""
        worker_group.execute(use_peers_interface)
        super().on_start(worker_group, backend_config)


def use_peers_interface() -> None:
    """Name the interface to gloo and NCCL, unless the server's operator has."""
    import ray

    address = ray.util.get_node_ip_address()
    interface = interface_of(address, own_interfaces())
    if interface is not None and address not in _LOOPBACK:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
