"""What GPUs and networks can do by their makers' papers: hardware.yaml, read and looked up."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from orpo_ray.config.near import near_name
from orpo_ray.errors import ConfigError

_GIB, _GIGA, _TERA, _MICRO = 2**30, 1e9, 1e12, 1e-6
USUAL_NETWORK = "1gbit"
"""What joins servers, as long as nobody names it."""
_ETHERNET = re.compile(r"(\d+(?:\.\d+)?)gbit")


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One kind of GPU.

    `memory` is in bytes, as CUDA reports it. `half_flops` is the dense peak a second in bfloat16
    with sums in float32 (in float16 where there is no bfloat16), `float_flops` that in float32.
    `bandwidth` of the memory is in bytes a second. `link` names the link between GPUs of a server.
    """

    name: str
    title: str
    memory: int
    half_flops: float
    float_flops: float
    bandwidth: float
    bf16: bool
    fp4: bool
    link: str


@dataclass(frozen=True)
class Link:
    """Between the GPUs of a server, or between servers.

    `rate` is in bytes a second in each direction, of one GPU or of one server, by its name and not
    measured. `latency` is in seconds a message.
    """

    name: str
    rate: float
    latency: float


def load_gpus() -> dict[str, Gpu]:
    """All known GPUs by name, in the order of the table."""
    return {name: _gpu(name, entry) for name, entry in _table()["gpus"].items()}


def find_gpus(names: str) -> list[Gpu]:
    """The GPUs of a list such as `l4,h100`, or `all`.

    The first part of several names, such as `h100`, means all of them. Raises ConfigError for an
    unknown name.
    """
    known = load_gpus()
    found: dict[str, Gpu] = {}
    for written in names.split(","):
        found |= {gpu.name: gpu for gpu in _named(written.strip(), known)}
    return list(found.values())


def find_server_link(name: str) -> Link:
    """The link between the GPUs of a server, by the name that a Gpu gives."""
    entry = _table()["server_links"][name]
    return Link(name, _number(entry["rate_gbs"]) * _GIGA, _number(entry["latency_us"]) * _MICRO)


def find_network(name: str) -> Link:
    """The network between servers: `1gbit`, any other number of gbit, or a kind of InfiniBand.

    Raises ConfigError for an unknown name.
    """
    networks = _table()["networks"]
    written = name.strip().lower()
    ethernet = _ETHERNET.fullmatch(written)
    if ethernet and float(ethernet[1]) > 0:
        return _network(written, float(ethernet[1]), networks["ethernet"])
    fixed = {each: entry for each, entry in networks.items() if "rate_gbit" in entry}
    if written in fixed:
        return _network(written, _number(fixed[written]["rate_gbit"]), fixed[written])
    raise ConfigError(
        f"--network: no network {name!r}; write its rate, such as 1gbit or 25gbit, or "
        f"{' or '.join(fixed)}"
    )


@cache
def _table() -> dict[str, Any]:
    text = files(__package__).joinpath("hardware.yaml").read_text(encoding="utf-8")
    table: dict[str, Any] = yaml.safe_load(text)
    return table


def _gpu(name: str, entry: dict[str, Any]) -> Gpu:
    return Gpu(
        name=name,
        title=entry["title"],
        memory=int(_number(entry["memory_gib"]) * _GIB),
        half_flops=_number(entry["half_tflops"]) * _TERA,
        float_flops=_number(entry["float_tflops"]) * _TERA,
        bandwidth=_number(entry["bandwidth_gbs"]) * _GIGA,
        bf16=entry["bf16"]["value"],
        fp4=entry["fp4"]["value"],
        link=entry["link"]["value"],
    )


def _named(written: str, known: Mapping[str, Gpu]) -> Iterable[Gpu]:
    """The GPUs that one name means."""
    if written == "all":
        return known.values()
    plain = _plain(written)
    exact = [
        known[name]
        for name, entry in _table()["gpus"].items()
        if plain in map(_plain, (name, *entry.get("also", ())))
    ]
    family = [gpu for name, gpu in known.items() if _plain(name.partition("-")[0]) == plain]
    if exact or family:
        return exact or family
    near = near_name(written, known)
    hint = f"did you mean {near}? The planner knows" if near else "the planner knows"
    raise ConfigError(f"--gpu: no GPU {written!r}; {hint} {', '.join(known)}")


def _plain(name: str) -> str:
    """A name without what people write in different ways: `RTX 4090`, `nvidia-rtx-4090`."""
    return re.sub(r"nvidia|geforce|tesla|[\s_-]", "", name.lower())


def _network(name: str, gbit: float, entry: dict[str, Any]) -> Link:
    return Link(name, gbit * _GIGA / 8, _number(entry["latency_us"]) * _MICRO)


def _number(figure: dict[str, Any]) -> float:
    return float(figure["value"])
