"""Starts Ray on this machine or joins the cluster of RAY_ADDRESS, and ends it."""

import atexit
import logging
import os
import signal
import socket
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psutil

from orpo_ray.errors import SetupError

ROOM_S = 120
"""The longest wait for CPUs or GPUs that others hold; the start of a process there counts too."""


# A Ray that we start has no dashboard. Gathering numbers for one takes 5 % of a machine with two
# cores, and the dashboard's own processes take a gigabyte.
_IDLE_RAY = {
    "RAY_enable_metrics_collection": "false",
    "RAY_event_stats": "false",
    "RAY_task_events_report_interval_ms": "0",
}
_OBJECT_STORE_BYTES = (256 * 2**20, 2 * 2**30)
_CONNECT_S = 5.0
_GOODBYE_POLL_S = 0.02
_started: list[psutil.Process] = []
"""The processes of the Ray that `start_ray` started here."""


def joins_cluster() -> bool:
    """Whether the environment names a Ray cluster, which others may use too."""
    return "RAY_ADDRESS" in os.environ


def has_ray() -> bool:
    """Whether this process is connected to Ray already."""
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


def start_ray(raw_bytes: int | None = None, verbose: bool = False) -> None:
    """Start Ray on this machine, or join the cluster of RAY_ADDRESS, unless Ray already runs.

    `raw_bytes` is how much data will pass through Ray, if known. `verbose` shows the logs of Ray's
    processes.
    """
    # Workers without a GPU keep CUDA_VISIBLE_DEVICES. Ray 2.60 does that by default; older versions
    # empty the variable and warn.
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
            raise SetupError(
                f"the Ray cluster of RAY_ADDRESS ({address}) cannot be joined: {error}"
            ) from error
        return
    # Rows go in as text and come out as token ids. What does not fit into the store goes to disk,
    # which is slower but works.
    least, most = _OBJECT_STORE_BYTES
    store = most if raw_bytes is None else min(max(4 * raw_bytes, least), most)
    # A service manager or batch system sends SIGTERM to every process at once. Ray's processes must
    # survive it until the workers have saved their checkpoint, so they inherit this mask.
    os.environ |= {name: os.environ.get(name, value) for name, value in _IDLE_RAY.items()}
    others = psutil.Process().children()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        with _signals_kept(), _few_helpers(log_monitor=verbose):
            # Without "local" it would join any Ray that runs on this machine.
            ray.init(address="local", object_store_memory=store, include_dashboard=False, **quiet)
    except OSError as error:
        if "AF_UNIX" not in str(error):
            raise
        raise SetupError(
            f"Ray's sockets do not fit into the folder for temporary files, whose name is too long "
            f"({tempfile.gettempdir()}); set RAY_TMPDIR to a shorter one, such as /tmp"
        ) from error
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    leaving = threading.Event()
    _started[:] = [child for child in psutil.Process().children() if child not in others]
    threading.Thread(target=_end_with_driver, args=([*_started], leaving), daemon=True).start()
    atexit.register(leaving.set)


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Restore the SIGTERM handler, which `ray.init` replaces in Python and in C.

    Ray's handler in C prints a stack and aborts the process three seconds later, whatever it does.
    """
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


@contextmanager
def _few_helpers(log_monitor: bool) -> Iterator[None]:
    """Keep `ray.init` from starting helper processes that have no work in a Ray of our own.

    There is no dashboard to serve, and no server to add. `log_monitor` keeps the process that reads
    Ray's logs ten times a second for the driver. The names used here are private to Ray, so a test
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
    """Whether this process started the Ray that it uses, and will end it."""
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):
            if child.name() == "raylet":
                return True
    return False


def has_ray_for_itself() -> bool:
    """Whether `start_ray` started the Ray in use. A notebook may start one, and have work in it."""
    return any(process.is_running() for process in _started)


def refuse_unreachable(address: str) -> None:
    """Raise SetupError if nothing listens at HOST:PORT.

    Ray itself would try for minutes, and would ignore signals meanwhile.
    """
    if address.startswith(("http://", "https://")):
        raise SetupError(
            f"RAY_ADDRESS: {address} is a dashboard's address, to which jobs are submitted "
            "(orpo-ray submit --address); to run in a cluster, set HOST:PORT as ray start prints "
            "it (6379), or unset it"
        )
    host, _, port = address.rpartition(":")
    if "://" in address or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_S).close()
    except OSError as error:
        raise SetupError(
            f"RAY_ADDRESS: no Ray cluster answers at {address} ({error}); start it, or unset "
            "RAY_ADDRESS to use this machine alone"
        ) from error


def _end_with_driver(started: list[psutil.Process], leaving: threading.Event) -> None:
    """Kill Ray's processes and their children when this process has disconnected from Ray.

    They ignore SIGTERM, so Ray's own clean-up would wait a second for each, and some would run for
    another minute.
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
    """Make Ray Data keep the order of rows and report errors only, until the block ends."""
    import ray

    with warnings.catch_warnings():
        # Ray's copy reads its own deprecated settings.
        warnings.simplefilter("ignore", DeprecationWarning)
        context = ray.data.DataContext.get_current().copy()
    context.execution_options.preserve_order = True
    # Ray Data reserves shares of the cluster for several operators. We have only one, and with the
    # reservation it runs a single task in its first second.
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
