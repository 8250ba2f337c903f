"""What to write instead of a key that a config does not have."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from orpo_ray.config.foreign.words import Word, word_of
from orpo_ray.config.keys import (
    EXTENDS,
    all_keys,
    dotted,
    fields_at,
    kind_at,
    names_of,
    without_numbers,
)
from orpo_ray.config.near import near_name
from orpo_ray.config.plain_yaml import Key


@dataclass(frozen=True)
class Hint:
    """What to write instead of an unknown key, as a message and in short."""

    message: str
    short: str = ""
    """Our key, or why there is none; "" if nothing is known about the key."""


def hint(model: type[BaseModel], key: Key, tree: Mapping[str, Any]) -> Hint:
    """Our key with that meaning, the key that was misspelt, or the keys that may stand there."""
    section, wrong = key[:-1], key[-1]
    known = _known(model, section, tree)
    kind = kind_at(model, "objective", tree.get("objective"))
    word = _foreign(model, key, kind)
    if word is not None:
        return _in_our_words(word, section, kind, known)
    if wrong in fields_at(model, section):
        return Hint(f"{kind} has no {wrong}; remove it", f"{kind} has none")
    near = near_name(str(wrong), known)
    if near is not None:
        return _did_you_mean(dotted((*section, near)))
    elsewhere = [name for name in all_keys(model, tree) if name.split(".")[-1] == str(wrong)]
    if elsewhere:
        return _did_you_mean(" or ".join(elsewhere))
    return Hint(f"unknown key; known here: {', '.join(sorted(known))}" if known else "unknown key")


def _known(model: type[BaseModel], section: Key, tree: Mapping[str, Any]) -> list[str]:
    """Names that may stand in a section of a file."""
    of_the_file = [EXTENDS] if not section and _is_run(model) else []
    return sorted([*fields_at(model, section, tree), *of_the_file])


def _is_run(model: type[BaseModel]) -> bool:
    return "objective" in names_of(model)


def _did_you_mean(ours: str) -> Hint:
    return Hint(f"unknown key; did you mean {ours}?", f"here {ours}")


def _foreign(model: type[BaseModel], key: Key, kind: str) -> Word | None:
    """The key as a name of another project. Only a run's config has such names."""
    if not _is_run(model):
        return None
    return word_of(dotted(without_numbers(key[:-1])), str(key[-1]), kind)


def _in_our_words(
    word: Word, section: Sequence[str | int], kind: str, known: Sequence[str]
) -> Hint:
    """What the key of another project is here.

    If the key stands in a list item, our key names the same item.
    """
    if not word.here:
        return Hint(f"unknown key; {word.differs}; remove it", "remove it")
    if word.kind not in ("", kind):
        none = f"{kind} has none"
        return Hint(f"unknown key; {none}; with kind: {word.kind} it is {word.here}", none)
    before, _, last = word.here.rpartition(".")
    in_same_section = before == dotted(without_numbers(section)) and last in known
    here = dotted((*section, last)) if in_same_section else word.here
    differs = f"; {word.differs}" if word.differs else ""
    return Hint(f"unknown key; here it is {here}{differs}", f"here {here}")
