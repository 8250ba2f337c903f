"""What a run has settled, as plain data that any process can read without loading a library."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from orpo_ray.training.plan import Layout
from orpo_ray.training.strategy import Strategy


@dataclass(frozen=True, kw_only=True)
class Decisions:
    """What every `auto` was decided to be.

    Written to run.json. A resumed run reads them there. `device` and `strategy` are decided again,
    and so is `tokens_per_microbatch` if the config sets it.
    """

    device: str
    dtype: str
    attention: str
    layout: Layout
    strategy: Strategy
    gradient_checkpointing: bool
    tokens_per_microbatch: int
    threads: int | None = None
    """Threads of each process on a CPU; None if environment or config set them."""
    find_budget: bool = False
    """Whether the workers must still find the two fields above from the memory that they have."""

    @classmethod
    def from_json(cls, written: Mapping[str, Any]) -> Self:
        """Read them from run.json."""
        kinds = {"layout": Layout(written["layout"]), "strategy": Strategy(written["strategy"])}
        return cls(**{**written, **kinds})


@dataclass(frozen=True)
class Setup:
    """The decisions and inputs of a run, as plain data."""

    decisions: Decisions
    identity: dict[str, str]
    """Hashes of the inputs, which must be the same when the run is resumed."""
    schedule_from: int = 0
    """The step after which the learning rate's schedule begins: above 0 if the run was extended."""
    tries_threads: bool = False
    """Whether a process on a CPU tries how many threads gain; if not, their number is set."""
