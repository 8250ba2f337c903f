"""Ray on this machine, or the cluster that RAY_ADDRESS names: started, joined and ended in one
place.
"""

import atexit
import logging
import os
import signal
import socket
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psutil

from orpo_ray.errors import ResourceError

ROOM_S = 120
"""The longest that anything waits for CPUs or GPUs that others hold; what starts there, imports
too, is part of it.
"""


# A Ray of our own has no dashboard: what processes would gather for one takes 5 % of a machine with
# two cores, and the dashboard's own processes a gigabyte.
_IDLE_RAY = {
    "RAY_enable_metrics_collection": "false",
    "RAY_event_stats": "false",
    "RAY_task_events_report_interval_ms": "0",
}
_OBJECT_STORE_BYTES = (256 * 2**20, 2 * 2**30)
_CONNECT_S = 5.0
_GOODBYE_POLL_S = 0.02


def joins_cluster() -> bool:
    """Whether the environment names a Ray that others may use as well."""
    return "RAY_ADDRESS" in os.environ


def start_ray(raw_bytes: int | None = None, verbose: bool = False) -> None:
    """Start Ray on this machine, or join the cluster that RAY_ADDRESS names; nothing where it
    already runs.

    `raw_bytes`: how much data will pass through it, if known. `verbose`: show what its processes
    log.
    """
    # Workers that ask for no GPU keep CUDA_VISIBLE_DEVICES: the default of Ray 2.60; older ones
    # empty it and warn.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    if ray.is_initialized():
        return
    level = logging.INFO if verbose else logging.ERROR
    quiet: dict[str, Any] = {"log_to_driver": verbose, "logging_level": level}
    address = os.environ.get("RAY_ADDRESS")
    if address:
        refuse_unreachable(address)
        try:
            with _signals_kept():
                ray.init(**quiet)
        except ConnectionError as error:
            raise ResourceError(
                f"the Ray cluster of RAY_ADDRESS ({address}) cannot be joined: {error}"
            ) from error
        return
    # Rows go in as text and come out as token ids; more than this spills to disk, which is slower
    # but works.
    least, most = _OBJECT_STORE_BYTES
    store = most if raw_bytes is None else min(max(4 * raw_bytes, least), most)
    # What stops a service or a batch job sends SIGTERM to every process at once. Ray's own, which
    # inherit this mask, must outlive it until the workers have saved their checkpoint.
    os.environ |= {name: os.environ.get(name, value) for name, value in _IDLE_RAY.items()}
    others = psutil.Process().children()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        with _signals_kept(), _few_helpers(log_monitor=verbose):
            # "local": it would otherwise join whatever Ray it finds on this machine.
            ray.init(address="local", object_store_memory=store, include_dashboard=False, **quiet)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    leaving = threading.Event()
    started = [child for child in psutil.Process().children() if child not in others]
    threading.Thread(target=_end_with_driver, args=(started, leaving), daemon=True).start()
    atexit.register(leaving.set)


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Answer SIGTERM as before `ray.init`, which puts a handler of its own there, in Python and in
    C.

    The one in C prints a stack and sets an alarm that aborts the process three seconds later,
    whatever it is at.
    """
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


@contextmanager
def _few_helpers(log_monitor: bool) -> Iterator[None]:
    """Have `ray.init` start no process that has no work in a Ray of our own.

    There is no dashboard to serve, and no server to add. `log_monitor`: reads the logs of Ray's
    processes ten times a second for a driver that listens. The seams are private to Ray: a test
    counts the processes.
    """
    from ray._private import parameter
    from ray._private.node import Node

    params, start_api_server = parameter.RayParams, Node.start_api_server

    class LeanParams(params):  # type: ignore[valid-type, misc]
        def __init__(self, **options: Any) -> None:
            super().__init__(**options | {"no_monitor": True, "include_log_monitor": log_monitor})

    parameter.RayParams = LeanParams  # type: ignore[misc, assignment]
    Node.start_api_server = lambda *_, **__: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        parameter.RayParams = params  # type: ignore[misc]
        Node.start_api_server = start_api_server  # type: ignore[method-assign]


def owns_ray() -> bool:
    """Whether the Ray that runs here was started by this process, so that nothing of it outlives
    this process.
    """
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):
            if child.name() == "raylet":
                return True
    return False


def refuse_unreachable(address: str) -> None:
    """Raise ResourceError where nobody listens at HOST:PORT; Ray itself would try for minutes, deaf
    to signals.
    """
    host, _, port = address.rpartition(":")
    if "://" in address or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_S).close()
    except OSError as error:
        raise ResourceError(
            f"RAY_ADDRESS: no Ray cluster answers at {address} ({error}); start it, or unset "
            "RAY_ADDRESS to use this "
            "machine alone"
        ) from error


def _end_with_driver(started: list[psutil.Process], leaving: threading.Event) -> None:
    """Kill Ray's processes, and what they started, once this one has said goodbye to them.

    Deaf to SIGTERM, each would keep Ray's own clean-up waiting for a second, and some would live on
    for a minute.
    """
    import ray

    leaving.wait()
    family = list(started)
    for process in started:
        with suppress(psutil.NoSuchProcess):
            family += process.children(recursive=True)
    while ray.is_initialized():
        time.sleep(_GOODBYE_POLL_S)
    for process in family:
        with suppress(psutil.NoSuchProcess):
            process.kill()


@contextmanager
def quiet_context() -> Iterator[None]:
    """Ray Data with rows kept in order, and silent but for errors; the caller's settings come back
    afterwards.
    """
    import ray

    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # Ray's copy reads its own deprecated settings
        context = ray.data.DataContext.get_current().copy()
    context.execution_options.preserve_order = True
    # Shares of the cluster for several operators; the only one we have would start with one task
    # for a second.
    context.op_resource_reservation_enabled = False
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    console = [
        h for h in logging.getLogger("ray.data").handlers if isinstance(h, logging.StreamHandler)
    ]
    levels = [handler.level for handler in console]
    for handler in console:
        handler.setLevel(logging.ERROR)
    try:
        with ray.data.DataContext.current(context):
            yield
    finally:
        for handler, level in zip(console, levels, strict=True):
            handler.setLevel(level)
