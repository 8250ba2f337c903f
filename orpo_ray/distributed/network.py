"""Joins the workers in torch.distributed, each over the interface that its peers can reach.

gloo and NCCL guess an interface. If a server has several, the first all-reduce may never end.
Ray's own TorchConfig would load torch in Ray's controller, which computes nothing. So the functions
here run in the workers, and call there what TorchConfig does.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import ray
    from ray._private.ray_constants import env_integer
    from ray.exceptions import GetTimeoutError
    from ray.train._internal.utils import get_address_and_port
    from ray.train.backend import Backend, BackendConfig
    from ray.train.constants import (
        DEFAULT_TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S,
        TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S,
    )
    from ray.train.v2._internal.util import TrainingFramework

from orpo_ray.distributed.servers import interface_of, own_interfaces
from orpo_ray.lean_imports import without_collections

_LOOPBACK = ("127.0.0.1", "::1")


@dataclass
class GroupConfig(BackendConfig):
    """Settings of the process group: gloo or nccl, and how long its members wait for each other."""

    backend: str
    timeout_s: int

    @property
    def backend_cls(self) -> Any:
        """What sets up the process group."""
        return _GroupBackend

    @property
    def train_func_context(self) -> Any:
        """The context in which a worker trains."""
        return _on_own_gpu

    @property
    def framework(self) -> Any:
        """The framework's name in Ray's records."""
        return TrainingFramework.TORCH

    def to_dict(self) -> dict[str, Any]:
        """The settings, for Ray's records."""
        return asdict(self)


class _GroupBackend(Backend):
    """Sets up and ends the process group; Ray's controller calls it."""

    share_cuda_visible_devices = True  # NCCL wants every worker to see the GPUs of its server

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        """Make all workers join, and wait until they have."""
        assert isinstance(backend_config, GroupConfig)
        worker_group.execute(use_peers_interface)
        # This comes before the choice of a port, which others could take while torch is loaded.
        worker_group.execute(load_torch)
        address, port = worker_group.execute_single(0, get_address_and_port)
        size, config = len(worker_group), asdict(backend_config)
        joining = [
            worker_group.execute_single_async(
                rank, join_group, rank, size, meeting_point=f"{address}:{port}", config=config
            )
            for rank in range(size)
        ]
        ray.get(joining)

    def on_shutdown(self, worker_group: Any, backend_config: BackendConfig) -> None:
        """Make all workers leave the group."""
        leaving = worker_group.execute_async(leave_group)
        patience = env_integer(
            TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S, DEFAULT_TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S
        )
        try:
            ray.get(leaving, timeout=patience)
        except GetTimeoutError:
            return  # some workers are gone and cannot answer


@contextmanager
def _on_own_gpu() -> Iterator[None]:
    """Make the worker's GPU torch's current one, before any library asks for a device."""
    from ray.train.torch.config import TorchConfigContextManager

    with TorchConfigContextManager():
        yield


def use_peers_interface() -> None:
    """Name the interface to gloo and NCCL, unless the operator of the server has set one."""
    address = ray.util.get_node_ip_address()
    interface = interface_of(address, own_interfaces())
    if interface is not None and address not in _LOOPBACK:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)


def load_torch() -> None:
    """Load what joining needs. It takes seconds, and all workers do it at the same time."""
    with without_collections():
        import ray.train.torch.config  # noqa: F401


def join_group(rank: int, size: int, meeting_point: str, config: dict[str, Any]) -> None:
    """Join as Ray does it. `meeting_point` is the address and port of the first worker."""
    from ray.train.torch.config import _set_torch_distributed_env_vars, _setup_torch_process_group

    host, _, port = meeting_point.rpartition(":")
    os.environ |= {"MASTER_ADDR": host, "MASTER_PORT": port}
    _set_torch_distributed_env_vars()
    _setup_torch_process_group(config["backend"], rank, size, "env://", config["timeout_s"])


def leave_group() -> None:
    """Leave the group as Ray does it."""
    import torch.distributed as dist
    from ray.train.torch.config import _shutdown_torch

    _shutdown_torch(destroy_process_group=dist.is_initialized() and dist.get_world_size() > 1)
