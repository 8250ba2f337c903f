"""What lies beside the weights of an exported model, so that every program stops where it should.

Each token that ends an answer stands in generation_config.json and in config.json. The template
lies in a file of its own and in tokenizer_config.json, because some programs read only the one.
"""

import json
import shutil
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from orpo_ray.errors import ConfigError
from orpo_ray.models.tokenizer import padding_id

_CONFIG, _GENERATION, _TOKENIZER = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
)
_PROCESSORS = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)
_PROBES: tuple[list[dict[str, str]], ...] = (
    [{"role": "user", "content": "xAsked"}],
    [
        {"role": "user", "content": "xAsked"},
        {"role": "assistant", "content": "xSaid"},
        {"role": "user", "content": "xAgain"},
    ],
    [{"role": "system", "content": "xSystem"}, {"role": "user", "content": "xAsked"}],
)
"""Conversations that show what a template writes."""


def write_model_config(folder: Path, source: Path, ends: Sequence[int], dtype: torch.dtype) -> None:
    """Write config.json as in the source, but with all end tokens and the number format."""
    named = str(dtype).removeprefix("torch.")
    config = {**_read(source / _CONFIG), "eos_token_id": _one_or_all(ends), "dtype": named}
    config.pop("torch_dtype", None)  # the older name of the same key
    _write(folder / _CONFIG, config)


def write_generation_config(
    folder: Path, source: Path, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int]
) -> None:
    """Write generation_config.json as in the source, if it has one, but with all end tokens."""
    own = _read(source / _GENERATION) if (source / _GENERATION).is_file() else {}
    stops = {"eos_token_id": _one_or_all(ends), "pad_token_id": padding_id(tokenizer)}
    _write(folder / _GENERATION, {**own, **stops})


def _one_or_all(ends: Sequence[int]) -> int | list[int]:
    return list(ends) if len(ends) > 1 else ends[0]


def copy_processors(folder: Path, source: Path) -> None:
    """Copy what a base of text and images needs to be loaded as its config.json says."""
    for name in _PROCESSORS:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def write_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase, end: str) -> None:
    """Write the tokenizer with its template.

    Its `eos_token` becomes `end`, the token that the template writes after an answer, if the
    template then still writes the same: programs that know of one end token read this one.
    """
    written = _ending_with(tokenizer, end)
    written.save_pretrained(str(folder))
    path = folder / _TOKENIZER
    _write(path, {**_read(path), "chat_template": written.chat_template})


def rendered(tokenizer: PreTrainedTokenizerBase, template: str | None = None) -> list[str]:
    """What a template writes for conversations that show all of it; "" for one that it refuses.

    The default is the tokenizer's own template.
    """
    written = []
    for probe in _PROBES:
        try:
            text: Any = tokenizer.apply_chat_template(
                probe, chat_template=template, add_generation_prompt=True, tokenize=False
            )
        except Exception:  # noqa: BLE001 - a template is a program of the user, and may fail in any way
            text = ""
        written.append(str(text))
    return written


def rendered_ids(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The token ids of `rendered`."""
    return [tokenizer.encode(text, add_special_tokens=False) for text in rendered(tokenizer)]


def _ending_with(tokenizer: PreTrainedTokenizerBase, end: str) -> PreTrainedTokenizerBase:
    changed: PreTrainedTokenizerBase = deepcopy(tokenizer)
    changed.eos_token = end
    return changed if rendered(changed) == rendered(tokenizer) else tokenizer


def _read(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    return found


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
