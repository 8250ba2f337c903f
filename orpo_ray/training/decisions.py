"""What a run has settled, as plain data that any process can read without loading a library."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Decisions:
    """What `auto` came to. Written to run.json; all but `strategy` are taken from there when the run is resumed."""

    device: str
    dtype: str
    attention: str
    layout: str
    strategy: str
    gradient_checkpointing: bool
    tokens_per_microbatch: int
    find_budget: bool = False
    """Whether the last two are yet to be found from the memory that is there, on the workers."""


@dataclass(frozen=True)
class Setup:
    """The settled inputs of a run, plain data: identity holds what a resume must find unchanged."""

    decisions: Decisions
    identity: dict[str, str]
