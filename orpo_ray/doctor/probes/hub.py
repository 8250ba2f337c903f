"""Whether the Hugging Face hub answers, and what of it is in the local cache."""

import os
import time
import urllib.error
import urllib.request
from pathlib import Path

from orpo_ray.config.model import ModelConfig
from orpo_ray.config.storage import is_gguf, is_url
from orpo_ray.doctor.facts import Asked, Hub

_ANSWER_S = 5.0


def look(asked: Asked) -> Hub:
    """Ask the hub for its front page, unless the environment forbids it."""
    from huggingface_hub import constants, get_token, try_to_load_from_cache

    has_base = None
    if asked.model is not None and is_of_hub(asked.model):
        kept = try_to_load_from_cache(
            asked.model.base, "config.json", revision=asked.model.revision
        )
        has_base = isinstance(kept, str | os.PathLike)
    seconds, problem = (None, "") if constants.HF_HUB_OFFLINE else _ask(constants.ENDPOINT)
    return Hub(
        endpoint=constants.ENDPOINT,
        offline=constants.HF_HUB_OFFLINE,
        seconds=seconds,
        problem=problem,
        has_token=get_token() is not None,
        has_base=has_base,
    )


def is_of_hub(model: ModelConfig) -> bool:
    """Whether a base is named by its hub name, and no folder here has that name."""
    is_path = model.base.startswith((".", "/", "~")) or Path(model.base).exists()
    return not is_url(model.base) and not is_gguf(model.base) and not is_path


def _ask(endpoint: str) -> tuple[float | None, str]:
    """How long the hub takes to answer, or what is in the way."""
    began = time.monotonic()
    request = urllib.request.Request(endpoint, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=_ANSWER_S).close()
    except urllib.error.HTTPError:
        pass  # a refusal is an answer, too
    except (OSError, ValueError) as error:
        return None, str(getattr(error, "reason", None) or error)
    return time.monotonic() - began, ""
