"""Probes and servers that gave no answer."""

import re
from collections.abc import Iterator

from orpo_ray.config.storage import is_url
from orpo_ray.doctor.facts import Asked, Facts
from orpo_ray.doctor.findings import Finding, Level
from orpo_ray.doctor.rules.places import repair_bucket

SERVER = "server"

_NO_PACKAGE = re.compile(
    r"No module named '?orpo_ray|cannot load orpo_ray|/bin/python: (No such file|not found)"
)
_INSTALL = "pip install orpo-ray there, as on the other servers (cluster/README.md says how)"
_REINSTALL = "pip install --force-reinstall {}, with the constraints.txt of this release"

_FIXES = {
    "software": "pip check, then make the virtual environment anew",
    "system": "mount -t tmpfs tmpfs /dev/shm, if it is not there",
    "ray": _REINSTALL.format("'ray[default,data,train,tune]'"),
    "cards": "look at nvidia-smi, and reboot the server if it hangs",
    "disks": "look at df -h, and mount a disk that hangs anew",
    "storage": "look at df -h for a mount that hangs, or name another storage: storage=PLACE",
    "hub": "export HF_HUB_OFFLINE=1 to use the cache only",
    "torch": _REINSTALL.format("torch") + "; look at nvidia-smi if it hangs",
    "settings": _REINSTALL.format("torch") + "; look at nvidia-smi if it hangs",
    "attention": _REINSTALL.format("torch"),
    "nf4": _REINSTALL.format("bitsandbytes") + "; or set model.quantization=none",
    "base": "hf download the base first, or name a local folder as model.base",
}
_HARMLESS = ("hub", "attention", "cards")
"""What a run can do without."""


def judge(asked: Asked, facts: Facts) -> Iterator[Finding]:
    """A finding for each probe without an answer."""
    for name, why in facts.failures.items():
        if name == SERVER:
            yield Finding(subject=SERVER, level=Level.STOPS, what=why, fix=_fix(why))
            continue
        spared = name == "nf4" and not asked.uses_nf4
        level = Level.WARNING if name in _HARMLESS or spared else Level.STOPS
        is_bucket = name == "storage" and is_url(asked.storage)
        fix = repair_bucket(asked.storage) if is_bucket else _FIXES[name]
        yield Finding(subject=name, level=level, what=f"it failed: {why}", fix=fix)


def _fix(why: str) -> str:
    if _NO_PACKAGE.search(why):
        return _INSTALL
    if "reached" in why:
        return "switch it on, and check that ssh with the key of hosts.yaml gets in"
    return "look at the server's own log (journalctl -b), and ask again"
