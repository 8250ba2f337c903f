"""Writes conversations by a chat template. Most are plain, and many come in a row.

`apply_chat_template` prepares template and messages again in each call, which takes longer than the
writing. Of a plain conversation it changes nothing, so that this work is left out.
"""

from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any

from jinja2 import Template
from transformers.utils.chat_template_utils import _compile_jinja_template

from orpo_ray.data.pairs import Context, Message

_PLAIN = {"role", "content"}


class ChatTemplate:
    """The chat template of a tokenizer, or another one that replaces it."""

    def __init__(self, tokenizer: Any, replacement: str | None = None) -> None:
        self._tokenizer = tokenizer
        self._replacement = replacement
        self._source = replacement
        with suppress(ValueError):  # of several named ones, none is the usual one
            self._source = replacement or tokenizer.get_chat_template()
        self._special = dict(tokenizer.special_tokens_map)

    def write(self, messages: Sequence[Message], context: Context, generation: bool) -> str:
        """The text of a conversation, maybe with what starts generation.

        Raises what the template raises: it is a program of the user.
        """
        is_plain = not context and all(message.keys() == _PLAIN for message in messages)
        if not is_plain or self._source is None:
            return str(
                self._tokenizer.apply_chat_template(
                    messages,
                    chat_template=self._replacement,
                    tokenize=False,
                    add_generation_prompt=generation,
                    **context,
                )
            )
        template, known = _compiled(self._source)
        values = known | self._special | {"messages": messages, "tools": None, "documents": None}
        values["add_generation_prompt"] = generation
        # Jinja would put its global values and ours together again for each text.
        return "".join(template.root_render_func(template.new_context(values, shared=True)))


@lru_cache(maxsize=8)
def _compiled(source: str) -> tuple[Template, dict[str, Any]]:
    """The template as transformers compiles it, and the functions that it may call."""
    template: Template = _compile_jinja_template(source)
    return template, dict(template.globals)
