"""Numbers as a reader likes them: few digits, one unit."""

import math
from typing import Any


def number(value: float | None, digits: int = 4) -> str:
    """A number with so many digits that count; empty for none."""
    if value is None or not math.isfinite(value):
        return ""
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{value:,.0f}"
    if not 1e-4 <= abs(value) < 1e15:
        return f"{value:.{digits - 1}e}"
    whole = len(f"{abs(value):.0f}") if abs(value) >= 1 else 0
    decimals = digits - whole if whole else digits - 1 - math.floor(math.log10(abs(value)))
    return f"{value:,.{max(0, decimals)}f}"


def share(value: float | None) -> str:
    """A share as a percentage."""
    return "" if value is None or not math.isfinite(value) else f"{100 * value:.1f} %"


def between(low: float | None, high: float | None) -> str:
    """An interval; empty if it has no ends."""
    if low is None or high is None:
        return ""
    return f"{low:.3f} to {high:.3f}"


def duration(seconds: float | None) -> str:
    """A time in the units that read best."""
    if seconds is None or not math.isfinite(seconds):
        return ""
    if seconds < 120:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 120:
        return f"{minutes} min {rest:02} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min"


def size(count: float | None) -> str:
    """Bytes in gigabytes."""
    return "" if count is None else f"{count / 1e9:.3g} GB"


def counted(count: int, noun: str) -> str:
    """A number of things."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def plain(value: Any) -> str:
    """A setting's value on one line."""
    match value:
        case None:
            return "none"
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:.4g}"
        case list() | tuple():
            return ", ".join(plain(item) for item in value)
        case dict():
            return ", ".join(f"{name} {plain(item)}" for name, item in value.items())
    return str(value)
