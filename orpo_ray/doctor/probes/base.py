"""The tokenizer of a base: whether it loads, and with which template and end token."""

import os
import tempfile
from pathlib import Path

from orpo_ray.config.model import ModelConfig
from orpo_ray.config.storage import is_gguf, is_url
from orpo_ray.doctor.facts import Asked, Base, Hub
from orpo_ray.doctor.probes.hub import is_of_hub
from orpo_ray.errors import OrpoRayError


def look(asked: Asked, hub: Hub | None) -> Base | None:
    """Load the tokenizer as a run does; None if no base is named.

    What is not in the hub's cache goes to a temporary one, so that nothing stays.
    """
    model = asked.model
    if model is None:
        return None
    if skipped := _why_not(model):
        return Base(name=model.base, skipped=skipped)
    if is_of_hub(model):
        if hub is not None and hub.has_base:
            os.environ["HF_HUB_OFFLINE"] = "1"
        elif hub is not None and hub.has_base is False and hub.seconds is None:
            return Base(name=model.base, skipped="it is not in the cache, and no hub answers")
        else:
            os.environ["HF_HUB_CACHE"] = tempfile.mkdtemp(prefix="orpo-ray-")
    return _load(model)


def _why_not(model: ModelConfig) -> str:
    if is_gguf(model.base) and Path(model.base).expanduser().exists():
        return "a run converts this GGUF file first"
    return "a run fetches it from the bucket first" if is_url(model.base) else ""


def _load(model: ModelConfig) -> Base:
    from orpo_ray.data.endings import Endings
    from orpo_ray.models.templates import TEMPLATES, template_name
    from orpo_ray.models.tokenizer import load_tokenizer

    said: list[str] = []
    try:
        tokenizer = load_tokenizer(model, said.append)
        endings = Endings(tokenizer)
    except OrpoRayError as error:
        return Base(name=model.base, problem=str(error))
    text = str(tokenizer.chat_template)
    return Base(
        name=model.base,
        template=template_name(model.chat_template, text),
        has_own_template=model.chat_template is None and text != TEMPLATES["plain"].text,
        end=endings.own,
        said=tuple(said),
    )
