"""A figure that is known only between two ends."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True)
class Interval:
    """A figure with the ends between which it lies, all in one unit."""

    low: float
    middle: float
    high: float

    def __add__(self, other: "Interval") -> "Interval":
        return Interval(self.low + other.low, self.middle + other.middle, self.high + other.high)

    def times(self, factor: float) -> "Interval":
        """All three, multiplied by a factor above 0."""
        return Interval(factor * self.low, factor * self.middle, factor * self.high)

    def under(self, amount: float) -> "Interval":
        """What `amount` gives when it is divided by this: the ends change sides."""
        return Interval(amount / self.high, amount / self.middle, amount / self.low)

    def to_json(self) -> list[float]:
        """Low end, middle and high end."""
        return [self.low, self.middle, self.high]

    @classmethod
    def total(cls, parts: Iterable["Interval"]) -> "Interval":
        """All of them together."""
        return sum(parts, start=Interval.sure(0.0))

    @classmethod
    def between(cls, low: float, high: float) -> Self:
        """With the middle between both ends."""
        return cls(low, (low + high) / 2, high)

    @classmethod
    def sure(cls, value: float) -> Self:
        """A figure without doubt."""
        return cls(value, value, value)
