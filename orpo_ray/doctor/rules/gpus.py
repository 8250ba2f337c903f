"""Driver, CUDA, compute capability, bfloat16, flash attention and NF4."""

from collections.abc import Iterator

from orpo_ray.doctor.facts import Asked, Attention, Cards, Device, Nf4, Torch
from orpo_ray.doctor.findings import Finding, note, ok, stops, warning

SUBJECT, DTYPE, FLASH, NF4 = "GPU", "number format", "flash attention", "NF4"

_DRIVER_FOR = {"13": 580, "12": 525, "11": 450}
"""The oldest driver for each CUDA (docs.nvidia.com/deploy/cuda-compatibility, minor versions)."""
_CPU_BUILD = "pip install --force-reinstall torch, without an index of CPU builds"


def judge(
    asked: Asked, cards: Cards | None, torch: Torch, *, cluster_has_gpus: bool
) -> Iterator[Finding]:
    """Whether torch computes on every card that is plugged in."""
    cards = cards or Cards(on_bus=0)
    if torch.devices:
        yield from _each_device(torch, cards.driver)
        return
    if not cards.on_bus and not cards.names:
        yield from _without_card(asked, cluster_has_gpus)
        return
    count = max(cards.on_bus, len(cards.names))
    some = f"{count} NVIDIA {'GPU' if count == 1 else 'GPUs'}"
    if cards.problem or not cards.driver:
        why = cards.problem or "there is no nvidia-smi"
        fix = "install NVIDIA's driver (apt install nvidia-driver-580, then reboot)"
        if not cards.problem:
            fix += "; in a container, start it with --gpus all"
        yield stops(SUBJECT, f"{some}, but the driver does not work: {why}", fix)
    elif not torch.cuda:
        yield stops(SUBJECT, f"{some}, but this torch is built for CPUs only", _CPU_BUILD)
    elif is_too_old(cards.driver, torch.cuda):
        oldest = _DRIVER_FOR[torch.cuda.partition(".")[0]]
        yield stops(
            SUBJECT,
            f"{some}, but driver {cards.driver} is too old for this torch (CUDA {torch.cuda})",
            f"install driver {oldest} or newer, or a torch for an older CUDA: pip install torch "
            "--index-url https://download.pytorch.org/whl/cu126",
        )
    else:
        why = torch.complaint or "torch does not say why; is CUDA_VISIBLE_DEVICES set?"
        yield stops(
            SUBJECT,
            f"{some} with driver {cards.driver}, but torch finds none: {why}",
            "unset CUDA_VISIBLE_DEVICES; if it is not set, reboot the server",
        )


def _without_card(asked: Asked, cluster_has_gpus: bool) -> Iterator[Finding]:
    each = [run.scale.gpus_per_worker for run in asked.runs]
    wanted = max((gpus for gpus in each if gpus != "auto"), default=0)
    if cluster_has_gpus:
        yield ok(SUBJECT, "none; workers that want GPUs go to the servers that have some")
    elif not wanted:
        yield ok(SUBJECT, "none; runs train on the CPU")
    else:
        yield stops(
            SUBJECT,
            f"none, but scale.gpus_per_worker is {wanted:g}",
            "set scale.gpus_per_worker=0 to train on CPUs",
        )


def _each_device(torch: Torch, driver: str) -> Iterator[Finding]:
    is_well = True
    for number, device in enumerate(torch.devices):
        if not has_kernels(device.capability, torch.kernels):
            is_well = False
            yield stops(
                SUBJECT,
                f"{device.name} has compute capability {_dotted(device)}, and this torch has no "
                f"kernels for it ({', '.join(torch.kernels)})",
                _other_torch(device),
            )
        elif device.problem:
            is_well = False
            yield stops(
                SUBJECT,
                f"GPU {number} ({device.name}) does not compute: {device.problem}",
                f"look at nvidia-smi -q -i {number}, and reboot; leave it out with "
                "CUDA_VISIBLE_DEVICES until then",
            )
    if is_well:
        names = [
            f"{device.name} ({device.memory_bytes / 2**30:.0f} GB)" for device in torch.devices
        ]
        each = [f"{names.count(name)} x {name}" for name in dict.fromkeys(names)]
        yield ok(SUBJECT, f"{', '.join(each)}, driver {driver or 'unknown'}, CUDA {torch.cuda}")


def _other_torch(device: Device) -> str:
    """A newer GPU needs a torch for CUDA 12.8 or later, an older one a torch for CUDA 12.6."""
    index = "cu128" if device.capability >= (10, 0) else "cu126"
    return f"pip install torch --index-url https://download.pytorch.org/whl/{index}"


def judge_dtype(asked: Asked, torch: Torch) -> Iterator[Finding]:
    """Which number formats the GPUs compute in; `settings` judges the one that a run names."""
    without = [device for device in torch.devices if not device.bfloat16]
    if not torch.devices:
        return
    if not without:
        yield ok(DTYPE, "every GPU computes bfloat16")
        return
    what = f"{without[0].name} (compute capability {_dotted(without[0])}) does not compute bfloat16"
    if asked.model is not None and asked.model.dtype != "auto":
        yield ok(DTYPE, f"{what}; model.dtype is {asked.model.dtype}")
    else:
        yield note(
            DTYPE,
            f"{what}; runs take float16, whose loss may overflow",
            "set model.dtype=float32 if a run says that float16 overflowed",
        )


def judge_attention(asked: Asked, found: Attention) -> Iterator[Finding]:
    """Whether packed rows take torch's flash attention."""
    if found.device == "cpu":
        yield ok(FLASH, f"for GPUs only; rows take {found.path}")
    elif found.is_flash:
        yield ok(FLASH, f"tried in {found.dtype}: {found.path}")
    else:
        yield note(
            FLASH,
            f"it does not work on this GPU in {found.dtype}; rows take {found.path}, which is "
            "slower",
            "pip install --upgrade torch; a GPU older than Ampere has none, and nothing is to do",
        )


def judge_nf4(asked: Asked, found: Nf4) -> Iterator[Finding]:
    """Whether four bits compute what their weights say."""
    where = f"on {found.device} in {found.dtype}"
    worst = max(found.forward, found.backward)
    if worst <= found.bound and found.rounding <= found.rounding_bound:
        yield ok(
            NF4,
            f"tried {where}: relative error {found.forward:.1e} forward, {found.backward:.1e} "
            f"backward (at most {found.bound:.1e})",
        )
        return
    what = (
        f"bitsandbytes computes wrong numbers {where}: relative error {found.forward:.1e} forward, "
        f"{found.backward:.1e} backward (at most {found.bound:.1e}); a weight is "
        f"{found.rounding:.2f} from its four bits (at most {found.rounding_bound:.2f})"
    )
    fix = "pip install --force-reinstall bitsandbytes; or set model.quantization=none"
    yield stops(NF4, what, fix) if asked.uses_nf4 else warning(NF4, what, fix)


def is_too_old(driver: str, cuda: str) -> bool:
    """Whether a driver is older than the oldest one that a version of CUDA works with."""
    oldest = _DRIVER_FOR.get(cuda.partition(".")[0])
    number = driver.partition(".")[0]
    return oldest is not None and number.isdigit() and int(number) < oldest


def has_kernels(capability: tuple[int, int], kernels: tuple[str, ...]) -> bool:
    """Whether kernels that were built for some capabilities run on a GPU of this one.

    Machine code (sm_) runs on later minor versions of its major one, PTX (compute_) on all later
    ones. An "a" or "f" at the end binds the code to one GPU or family. An empty list says nothing.
    """
    if not kernels:
        return True
    for kernel in kernels:
        kind, _, number = kernel.partition("_")
        digits = number.rstrip("af")
        built = (int(digits[:-1]), int(digits[-1]))
        is_bound = number != digits
        if kind == "sm" and built[0] == capability[0] and built[1] <= capability[1]:
            return True
        if kind == "compute" and not is_bound and built <= capability:
            return True
    return False


def _dotted(device: Device) -> str:
    return ".".join(map(str, device.capability))
