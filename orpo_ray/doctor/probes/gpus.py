"""GPUs as the system, the driver and torch see them."""

import subprocess
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from orpo_ray.doctor.facts import Cards, Device, Torch

_NVIDIA, _DISPLAY = "0x10de", "0x03"
"""NVIDIA's number on the PCI bus, and the class of cards that compute or display."""
_SMI = ("nvidia-smi", "--query-gpu=driver_version,name", "--format=csv,noheader")
_SMI_S = 10

Run = Callable[[Sequence[str]], "subprocess.CompletedProcess[str]"]


def _run(words: Sequence[str]) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(words, capture_output=True, text=True, check=False, timeout=_SMI_S)


def look_at_cards(root: Path = Path("/"), run: Run = _run) -> Cards:
    """The cards that are plugged in, and what the driver's own program says of them."""
    on_bus = sum(_is_card(device) for device in (root / "sys/bus/pci/devices").glob("*"))
    try:
        done = run(_SMI)
    except OSError:
        return Cards(on_bus=on_bus)
    except subprocess.TimeoutExpired:
        return Cards(on_bus=on_bus, problem=f"nvidia-smi does not answer within {_SMI_S} s")
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    if done.returncode or not lines:
        said = " ".join(f"{done.stdout} {done.stderr}".split())
        return Cards(on_bus=on_bus, problem=said[:200] or "nvidia-smi lists no card")
    drivers, names = zip(*(line.split(", ", 1) for line in lines), strict=True)
    return Cards(on_bus=max(on_bus, len(names)), driver=drivers[0], names=names)


def _is_card(device: Path) -> bool:
    try:
        vendor, kind = ((device / name).read_text().strip() for name in ("vendor", "class"))
    except OSError:
        return False
    return vendor == _NVIDIA and kind.startswith(_DISPLAY)


def look_with_torch() -> Torch:
    """What torch computes with. An addition is tried on every GPU."""
    import torch

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        is_there = torch.cuda.is_available()
    if not is_there:
        said = [str(warning.message) for warning in caught if "CUDA" in str(warning.message)]
        return Torch(cuda=torch.version.cuda or "", complaint=" ".join((said or [""])[0].split()))
    count = torch.cuda.device_count()
    others = [(one, other) for one in range(count) for other in range(count) if one != other]
    return Torch(
        cuda=torch.version.cuda or "",
        devices=tuple(_device(torch, number) for number in range(count)),
        kernels=tuple(torch.cuda.get_arch_list()),
        peers=all(torch.cuda.can_device_access_peer(*pair) for pair in others) if others else None,
    )


def _device(torch: Any, number: int) -> Device:
    properties = torch.cuda.get_device_properties(number)
    problem = ""
    try:
        total = float((torch.ones(8, device=f"cuda:{number}") + 1).sum())
        problem = "" if total == 16.0 else f"8 times 1 + 1 is {total:g} there"
    except RuntimeError as error:
        problem = str(error).strip().splitlines()[0]
    with torch.cuda.device(number):
        bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return Device(
        name=properties.name,
        capability=(properties.major, properties.minor),
        memory_bytes=properties.total_memory,
        bfloat16=bfloat16,
        problem=problem,
    )
