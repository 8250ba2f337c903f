"""What a user can ask of `generate`, checked before anything is loaded."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from orpo_ray.errors import ConfigError
from orpo_ray.evaluation.answer_formats import FORMATS, OF_ONE_MODEL
from orpo_ray.evaluation.answers_file import refuse_unwritable

BASE, TRAINED = "base", "trained"
_MODELS = {TRAINED: (TRAINED,), BASE: (BASE,), "both": (BASE, TRAINED)}


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How each next token is chosen.

    With a temperature of 0 it is the likeliest one. Else it is drawn from the likeliest ones, which
    together have a probability of `top_p`. Raises ConfigError for numbers out of range.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens: must be 1 or more, not {self.max_new_tokens}")
        if not self.temperature >= 0 or self.temperature == float("inf"):
            raise ConfigError(f"temperature: must be a number from 0 on, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p: must be above 0 and at most 1, not {self.top_p}")


@dataclass(frozen=True, kw_only=True)
class Order:
    """Which models answer, one after the other, and the file that they fill."""

    out: Path
    format: str
    models: Sequence[str]


def order_of(out: Path, form: str, model: str, batch_tokens: int) -> Order:
    """What is asked for. Raises ConfigError for what there is not."""
    if model not in _MODELS:
        raise ConfigError(f"model: must be {_choice(_MODELS)}, not {model}")
    if form not in FORMATS:
        raise ConfigError(f"format: must be {_choice(FORMATS)}, not {form}")
    if form in OF_ONE_MODEL and len(_MODELS[model]) > 1:
        raise ConfigError(
            f"format: {form} has no place for a second model's answers; write two files, with "
            f"model {BASE} and model {TRAINED}"
        )
    if batch_tokens < 1:
        raise ConfigError(f"batch_tokens: must be 1 or more, not {batch_tokens}")
    refuse_unwritable(out)
    return Order(out=out, format=form, models=_MODELS[model])


def _choice(names: Iterable[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} or {last}"
