"""Asks the servers of a cluster: through the Ray that runs there, or over SSH before one does."""

import socket
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from orpo_ray.distributed.servers import ask_each_server, own_address, rays_folder
from orpo_ray.doctor import marker
from orpo_ray.doctor.facts import ASKED, FACTS, Asked, Facts, Server
from orpo_ray.doctor.server import LEAVE, MODULE, REMOVE, TOTAL_S, ask_here, unanswered
from orpo_ray.errors import OrpoRayError

_START_S = 60.0
"""A server may have to start a process of Ray first."""
_CLOCK_S = 10.0
_CLOCK_QUESTIONS = 3

Shell = Callable[[str, str, str], str]
"""Runs a command on a server, with stdin: (address, command, stdin) -> stdout.

Raises ResourceError, naming the server.
"""


def ask_this_machine(asked: Asked) -> list[Server]:
    """The facts of this machine alone."""
    return [Server(name=socket.gethostname(), facts=ask_here(asked))]


def ask_through_ray(asked: Asked) -> list[Server]:
    """The facts of every server of the cluster that this process has joined."""
    asked = replace(asked, marker=marker.leave_marker(asked.storage) if asked.storage else "")
    try:
        answers = ask_each_server(_answer_under_ray, asked, seconds=TOTAL_S + _START_S)
    finally:
        marker.remove_marker(asked.storage, asked.marker)
    clocks = _clocks()
    return [
        Server(
            name=address,
            facts=unanswered(str(answer)) if isinstance(answer, OrpoRayError) else answer,
            clock_offset=clocks[address][0] if address in clocks else None,
            clock_uncertainty=clocks[address][1] if address in clocks else 0.0,
        )
        for address, answer in sorted(answers.items())
    ]


def _answer_under_ray(asked: Asked) -> Facts:
    """Runs on each server."""
    here = replace(asked, address=own_address(), ray_folder=rays_folder(), under_ray=True)
    return ask_here(here)


def _clocks() -> dict[str, tuple[float, float]]:
    """Offset and uncertainty of each server's clock; the quickest of a few answers counts."""
    best: dict[str, tuple[float, float]] = {}
    for _ in range(_CLOCK_QUESTIONS):
        for address, read in _ask_clocks().items():
            if address not in best or read[1] < best[address][1]:
                best[address] = read
    return best


def _ask_clocks() -> dict[str, tuple[float, float]]:
    before = time.time()
    answers = ask_each_server(_time_there, seconds=_CLOCK_S)
    after = time.time()
    return {
        address: offset(before, answer, after)
        for address, answer in answers.items()
        if isinstance(answer, float)
    }


def _time_there() -> float:
    """Runs on each server; Ray takes no function that is written in C."""
    return time.time()


def offset(before: float, told: float, after: float) -> tuple[float, float]:
    """How far a clock is ahead that was read between two moments, and how well that is known."""
    return told - (before + after) / 2, (after - before) / 2


def ask_over_ssh(
    asked: Asked, addresses: Sequence[str], environment: str, shell: Shell
) -> list[Server]:
    """The facts of servers on which nothing runs yet.

    `environment` is the virtual environment of orpo-ray there. The first server leaves a file in
    the storage, by which the others say whether they share it.
    """
    command = f"{environment}/bin/python -m {MODULE}"
    place = ""
    try:
        if asked.storage and len(addresses) > 1:
            place = _mark(asked, addresses[0], command, shell)
        with ThreadPoolExecutor(len(addresses)) as pool:
            return list(
                pool.map(
                    lambda address: _server_over_ssh(
                        replace(asked, address=address, marker=place), address, command, shell
                    ),
                    addresses,
                )
            )
    finally:
        if place:
            question = ASKED.dump_json(replace(asked, marker=place)).decode()
            shell(addresses[0], f"{command} {REMOVE}", question)


def _mark(asked: Asked, address: str, command: str, shell: Shell) -> str:
    """The place of the file that the server has left; empty if it could not.

    Why it could not is found when it is asked for its facts.
    """
    try:
        said = shell(address, f"{command} {LEAVE}", ASKED.dump_json(asked).decode())
    except OrpoRayError:
        return ""
    return said.strip()


def _server_over_ssh(asked: Asked, address: str, command: str, shell: Shell) -> Server:
    try:
        before = time.time()
        told = float(shell(address, "date +%s.%N", ""))
        clock = offset(before, told, time.time())
        said = shell(address, command, ASKED.dump_json(asked).decode())
    except OrpoRayError as error:
        return Server(name=address, facts=unanswered(str(error)))
    return Server(
        name=address,
        facts=FACTS.validate_json(said),
        clock_offset=clock[0],
        clock_uncertainty=clock[1],
    )
