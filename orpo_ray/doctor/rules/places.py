"""Disks, the storage and the hub."""

import math
import shlex
from collections.abc import Iterator

from orpo_ray.config.storage import is_url
from orpo_ray.doctor.facts import Asked, Disk, Hub, RoundTrip
from orpo_ray.doctor.findings import Finding, note, ok, stops, warning
from orpo_ray.doctor.probes.disks import HUB_CACHE, RAY, STORAGE
from orpo_ray.doctor.urls import is_web_url

DISK, HUB = "disk", "hub"

_LEAST_BYTES = 2**30
"""The room that a run insists on (distributed/servers.py)."""
_BASE_BYTES = 20e9
"""A base of 7 billion parameters takes 14 GB in 16 bits."""
_SLOW_BYTES_PER_S = 50e6
"""At that speed, 14 GB take five minutes."""
_SLOW_TRIP_S = 10.0
_SETTINGS = {
    STORAGE: "set storage=FOLDER",
    HUB_CACHE: "export HF_HOME=FOLDER",
    RAY: "export RAY_TMPDIR=FOLDER",
}
_REPAIRS = {
    **dict.fromkeys(("EACCES", "EPERM"), "chown it to the user of the run"),
    "EROFS": "mount it for writing (mount -o remount,rw)",
    "ENOSPC": "make room for bytes (df -h) or files (df -i)",
    "EDQUOT": "make room in the quota of the user (quota -s)",
    **dict.fromkeys(("EIO", "ESTALE", "ENOTCONN", "ETIMEDOUT"), "look at dmesg, and mount it anew"),
}
"""By the system's error; with any other, only another folder helps."""
_SHARED = "use s3://bucket/folder, or a folder that every server mounts"


def judge_disks(asked: Asked, found: tuple[Disk, ...]) -> Iterator[Finding]:
    """Whether there is room, and whether the disk is fast."""
    for disk in found:
        where, setting = f"{disk.path} ({disk.what})", _SETTINGS[disk.what]
        room = f"{where} has {disk.free_bytes / 1e9:.1f} GB free"
        if disk.problem and disk.what == STORAGE:
            continue  # a file was written there, too, and the finding about that says it
        if disk.problem:
            fix = _repair(disk.error, setting)
            yield stops(DISK, f"{where} cannot be written: {disk.problem}", fix)
        elif disk.free_bytes < _LEAST_BYTES:
            fix = f"make room (du -xh {shlex.quote(disk.path)} | sort -h), or {setting}"
            yield stops(DISK, room, fix)
        elif disk.what == HUB_CACHE and disk.free_bytes < _BASE_BYTES:
            yield warning(
                DISK,
                f"{room}; a base of 7 billion parameters takes 14 GB",
                f"make room (hf cache rm), or choose a larger disk ({setting})",
            )
        elif _slowest(disk) < _SLOW_BYTES_PER_S:
            fix = f"choose a folder on a faster disk ({setting})"
            yield warning(DISK, f"{where} is slow: {_speeds(disk)}", fix)
        else:
            yield ok(DISK, ", ".join(filter(None, [room, _speeds(disk)])))


def _repair(error: str, setting: str) -> str:
    """What helps a folder that cannot be written."""
    other = f"choose another folder ({setting})"
    return f"{_REPAIRS[error]}, or {other}" if error in _REPAIRS else other


def repair_bucket(url: str) -> str:
    """What helps a bucket that does not work."""
    return f"check AWS_ENDPOINT_URL, AWS_REGION and the credentials with: aws s3 ls {url}"


def _slowest(disk: Disk) -> float:
    """The lower of both speeds; infinite if they were not measured."""
    rates = (disk.write_bytes_per_s, disk.read_bytes_per_s)
    return min((rate for rate in rates if rate is not None), default=math.inf)


def _speeds(disk: Disk) -> str:
    if disk.write_bytes_per_s is None or disk.read_bytes_per_s is None:
        return ""
    written, read = disk.write_bytes_per_s / 1e6, disk.read_bytes_per_s / 1e6
    return f"{written:.0f} MB/s written, {read:.0f} MB/s read"


def judge_storage(asked: Asked, found: RoundTrip) -> Iterator[Finding]:
    """Whether the storage keeps what is written, and whether this server shares it."""
    place = found.place
    if found.problem:
        fix = repair_bucket(place) if is_url(place) else _repair(found.error, _SETTINGS[STORAGE])
        yield stops(STORAGE, f"{place} does not work: {found.problem}", fix)
    elif found.sees_marker is False:
        yield stops(STORAGE, f"{place} is not the same here as on the first server", _SHARED)
    elif found.seconds > _SLOW_TRIP_S:
        yield warning(
            STORAGE,
            f"{place}: a small file takes {found.seconds:.0f} s there and back",
            "choose a storage nearer to the servers: storage=PLACE",
        )
    else:
        shared = ", shared with the first server" if found.sees_marker else ""
        yield ok(STORAGE, f"{place}: there and back in {found.seconds * 1000:.0f} ms{shared}")


def judge_hub(asked: Asked, found: Hub) -> Iterator[Finding]:
    """Whether a base can be fetched, or is here already."""
    kept = {None: "", True: "; the base is in the cache", False: "; the base is not in the cache"}
    state = kept[found.has_base]
    if found.seconds is not None:
        as_whom = "" if found.has_token else ", without a token (gated bases: hf auth login)"
        yield ok(HUB, f"{found.endpoint} answers in {found.seconds * 1000:.0f} ms{as_whom}{state}")
        return
    if not found.offline and not is_web_url(found.endpoint):
        yield from _no_endpoint(found, state)
        return
    why = "offline, as HF_HUB_OFFLINE says" if found.offline else f"no answer: {found.problem}"
    base = asked.model.base if asked.model else "OWNER/NAME"
    fetch = f"hf download {base} where there is a network, and copy ~/.cache/huggingface here"
    what = f"{found.endpoint}: {why}{state}"
    if found.has_base is False:
        yield stops(HUB, what, fetch + "; or name a local folder as model.base")
    elif found.offline or found.has_base:
        yield ok(HUB, what)
    else:
        yield note(
            HUB,
            f"{what}; bases and datasets of the hub cannot be fetched",
            "export HTTPS_PROXY=http://HOST:PORT if there is a proxy; local folders need no hub",
        )


def _no_endpoint(found: Hub, state: str) -> Iterator[Finding]:
    """Half a URL stops the libraries themselves, another text only what comes from the hub."""
    is_fatal = found.has_base is not None or found.endpoint.startswith("http")
    what = f"HF_ENDPOINT={found.endpoint} is no URL{state}"
    fix = "export HF_ENDPOINT=https://HOST, or unset it"
    yield stops(HUB, what, fix) if is_fatal else warning(HUB, what, fix)
