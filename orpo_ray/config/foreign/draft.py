"""Collects our settings while a foreign file is read, and what became of each of its keys."""

from collections.abc import Mapping
from typing import Any

from orpo_ray.config.foreign.words import instead_of
from orpo_ray.config.plain_yaml import shown
from orpo_ray.errors import ConfigError


class Draft:
    """A config in the making.

    A reader function takes foreign keys, puts our keys, and remarks on what differs. A foreign key
    that it does not take is listed as one without a counterpart.
    """

    def __init__(self, project: str, foreign: Mapping[str, Any]) -> None:
        self.project = project
        self.foreign = foreign
        self.settings: dict[str, Any] = {}
        """Values by dotted key, sources as a list of sections."""
        self.remarks: dict[str, list[str]] = {}
        """Comments on what differs, by the dotted key that they will stand above."""
        self.lacking: dict[str, str] = {}
        """What orpo_ray does instead, by the foreign key that has no counterpart."""
        self._taken: set[str] = set()

    def take(self, key: str, default: Any = None) -> Any:
        """The value of a foreign key that is translated; the default if it is not set."""
        self._taken.add(key)
        value = self.foreign.get(key)
        return default if is_unset(value) else value

    def take_first(self, *keys: str) -> Any:
        """The first value that is set, of keys that mean the same in different versions."""
        values = [self.take(key) for key in keys]
        return next((value for value in values if value is not None), None)

    def number(self, key: str, default: float | None = None) -> Any:
        """A foreign number: an int if it is whole, else a float. ConfigError if it is none."""
        return as_number(key, self.take(key, default))

    def flag(self, key: str, default: bool = False) -> bool:
        """A foreign yes or no."""
        value = self.take(key, default)
        return str(value).lower() in ("true", "yes", "1")

    def is_set(self, key: str) -> bool:
        """Whether the foreign file sets a key."""
        return not is_unset(self.foreign.get(key))

    def put(self, key: str, value: Any, *remarks: str) -> None:
        """Set one of our keys, under its dotted name."""
        self.settings[key] = value
        self.remark(key, *remarks)

    def put_default(self, key: str, value: Any, named: str) -> None:
        """Set one of our keys to the foreign project's default, because `named` is not set."""
        self.put(key, value, f"{named}: not set; this is the default of {self.project}")

    def remark(self, key: str, *remarks: str) -> None:
        """Add comments above one of our keys."""
        self.remarks.setdefault(key, []).extend(remark for remark in remarks if remark)

    def lack(self, key: str, instead: str) -> None:
        """Note that a foreign key has no counterpart, and what orpo_ray does instead."""
        self._taken.add(key)
        if self.is_set(key):
            self.lacking[key] = instead

    def finish(self) -> None:
        """List the keys that no reader took as keys without a counterpart."""
        for key, value in self.foreign.items():
            if key not in self._taken and not is_unset(value):
                self.lacking[key] = instead_of(key, str(self.settings.get("objective.kind", "")))

    @property
    def translated(self) -> list[str]:
        """The foreign keys that were translated, in the order of their file."""
        return [key for key in self.foreign if key in self._taken and key not in self.lacking]

    @property
    def unset(self) -> list[str]:
        """The foreign keys that the file names without a value."""
        return [key for key, value in self.foreign.items() if is_unset(value)]


def is_unset(value: Any) -> bool:
    """Whether a value is empty."""
    return value is None or value in ("", [], {})


def as_number(key: str, value: Any) -> Any:
    """A number, which may be written as text: an int if it is whole, else a float.

    Raises ConfigError for any other value.
    """
    if value is None:
        return None
    try:
        number = float(value)
        return int(number) if number.is_integer() else number
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(f"{key}: must be a number, not {shown(value)}") from None


def as_names(value: Any) -> list[str]:
    """A list of names, which may be written as one text with commas."""
    if value is None:
        return []
    items = value.split(",") if isinstance(value, str) else value
    if not isinstance(items, list):
        items = [items]
    return [str(item).strip() for item in items if str(item).strip()]
