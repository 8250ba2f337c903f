"""Learning rates that suit an objective, an adapter and a size of the base, with their sources.

A run without a rate takes the default, and a search without ranges takes the ranges.
docs/methods.md shows them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Suited:
    """A range as `search.space` writes it, and the source that suggests it."""

    range: Mapping[str, Any]
    source: str

    def times(self, factor: float, source: str) -> "Suited":
        """The range with both ends multiplied, and the source of the factor."""
        ((kind, (low, high)),) = self.range.items()
        scaled = {kind: [float(f"{end * factor:.12g}") for end in (low, high)]}
        return Suited(scaled, f"{self.source}; here {factor:g} times as high: {source}")


SMALL_BASE = 1_000_000_000
"""A base with fewer parameters is small: its best learning rates are higher."""

_SMALL_FACTOR = 5.0
_SMALL_SOURCE = (
    "small bases want higher rates. For Llama the best rate is proportional to (2000 / hidden "
    "size)^0.781 (tinker-cookbook, get_lr): 4.6 times as high at hidden size 576 as at 4,096"
)

_RATES = {
    ("lora", True): Suited(
        {"loguniform": [2e-5, 4e-4]},
        "Axolotl's example mistral-qlora-orpo takes 2e-4",
    ),
    ("lora", False): Suited(
        {"loguniform": [1e-6, 1e-4]},
        "Zephyr 7B DPO QLoRA (alignment-handbook) and Qwen3 LoRA DPO (LLaMA-Factory): 5e-6",
    ),
    ("none", True): Suited(
        {"loguniform": [2e-7, 1e-5]}, "Zephyr 141B ORPO (alignment-handbook): 5e-6"
    ),
    ("none", False): Suited(
        {"loguniform": [2e-8, 2e-6]}, "Zephyr 7B Gemma DPO (alignment-handbook): 5e-7"
    ),
}
"""Learning rates by adapter kind and by whether the loss has a likelihood term.

That term keeps the text readable at higher rates.
"""

_DEFAULT_RATES = {
    ("lora", True): 2e-4,
    ("lora", False): 5e-5,
    ("none", True): 5e-6,
    ("none", False): 5e-7,
}


def default_rate(adapter: str, has_likelihood: bool) -> float:
    """The learning rate of a run that names none. Its base may have any size."""
    return _DEFAULT_RATES[adapter, has_likelihood]


def suited_rates(adapter: str, has_likelihood: bool, parameters: int) -> Suited:
    """Learning rates for an adapter kind and a base of this size."""
    rates = _RATES[adapter, has_likelihood]
    return rates.times(_SMALL_FACTOR, _SMALL_SOURCE) if parameters < SMALL_BASE else rates
