"""Whether the Hugging Face hub answers, and what of it is in the local cache."""

import http.client
import os
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from orpo_ray.config.model import ModelConfig
from orpo_ray.config.storage import is_gguf, is_url
from orpo_ray.doctor.facts import Asked, Hub
from orpo_ray.doctor.urls import is_web_url
from orpo_ray.errors import on_one_line

_ENDPOINT = "HF_ENDPOINT"
_ANSWER_S = 5.0
_TOTAL_S = 8.0
"""With the search for the hub's address, which has no limit of its own."""


def look(asked: Asked) -> Hub:
    """Ask the hub for its front page, unless the environment forbids it."""
    try:
        from huggingface_hub import constants, get_token, try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError
    except ValueError as error:  # it reads the port of a URL when it is imported
        endpoint = os.environ.get(_ENDPOINT, "")
        return Hub(endpoint=endpoint, offline=False, problem=on_one_line(error))
    has_base = None
    if asked.model is not None and is_of_hub(asked.model):
        with suppress(HFValidationError):  # the probe of the base says that it is no name
            kept = try_to_load_from_cache(
                asked.model.base, "config.json", revision=asked.model.revision
            )
            has_base = isinstance(kept, str | os.PathLike)
    seconds, problem = (None, "") if constants.HF_HUB_OFFLINE else ask(constants.ENDPOINT)
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


def ask(endpoint: str, total_s: float = _TOTAL_S) -> tuple[float | None, str]:
    """How long the hub takes to answer, or what is in the way."""
    if not is_web_url(endpoint):
        return None, "it is no URL"
    # The thread of a search that hangs ends with this process, which is a probe's own.
    try:
        return ThreadPoolExecutor(1).submit(_head, endpoint).result(total_s)
    except TimeoutError:
        return None, f"its address is not found within {total_s:.3g} s"


def _head(endpoint: str) -> tuple[float | None, str]:
    began = time.monotonic()
    try:
        request = urllib.request.Request(endpoint, method="HEAD")
        urllib.request.urlopen(request, timeout=_ANSWER_S).close()
    except urllib.error.HTTPError:
        pass  # a refusal is an answer, too
    except (OSError, ValueError, http.client.HTTPException) as error:
        return None, str(getattr(error, "reason", None) or error)
    return time.monotonic() - began, ""
