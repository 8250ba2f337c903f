"""Memory between one model and the next."""

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

from orpo_ray.errors import ResourceError

_Found = TypeVar("_Found")


def freed(work: Callable[..., _Found], *arguments: object) -> _Found:
    """What a function returns. The memory of the model that it loaded is free afterwards."""
    try:
        return work(*arguments)
    except torch.OutOfMemoryError as error:
        raise ResourceError(
            "no room in memory to compare the models; close what else uses the GPU"
        ) from error
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
