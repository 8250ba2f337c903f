"""One preparation by the real command: its seconds, and the memory of its processes."""

import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import yaml

from orpo_ray.errors import RunError

_COMMAND = (sys.executable, "-m", "orpo_ray.cli.main", "prepare")
_LOOK_S = 0.2
_LOOKS_A_SUM = 5
"""A sum over all processes takes longer than a look at one, so not each look makes one."""


def time_and_memory(
    file: Path, tokenizer_folder: str, max_length: int, folder: Path
) -> dict[str, float]:
    """Seconds of a whole `orpo-ray prepare`, and the most memory of the driver and of all.

    The driver's memory is its resident set. For all processes the proportional set sizes are added,
    so that memory which several share counts once. Raises RunError if the command fails.
    """
    config = _write_config(file, tokenizer_folder, max_length, folder)
    begin = time.perf_counter()
    with subprocess.Popen(
        [*_COMMAND, str(config)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        said: list[str] = []
        reading = threading.Thread(target=said.extend, args=(process.stderr,))
        reading.start()
        peaks = _watch_memory(psutil.Process(process.pid), process)
        reading.join()
    if process.returncode:
        raise RunError(f"orpo-ray prepare ended with exit code {process.returncode}: {said[-1:]}")
    return {"command_s": time.perf_counter() - begin, **peaks}


def _watch_memory(driver: psutil.Process, process: subprocess.Popen[str]) -> dict[str, float]:
    """The peaks in MB (10^6 bytes) until the process ends."""
    driver_peak = all_peak = 0
    looks = 0
    while process.poll() is None:
        with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            driver_peak = max(driver_peak, driver.memory_info().rss)
            if looks % _LOOKS_A_SUM == 0:
                all_peak = max(all_peak, _shared_once(driver))
        looks += 1
        with suppress(subprocess.TimeoutExpired):
            process.wait(_LOOK_S)
    return {"driver_peak_mb": driver_peak / 1e6, "all_peak_mb": all_peak / 1e6}


def _shared_once(driver: psutil.Process) -> int:
    total = 0
    for one in [driver, *driver.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess, psutil.ZombieProcess, psutil.AccessDenied):
            total += one.memory_full_info().pss
    return total


def _write_config(file: Path, tokenizer_folder: str, max_length: int, folder: Path) -> Path:
    settings: dict[str, Any] = {
        "name": "memory",
        "storage": str(folder / "memory"),
        "model": {"base": tokenizer_folder},
        "data": {
            "train": [{"source": str(file)}],
            "max_length": max_length,
            "max_prompt_length": max_length - 1,
            "max_bad_fraction": 1.0,
        },
    }
    path = folder / "memory.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path
