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
