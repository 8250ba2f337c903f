"""What a checkup finds, and how bad each finding is."""

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any


class Level(StrEnum):
    """How bad a finding is, the worst first."""

    STOPS = "stops"
    """A run would end with an error, or hang."""
    WARNING = "warning"
    """A run may be slow, insecure, or fail under some conditions."""
    NOTE = "note"
    """Nothing is wrong; something better can be had."""
    OK = "ok"


SEVERITY = list(Level)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at. Unless it is well, `fix` says what to do about it."""

    subject: str
    level: Level
    what: str
    fix: str = ""

    def __post_init__(self) -> None:
        """Refuse a complaint that nobody can act on."""
        assert self.fix or self.level is Level.OK, self.what

    @property
    def plain(self) -> dict[str, Any]:
        """The finding as JSON has it."""
        return asdict(self)


def ok(subject: str, what: str) -> Finding:
    """Something that is well."""
    return Finding(subject=subject, level=Level.OK, what=what)


def note(subject: str, what: str, fix: str) -> Finding:
    """Something that could be better."""
    return Finding(subject=subject, level=Level.NOTE, what=what, fix=fix)


def warning(subject: str, what: str, fix: str) -> Finding:
    """Something that may go wrong."""
    return Finding(subject=subject, level=Level.WARNING, what=what, fix=fix)


def stops(subject: str, what: str, fix: str) -> Finding:
    """Something that stops a run."""
    return Finding(subject=subject, level=Level.STOPS, what=what, fix=fix)


def sorted_by_severity(findings: list[Finding]) -> list[Finding]:
    """The worst first; equally bad ones in the order in which they were found."""
    return sorted(findings, key=lambda finding: SEVERITY.index(finding.level))
