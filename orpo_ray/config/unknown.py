"""What to write instead of a key that a config does not have."""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from orpo_ray.config.foreign.words import Word, word_of
from orpo_ray.config.keys import all_keys, dotted, fields_at, kind_at, names_of, without_numbers
from orpo_ray.config.near import near_name
from orpo_ray.config.plain_yaml import Key


def suggestion(model: type[BaseModel], key: Key, tree: Mapping[str, Any]) -> str:
    """Our key with that meaning, the key that was misspelt, or the keys that may stand there."""
    *section, wrong = key
    known, kind = (
        fields_at(model, section, tree),
        kind_at(model, "objective", tree.get("objective")),
    )
    word = _foreign(model, key, kind)
    if word is not None:
        return _in_our_words(word, section, kind, known)
    if wrong in fields_at(model, section):
        return f"{kind} has no {wrong}; remove it"
    near = near_name(str(wrong), known)
    if near is not None:
        return f"unknown key; did you mean {dotted((*section, near))}?"
    elsewhere = [name for name in all_keys(model, tree) if name.split(".")[-1] == str(wrong)]
    if elsewhere:
        return f"unknown key; did you mean {' or '.join(elsewhere)}?"
    return f"unknown key; known here: {', '.join(sorted(known))}" if known else "unknown key"


def counterpart(model: type[BaseModel], key: Key, tree: Mapping[str, Any]) -> str:
    """Our key for one that a config does not have; "" if there is none."""
    *section, wrong = key
    kind = kind_at(model, "objective", tree.get("objective"))
    word = _foreign(model, key, kind)
    if word is not None:
        return word.here if word.kind in ("", kind) else ""
    near = near_name(str(wrong), fields_at(model, section, tree))
    return dotted((*section, near)) if near else ""


def _foreign(model: type[BaseModel], key: Key, kind: str) -> Word | None:
    """The key as a name of another project. Only a run's config has such names."""
    if "objective" not in names_of(model):
        return None
    return word_of(dotted(without_numbers(key[:-1])), str(key[-1]), kind)


def _in_our_words(word: Word, section: Sequence[str | int], kind: str, known: Sequence[str]) -> str:
    """Our key for the key of another project, as a message.

    If the key stands in a list item, our key names the same item.
    """
    if not word.here:
        return f"unknown key; {word.differs}; remove it"
    if word.kind not in ("", kind):
        return f"unknown key; {kind} has none; with kind: {word.kind} it is {word.here}"
    before, _, last = word.here.rpartition(".")
    in_same_section = before == dotted(without_numbers(section)) and last in known
    here = dotted((*section, last)) if in_same_section else word.here
    return f"unknown key; here it is {here}" + (f"; {word.differs}" if word.differs else "")
