"""The GPU or the CPU that a run is about to use, as the planner knows it."""

import re

from orpo_ray.planner.hardware import Gpu, load_gpus

CPU = "cpu"
_CORE_FLOPS = 100e9
"""Float32 operations that a core of a server may do in a second, of which the planner takes 0.6.

docs/benchmarks.md: large products reached 63 to 89 GFLOP/s on one thread.
"""
_CORE_BANDWIDTH = 10e9


_OTHER_MEMORY = 0.1
"""A card whose memory differs by a larger part is another one, such as the RTX 4060 Ti of 8 GB."""


def gpu_named(title: str, memory: int) -> Gpu | None:
    """The known GPU that CUDA names so and that has so many bytes, or None."""
    found = [
        gpu
        for gpu in load_gpus().values()
        if (_plain(gpu.title), _is_pcie(gpu.title)) == (_plain(title), _is_pcie(title))
        and abs(gpu.memory - memory) <= _OTHER_MEMORY * gpu.memory
    ]
    return min(found, key=lambda gpu: abs(gpu.memory - memory), default=None)


def _is_pcie(title: str) -> bool:
    """Whether a title tells a card from the module of the same name: CUDA does so for PCIe."""
    return "pcie" in title.lower()


def _plain(title: str) -> str:
    """A title without the maker, and without the sizes that CUDA writes and vendors do not."""
    return re.sub(r"nvidia|geforce|tesla|\d+ ?gb|pcie|sxm\d*|hbm\d*e?|[^a-z0-9]", "", title.lower())


def cpu(cores: float, memory: int) -> Gpu:
    """The CPU cores of one worker, as if they were a GPU that nobody has measured."""
    return Gpu(
        name=CPU,
        title="CPU",
        memory=memory,
        half_flops=cores * _CORE_FLOPS,
        float_flops=cores * _CORE_FLOPS,
        bandwidth=cores * _CORE_BANDWIDTH,
        bf16=False,
        fp4=False,
        link="",
    )
