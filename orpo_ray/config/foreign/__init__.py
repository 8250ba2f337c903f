"""Configs of TRL, LLaMA-Factory and Axolotl in our words. Pure: plain data in, plain data out."""

from collections.abc import Callable, Mapping
from typing import Any

from orpo_ray.config.foreign.axolotl import read_axolotl
from orpo_ray.config.foreign.draft import Draft
from orpo_ray.config.foreign.llamafactory import read_llamafactory
from orpo_ray.config.foreign.recognise import AXOLOTL, LLAMA_FACTORY, TRL, project_of
from orpo_ray.config.foreign.trl import read_trl

Reader = Callable[[Mapping[str, Any], str], Draft]
_READERS: dict[str, Reader] = {
    TRL: read_trl,
    LLAMA_FACTORY: read_llamafactory,
    AXOLOTL: read_axolotl,
}


def read_foreign(foreign: Mapping[str, Any], stem: str) -> Draft | None:
    """Translate a config, with a word on every key; None if it is of none of these projects.

    `stem` is the name of its file. Raises ConfigError for a method that orpo_ray does not have, and
    for a value that must be a number and is not.
    """
    project = project_of(foreign)
    if project is None:
        return None
    draft = _READERS[project](foreign, stem)
    draft.finish()
    return draft


__all__ = ["Draft", "read_foreign"]
