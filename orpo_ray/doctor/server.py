"""All probes of one server. `python -m orpo_ray.doctor.server` reads a question and answers it.

Question and answer are JSON on stdin and stdout, so that the same command serves this machine,
another one over SSH, and a server of a Ray cluster.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from pydantic import TypeAdapter

from orpo_ray.doctor.facts import (
    ASKED,
    FACTS,
    Asked,
    Attention,
    Base,
    Cards,
    Disk,
    Facts,
    Hub,
    Nf4,
    RayState,
    RoundTrip,
    Settings,
    Software,
    System,
    Torch,
)
from orpo_ray.doctor.limited import limited
from orpo_ray.doctor.marker import leave_marker, remove_marker
from orpo_ray.doctor.probes import base, disks, gpus, hub, kernels, ray_state, software, system
from orpo_ray.doctor.probes import settings as settings_probe
from orpo_ray.doctor.probes import storage as storage_probe

MODULE = "orpo_ray.doctor.server"
TOTAL_S = 100.0
"""All probes of a server end within that time. SSH gives a command two minutes."""
_START_S = 15.0
LEAVE, REMOVE = "leave", "remove"


@dataclass(frozen=True)
class Probe:
    """`look` gets what is asked and the facts so far. It answers within `seconds` or fails."""

    name: str
    kind: Any
    """The type of its answer, a field of `Facts`."""
    seconds: float
    look: Callable[[Asked, Facts], Any]


PROBES = (
    Probe("software", Software, 10, lambda asked, facts: software.look()),
    Probe("system", System, 10, lambda asked, facts: system.look(asked)),
    Probe("ray", RayState, 10, lambda asked, facts: ray_state.look(asked)),
    Probe("cards", Cards, 15, lambda asked, facts: gpus.look_at_cards()),
    Probe("disks", tuple[Disk, ...], 30, lambda asked, facts: disks.look(asked)),
    Probe("storage", RoundTrip | None, 30, lambda asked, facts: storage_probe.look(asked)),
    Probe("hub", Hub, 15, lambda asked, facts: hub.look(asked)),
    Probe("torch", Torch, 40, lambda asked, facts: gpus.look_with_torch()),
    Probe("settings", Settings | None, 40, lambda asked, facts: settings_probe.look(asked)),
    Probe("attention", Attention, 40, lambda asked, facts: kernels.try_attention()),
    Probe("nf4", Nf4, 40, lambda asked, facts: kernels.try_nf4()),
    Probe("base", Base | None, 40, lambda asked, facts: base.look(asked, facts.hub)),
)


def gather(asked: Asked, probes: Sequence[Probe] = PROBES, total_s: float = TOTAL_S) -> Facts:
    """Ask every probe, one after the other, so that none disturbs the speed of another."""
    asked = replace(asked, ray_folder=asked.ray_folder or ray_state.new_rays_folder())
    facts = Facts()
    deadline = time.monotonic() + total_s
    for probe in probes:
        adapter: TypeAdapter[Any] = TypeAdapter(probe.kind)
        left = max(0.1, min(probe.seconds, deadline - time.monotonic()))
        outcome = limited(partial(_answer, probe, adapter, asked, facts), left)
        if outcome.problem:
            facts = replace(facts, failures={**facts.failures, probe.name: outcome.problem})
        else:
            facts = replace(facts, **{probe.name: adapter.validate_json(outcome.answer)})
    return facts


def _answer(probe: Probe, adapter: TypeAdapter[Any], asked: Asked, facts: Facts) -> bytes:
    return adapter.dump_json(probe.look(asked, facts))


def ask_here(asked: Asked) -> Facts:
    """The facts of this machine, gathered by a fresh process, which has no threads.

    If that process fails, the facts say so.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-m", MODULE],
            input=ASKED.dump_json(asked),
            capture_output=True,
            check=False,
            timeout=TOTAL_S + _START_S,
        )
    except subprocess.TimeoutExpired:
        return unanswered(f"no answer within {TOTAL_S + _START_S:.0f} s")
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines() or ["it does not say why"]
        return unanswered(said[-1])
    return FACTS.validate_json(done.stdout)


def unanswered(why: str) -> Facts:
    """The facts of a server that gave none."""
    return Facts(failures={"server": why})


def main(words: Sequence[str]) -> None:
    """Answer the question on stdin; with a word, leave or remove a marker in the storage."""
    asked = ASKED.validate_json(sys.stdin.buffer.read())
    match words:
        case [word] if word == LEAVE:
            print(leave_marker(asked.storage))
        case [word] if word == REMOVE:
            remove_marker(asked.storage, asked.marker)
        case _:
            sys.stdout.buffer.write(FACTS.dump_json(gather(asked)))
    sys.stdout.flush()
    # Python's own end would wait for a child that a dead network disk keeps alive.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
