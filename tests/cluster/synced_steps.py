"""One worker of a DDP model that steps with and without its exchange, in turns.

Usage: RANK=0 WORLD_SIZE=2 ... python synced_steps.py LAYERS TOKENS SECONDS ROUNDS. The model has so
many MiB of gradients, a layer each. SECONDS is what a device beside the CPU computes for a step: a
third in the forward pass, two thirds in the backward pass. It prints a line of JSON at the end.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

HIDDEN = 512
"""A layer has 512 x 512 float32 numbers: a MiB."""
SENT = Path("/sys/class/net/eth0/statistics/tx_bytes")
WARM_UP = 2


class OnDevice(torch.autograd.Function):
    """Waits for a device that computes a layer, while the CPU is free as it is beside a GPU."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, seconds: float) -> Tensor:
        ctx.seconds = seconds
        time.sleep(seconds)
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        time.sleep(2 * ctx.seconds)
        return gradient, None


class Layer(nn.Linear):
    """A layer that also takes time on a device."""

    def __init__(self, seconds: float) -> None:
        super().__init__(HIDDEN, HIDDEN, bias=False)
        self._seconds = seconds

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = super().forward(hidden)
        return OnDevice.apply(hidden, self._seconds) if self._seconds else hidden


def step(model: DistributedDataParallel, rows: Tensor) -> tuple[float, float, int]:
    """Seconds of the forward and of the backward pass, and the bytes that the server sent."""
    dist.barrier()
    before, began = int(SENT.read_text()), time.monotonic()
    loss = model(rows).square().mean()
    between = time.monotonic()
    loss.backward()
    ended = time.monotonic()
    return between - began, ended - between, int(SENT.read_text()) - before


def main(layers: int, tokens: int, seconds: float, rounds: int) -> None:
    """Step and print what was measured."""
    # A server that trains shares its CPUs with no test run. Where they compute, threads that send
    # must not wait for the end of a turn of those that compute.
    if seconds:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    else:
        os.nice(-15)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = DistributedDataParallel(
        nn.Sequential(*[Layer(seconds / 3 / layers) for _ in range(layers)])
    )
    rows = torch.randn(tokens, HIDDEN)
    measured = []
    for _ in range(WARM_UP + rounds):
        with model.no_sync():
            alone = step(model, rows)
        measured.append((alone, step(model, rows)))
    buckets = model._get_ddp_logging_data()["rebuilt_bucket_sizes"]
    print(json.dumps({"buckets": buckets, "steps": measured[WARM_UP:]}))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]))
