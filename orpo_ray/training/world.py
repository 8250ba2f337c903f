"""The processes that train together, by torch.distributed; a single process is a world of one."""

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class World:
    """This process's place: `rank` of `size` in all, `local_rank` among those of its server."""

    rank: int
    size: int
    local_rank: int

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files and speaks to the user."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum of every process's `values`, the same bits on each."""
        if self.size == 1:
            return values
        # NCCL adds on GPUs only, and weights that ZeRO-3 does not hold yet are on the CPU.
        shared = values.cuda() if dist.get_backend() == "nccl" else values.clone()
        dist.all_reduce(shared)
        return shared.to(values.device)

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, by rank; plain data only."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def from_first(self, value: Any) -> Any:
        """The first process's value; the values of the others are ignored."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def wait(self) -> None:
        """Wait until every process has called this."""
        if self.size > 1:
            dist.barrier(
                device_ids=[torch.cuda.current_device()] if dist.get_backend() == "nccl" else None
            )


ALONE = World(rank=0, size=1, local_rank=0)


def current_world() -> World:
    """The world that this process belongs to, from torch.distributed and LOCAL_RANK."""
    if not dist.is_initialized():
        return ALONE
    return World(dist.get_rank(), dist.get_world_size(), int(os.environ["LOCAL_RANK"]))
