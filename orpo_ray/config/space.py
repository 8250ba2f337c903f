"""What a searched field may be, as the YAML writes it: a span of numbers or a list of values."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

FORMS = {
    "uniform": "[low, high]",
    "loguniform": "[low, high]",
    "quniform": "[low, high, step]",
    "qloguniform": "[low, high, step]",
    "choice": "a list of values",
    "grid": "a list of values",
}


@dataclass(frozen=True)
class Span:
    """Numbers from low to high, drawn evenly or by their logarithm.

    With a step, only low plus multiples of the step.
    """

    low: float
    high: float
    log: bool = False
    step: float | None = None

    def at(self, share: float) -> float | int:
        """The value at a share of the way from low to high, 0 <= share < 1.

        Each value of a span with steps has an equal part, unless the span is on a log scale.
        """
        if self.log:
            return self.settle(self.low * (self.high / self.low) ** share)
        if self.step is None:
            return self.low + share * (self.high - self.low)
        steps = int((self.high - self.low) / self.step + 1e-9)
        return self.settle(self.low + int(share * (steps + 1)) * self.step)

    def share(self, value: float) -> float:
        """How far a value is from low to high, from 0 to 1; the reverse of `at`."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def holds(self, value: Any) -> bool:
        """Whether a value lies in the span."""
        return _is_number(value) and self.low <= value <= self.high

    def settle(self, drawn: float) -> float | int:
        """A drawn number itself, or, in a span with steps, the nearest value that it may take."""
        if self.step is None:
            return drawn
        steps = min(
            round((drawn - self.low) / self.step), int((self.high - self.low) / self.step + 1e-9)
        )
        if all(isinstance(number, int) for number in (self.low, self.high, self.step)):
            return self.low + steps * self.step
        rounded = float(f"{self.low + steps * self.step:.12g}")  # not 0.30000000000000004
        return min(max(rounded, self.low), self.high)


@dataclass(frozen=True)
class Options:
    """A list of values, which may be sections.

    `is_grid`: each value is tried with each value of every other field.
    """

    values: tuple[Any, ...]
    is_grid: bool = False


Domain = Span | Options


def parse_domain(text: Any) -> Domain:
    """Read `{loguniform: [0.05, 1.0]}` and its like.

    Raises ValueError with what is wrong and what to write.
    """
    if not isinstance(text, Mapping) or len(text) != 1:
        raise ValueError(f"write one of {', '.join(FORMS)}, such as {{loguniform: [0.05, 1.0]}}")
    ((kind, numbers),) = text.items()
    if kind not in FORMS:
        near = near_form(kind)
        raise ValueError(
            f"{kind}: unknown; "
            + (f"did you mean {near}?" if near else f"known: {', '.join(FORMS)}")
        )
    if not isinstance(numbers, list | tuple):
        raise ValueError(f"{kind}: write {FORMS[kind]}")
    if kind in ("choice", "grid"):
        return _options(kind, numbers)
    return _span(kind, numbers)


def written(domain: Domain) -> dict[str, list[Any]]:
    """A range as `search.space` writes it."""
    if isinstance(domain, Options):
        return {"grid" if domain.is_grid else "choice": list(domain.values)}
    kind = ("q" if domain.step is not None else "") + ("loguniform" if domain.log else "uniform")
    numbers = (domain.low, domain.high, domain.step)
    return {kind: [number for number in numbers if number is not None]}


def near_form(written: Any) -> str | None:
    """The form of range that a word names, perhaps misspelt."""
    return next(iter(get_close_matches(str(written), FORMS, n=1, cutoff=0.7)), None)


def _options(kind: str, values: list[Any] | tuple[Any, ...]) -> Options:
    if not values:
        raise ValueError(f"{kind}: it has no values; write some")
    if any(value in values[:index] for index, value in enumerate(values)):
        raise ValueError(f"{kind}: a value is in it twice; write each value once")
    return Options(tuple(values), is_grid=kind == "grid")


def _span(kind: str, numbers: list[Any] | tuple[Any, ...]) -> Span:
    has_step = kind.startswith("q")
    if len(numbers) != (3 if has_step else 2) or not all(_is_number(number) for number in numbers):
        raise ValueError(f"{kind}: write {FORMS[kind]}, finite numbers without quotes")
    low, high, step = numbers if has_step else (*numbers, None)
    log = kind.endswith("loguniform")
    if low >= high:
        raise ValueError(f"{kind}: {low:g} to {high:g} is no range; write the smaller number first")
    if log and low <= 0:
        raise ValueError(
            f"{kind}: its low end is {low:g}, which has no logarithm; start above 0, or use uniform"
        )
    if step is not None and not 0 < step <= high - low:
        raise ValueError(
            f"{kind}: the step must be above 0 and no larger than the range, not {step:g}"
        )
    return Span(low, high, log, step)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
