"""Memory between one model and the next."""

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

from orpo_ray.errors import ResourceError
from orpo_ray.training.memory import is_out_of_memory

_Found = TypeVar("_Found")


def freed(work: Callable[..., _Found], *arguments: object) -> _Found:
    """What a function returns. The memory of the model that it loaded is free afterwards.

    Raises ResourceError if there is not enough of it.
    """
    try:
        return work(*arguments)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise ResourceError(
            "no room in memory for the model and what it computes; close what else uses it, or "
            "take a larger machine"
        ) from error
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
