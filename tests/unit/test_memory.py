"""Freed memory stays with the process, which its page faults show.

Each case has a new process, which has allocated nothing before.
"""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="only glibc can be set to keep memory"
)

PAGES = 200 * 2**20 // 4096
# In a thread, as under Ray Train: the heaps of a thread have 64 MiB and are freed one by one. It
# calls malloc itself, because Python's objects hide much.
STEPS = """
import ctypes, resource, sys, threading
from orpo_ray.training.memory import keep_freed_memory

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
MIB = 2**20

def step():
    blocks = [libc.malloc(MIB) for _ in range(200)]
    for block in blocks:
        libc.memset(block, 1, MIB)
    for block in reversed(blocks):
        libc.free(block)

def count():
    step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

if "keep" in sys.argv:
    keep_freed_memory()
thread = threading.Thread(target=count)
thread.start()
thread.join()
"""


def page_faults_of_a_step(*arguments: str, **variables: str) -> int:
    ours = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("MALLOC_", "GLIBC_"))
    }
    command = [sys.executable, "-c", STEPS, *arguments]
    return int(
        subprocess.run(
            command, env=ours | variables, capture_output=True, text=True, check=True
        ).stdout
    )


def test_a_step_gets_the_memory_of_the_one_before_without_page_faults() -> None:
    assert page_faults_of_a_step() > PAGES / 2
    assert page_faults_of_a_step("keep") < PAGES / 100


@pytest.mark.parametrize(
    "settings",
    [{"MALLOC_MMAP_THRESHOLD_": "65536"}, {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=65536"}],
)
def test_the_users_settings_of_malloc_are_left_alone(settings: dict[str, str]) -> None:
    assert page_faults_of_a_step("keep", **settings) > PAGES / 2
