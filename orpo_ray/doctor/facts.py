"""What is asked of a server, and what its probes answer: plain data, which travels as JSON."""

from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter

from orpo_ray.config import ModelConfig, RunConfig


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a run would use, beside the machine itself."""

    storage: str = ""
    """A folder or a URL; empty if none is looked at."""
    marker: str = ""
    """The place of a file that another server has written into the storage; empty if none has."""
    model: ModelConfig | None = None
    """The base to look at, if one is named."""
    runs: tuple[RunConfig, ...] = ()
    """The run of the config, or each of its stages; empty if no config is named."""
    token_file: str = ""
    """The file in which commands look for a cluster's token."""
    dashboard: str = ""
    """URL at which a Ray dashboard may answer; empty if none is looked for."""
    ray_folder: str = ""
    """Where Ray keeps its files; empty for the place where a new Ray would."""
    address: str = ""
    """The address by which other servers reach this one; empty if there are none."""
    under_ray: bool = False
    """Whether a process of a running Ray answers, whose limits are those of its workers."""

    @property
    def uses_nf4(self) -> bool:
        """Whether a run holds its base in NF4, which is the default."""
        models = [run.model for run in self.runs] or ([self.model] if self.model else [])
        return not models or any(model.quantization == "nf4" for model in models)


@dataclass(frozen=True, kw_only=True)
class Software:
    """Installed versions, and those that orpo-ray supports as it says itself."""

    python: str
    packages: dict[str, str]
    """Versions of what orpo-ray requires; those that are missing are left out."""
    supported: dict[str, str]
    """Version specifiers by package, and by `python`; empty if orpo-ray is not installed."""


@dataclass(frozen=True, kw_only=True)
class Cards:
    """NVIDIA's cards, as the system and the driver see them. No library of ours is involved."""

    on_bus: int
    """How many cards are plugged in."""
    driver: str = ""
    names: tuple[str, ...] = ()
    problem: str = ""
    """What nvidia-smi says if it fails."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """A GPU as torch sees it."""

    name: str
    capability: tuple[int, int]
    memory_bytes: int
    bfloat16: bool
    problem: str = ""
    """Why a first addition on it failed."""


@dataclass(frozen=True, kw_only=True)
class Torch:
    """What torch can compute with."""

    cuda: str = ""
    """The version of CUDA that it was built for; empty for a build for CPUs."""
    complaint: str = ""
    """What it says if it finds no GPU."""
    devices: tuple[Device, ...] = ()
    kernels: tuple[str, ...] = ()
    """What its kernels were built for, such as sm_90."""
    peers: bool | None = None
    """Whether each GPU reads the memory of the others directly; None with fewer than two."""


@dataclass(frozen=True, kw_only=True)
class Attention:
    """The attention that packed rows take, tried."""

    path: str
    """Its name, as a run announces it."""
    is_flash: bool
    device: str
    dtype: str


@dataclass(frozen=True, kw_only=True)
class Nf4:
    """A layer of four bits compared with a layer of floats, forward and backward.

    The errors are relative to the norm of what is expected.
    """

    device: str
    dtype: str
    forward: float
    backward: float
    bound: float
    """The largest error that rounding explains."""
    rounding: float
    """The largest distance of a weight from its four bits, in units of its block's largest one."""
    rounding_bound: float


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the checks of the runs themselves refuse here."""

    has_gpu: bool
    missing: tuple[str, ...] = ()
    """Messages about what is not installed or set up, whatever the workers compute on."""
    unfit: tuple[str, ...] = ()
    """Messages about what workers here cannot compute."""


@dataclass(frozen=True, kw_only=True)
class System:
    """Limits and network of the operating system."""

    shared_memory_bytes: int
    open_files: int
    open_files_hard: int
    in_container: bool
    interfaces: dict[str, list[str]]
    """Addresses by network interface."""
    has_infiniband: bool
    variables: dict[str, str]
    """Variables of NCCL and gloo that are set."""
    address: str = ""
    """The address by which other servers reach this one; empty if there are none."""
    under_ray: bool = False
    """Whether the limits are those of a process of a running Ray."""


@dataclass(frozen=True, kw_only=True)
class Disk:
    """A place where a run writes or reads much."""

    what: str
    path: str
    """The folder that was looked at: the place itself, or the nearest one above that exists."""
    device: int
    free_bytes: int
    write_bytes_per_s: float | None = None
    read_bytes_per_s: float | None = None
    problem: str = ""
    """Why no file can be written there."""
    error: str = ""
    """The name of the system's error, such as EROFS, if it says how to repair it."""


@dataclass(frozen=True, kw_only=True)
class RoundTrip:
    """A small file written to the storage, read back and deleted."""

    place: str
    seconds: float = 0.0
    problem: str = ""
    error: str = ""
    """As that of a disk."""
    sees_marker: bool | None = None
    """Whether a file that another server has written is seen; None if there is none."""


@dataclass(frozen=True, kw_only=True)
class Hub:
    """The Hugging Face hub, and its local cache."""

    endpoint: str
    offline: bool
    """Whether the environment says to use the cache only."""
    seconds: float | None = None
    """How long the hub took to answer; None if it did not, or was not asked."""
    problem: str = ""
    has_token: bool = False
    has_base: bool | None = None
    """Whether the base's files are in the cache; None if no base of the hub is named."""


@dataclass(frozen=True, kw_only=True)
class Base:
    """The tokenizer of a base, with the template and the end token that training takes."""

    name: str
    skipped: str = ""
    """Why it was not looked at."""
    problem: str = ""
    template: str = ""
    has_own_template: bool = False
    end: str = ""
    """The token with which the template ends an answer."""
    said: tuple[str, ...] = ()
    """What a run would announce about them."""


@dataclass(frozen=True, kw_only=True)
class RayState:
    """Ray's settings on a server, and whether a dashboard answers there."""

    version: str
    folder: str = ""
    """Where it keeps its files, or would."""
    auth_mode: str = ""
    token: str = ""
    """Where a token is: a file or a variable's name; empty if there is none."""
    token_problem: str = ""
    dashboard: str = ""
    is_running: bool = False
    """Whether this server belongs to the cluster that was asked."""
    answer: str = ""
    """"open", "asks for a token", "other", "no URL", or empty if nothing answers."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the probes of one server found; None where a probe failed or was not asked."""

    software: Software | None = None
    cards: Cards | None = None
    torch: Torch | None = None
    attention: Attention | None = None
    nf4: Nf4 | None = None
    settings: Settings | None = None
    system: System | None = None
    disks: tuple[Disk, ...] | None = None
    storage: RoundTrip | None = None
    hub: Hub | None = None
    base: Base | None = None
    ray: RayState | None = None
    failures: dict[str, str] = field(default_factory=dict)
    """Why a probe has no answer, by its name; "server" if the whole server has none."""


@dataclass(frozen=True, kw_only=True)
class Server:
    """A server's facts, and how its clock differs from the asking machine's, in seconds."""

    name: str
    facts: Facts
    clock_offset: float | None = None
    clock_uncertainty: float = 0.0


FACTS: TypeAdapter[Facts] = TypeAdapter(Facts)
ASKED: TypeAdapter[Asked] = TypeAdapter(Asked)


def plain(server: Server) -> dict[str, Any]:
    """A server's facts as JSON has them."""
    facts: dict[str, Any] = FACTS.dump_python(server.facts, mode="json")
    clock = {"offset": server.clock_offset, "uncertainty": server.clock_uncertainty}
    return {**facts, "clock": clock}
