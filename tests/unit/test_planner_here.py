"""The GPU of this machine, by the name and the memory that CUDA reports."""

import pytest

from orpo_ray.planner.hardware import load_gpus
from orpo_ray.planner.here import cpu, gpu_named

MIB = 2**20


@pytest.mark.parametrize(
    ("title", "mebibytes", "name"),
    [
        ("NVIDIA GeForce RTX 3050", 8192 - 150, "rtx3050"),
        ("NVIDIA GeForce RTX 3050", 6144 - 150, None),  # another card with a slower memory
        ("NVIDIA GeForce RTX 3060", 11931, "rtx3060"),
        ("NVIDIA GeForce RTX 3090", 24268, "rtx3090"),
        ("NVIDIA GeForce RTX 3090 Ti", 24268, None),
        ("NVIDIA GeForce RTX 4060", 7940, "rtx4060"),
        ("NVIDIA GeForce RTX 4060 Ti", 16070, "rtx4060ti"),
        ("NVIDIA GeForce RTX 4060 Ti", 7940, None),
        ("NVIDIA GeForce RTX 4070", 11990, "rtx4070"),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", 16070, None),
        ("NVIDIA GeForce RTX 4090", 24207, "rtx4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 16070, None),
        ("NVIDIA GeForce RTX 5080", 16070, "rtx5080"),
        ("NVIDIA GeForce RTX 5090", 32110, "rtx5090"),
        ("NVIDIA RTX A5000", 24114, "rtxa5000"),
        ("NVIDIA RTX 6000 Ada Generation", 48622, "rtx6000ada"),
        ("Tesla T4", 14930, "t4"),
        ("NVIDIA L4", 22565, "l4"),
        ("NVIDIA A10", 22590, "a10"),
        ("NVIDIA A10G", 22587, "a10g"),
        ("NVIDIA L40", 45467, "l40"),
        ("NVIDIA L40S", 45589, "l40s"),
        ("NVIDIA A100-SXM4-40GB", 40448, "a100-40"),
        ("NVIDIA A100-PCIE-40GB", 40326, "a100-40-pcie"),
        ("NVIDIA A100-SXM4-80GB", 81050, "a100-80"),
        ("NVIDIA A100 80GB PCIe", 81050, "a100-80-pcie"),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", 9728, None),
        ("NVIDIA H100 80GB HBM3", 81082, "h100-sxm"),
        ("NVIDIA H100 PCIe", 81082, "h100-pcie"),  # by its name, though its memory says SXM
        ("NVIDIA H100 NVL", 95000, None),
        ("NVIDIA H200", 143156, "h200"),
        ("NVIDIA B200", 182631, "b200"),
        ("NVIDIA GeForce GTX 1080", 8110, None),
        ("AMD Instinct MI300X", 196000, None),
        ("", 0, None),
    ],
)
def test_a_gpu_is_found_by_what_cuda_says_and_never_a_wrong_one(title, mebibytes, name):
    found = gpu_named(title, mebibytes * MIB)
    assert (found and found.name) == name


@pytest.mark.parametrize("gpu", load_gpus().values(), ids=lambda gpu: gpu.name)
def test_every_known_gpu_finds_itself(gpu):
    found = gpu_named(gpu.title, gpu.memory)
    assert found == gpu


def test_a_cpu_has_the_rates_of_its_cores():
    one, four = cpu(1, 2**33), cpu(4, 2**33)
    assert four.float_flops == 4 * one.float_flops == four.half_flops
    assert (four.bandwidth, four.memory, four.bf16) == (4 * one.bandwidth, 2**33, False)
