"""Chat templates by name, for a base without one and for a base that is to learn another one.

Each writes the turn markers that one family of models has published. The text from which
generation starts is always the beginning of the whole conversation. An answer loses the white space
around it, as in those families.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from orpo_ray.config.storage import expanded
from orpo_ray.errors import ConfigError


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template, and its marks: single tokens only in the tokenizers of its family.

    `end` is the mark that ends a turn. Without one, answers end with the tokenizer's `eos_token`.
    """

    text: str
    marks: tuple[str, ...] = ()
    end: str | None = None

    def ending_with(self, token: str) -> str:
        """The template's text with another token in place of the mark that ends a turn."""
        return self.text if self.end is None else self.text.replace(self.end, token)


def _each(turn: str, start: str = "", end: str = "") -> str:
    return start + "{% for message in messages %}" + turn + "{% endfor %}" + end


_BOS = "{{ bos_token or '' }}"
_TRIMMED = "message['content'] | trim"
_GENERATE = "{% if add_generation_prompt %}{{ 'START' }}{% endif %}"

# No space after "Assistant:": byte-level tokenizers keep a leading space with the word that
# follows.
_PLAIN = _each(
    "{% if message['role'] == 'system' %}{{ message['content'] }}"
    "{% elif message['role'] == 'user' %}{{ 'Human: ' + message['content'] }}"
    "{% else %}{{ 'Assistant: ' + message['content'] | trim + eos_token }}{% endif %}"
    "{% if not loop.last %}{{ '\\n\\n' }}{% endif %}",
    start=_BOS,
    end=_GENERATE.replace("START", "\\n\\nAssistant:"),
)

_CHATML_TURN = "{{ '<|im_start|>' + message['role'] + '\\n' + " + _TRIMMED + " + '<|im_end|>\\n' }}"
_CHATML = _each(_CHATML_TURN, end=_GENERATE.replace("START", "<|im_start|>assistant\\n"))

# Without thinking, as Qwen3 renders it with enable_thinking=False: the last answer comes after
# empty thoughts.
_NO_THOUGHTS = "<think>\\n\\n</think>\\n\\n"
_QWEN3 = _each(
    "{% if message['role'] == 'assistant' and loop.last %}"
    f"{{{{ '<|im_start|>assistant\\n{_NO_THOUGHTS}' + {_TRIMMED} + '<|im_end|>\\n' }}}}"
    "{% else %}" + _CHATML_TURN + "{% endif %}",
    end=_GENERATE.replace("START", f"<|im_start|>assistant\\n{_NO_THOUGHTS}"),
)

_LLAMA3 = _each(
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + "
    + _TRIMMED
    + " + '<|eot_id|>' }}",
    start=_BOS,
    end=_GENERATE.replace("START", "<|start_header_id|>assistant<|end_header_id|>\\n\\n"),
)

_PHI3 = _each(
    "{{ '<|' + message['role'] + '|>\\n' + " + _TRIMMED + " + '<|end|>\\n' }}",
    end=_GENERATE.replace("START", "<|assistant|>\\n"),
)

# These two families have no system turn. Its text goes before the first question.
_SYSTEM_FIRST = (
    "{% set system = messages[0]['content'] | trim + '\\n\\n' "
    "if messages[0]['role'] == 'system' else '' %}"
    "{% set turns = messages[1:] if system else messages %}"
)
_BEFORE_FIRST = "(system if loop.first else '') + "

_GEMMA = (
    _BOS
    + _SYSTEM_FIRST
    + "{% for message in turns %}"
    + "{% set role = 'model' if message['role'] == 'assistant' else 'user' %}"
    + f"{{{{ '<start_of_turn>' + role + '\\n' + {_BEFORE_FIRST}{_TRIMMED} + '<end_of_turn>\\n' }}}}"
    + "{% endfor %}"
    + _GENERATE.replace("START", "<start_of_turn>model\\n")
)

_MISTRAL = (
    _BOS
    + _SYSTEM_FIRST
    + "{% for message in turns %}"
    + "{% if message['role'] == 'assistant' %}{{ ' ' + "
    + _TRIMMED
    + " + eos_token }}"
    + f"{{% else %}}{{{{ '[INST] ' + {_BEFORE_FIRST}{_TRIMMED} + '[/INST]' }}}}{{% endif %}}"
    + "{% endfor %}"
)

TEMPLATES = {
    "plain": ChatTemplate(_PLAIN),
    "chatml": ChatTemplate(_CHATML, ("<|im_start|>", "<|im_end|>"), "<|im_end|>"),
    "llama3": ChatTemplate(
        _LLAMA3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "<|eot_id|>"
    ),
    "gemma": ChatTemplate(_GEMMA, ("<start_of_turn>", "<end_of_turn>"), "<end_of_turn>"),
    "mistral": ChatTemplate(_MISTRAL, ("[INST]", "[/INST]")),
    "qwen3": ChatTemplate(
        _QWEN3, ("<|im_start|>", "<|im_end|>", "<think>", "</think>"), "<|im_end|>"
    ),
    "phi3": ChatTemplate(_PHI3, ("<|user|>", "<|assistant|>", "<|end|>"), "<|end|>"),
}
"""The names that `model.chat_template` takes in place of a file."""


def template_text(wanted: str) -> str:
    """The template that `model.chat_template` names: one of `TEMPLATES`, or a file.

    It loads no tokenizer, so that a wrong name is refused at once. Raises ConfigError.
    """
    if wanted in TEMPLATES:
        return TEMPLATES[wanted].text
    path = expanded(wanted, "model.chat_template")
    if not path.exists() and path.name == wanted and not path.suffix:
        raise ConfigError(
            f"model.chat_template: there is no template {wanted} and no file of that name; "
            f"name one of {', '.join(TEMPLATES)}, or a Jinja file"
        )
    return _read_template(path)


def template_name(wanted: str | None, text: str) -> str:
    """How a user may call the chat template of a run: its name, its file, or the base's own.

    `wanted` is `model.chat_template`; `text` is the template's.
    """
    named = (name for name, template in TEMPLATES.items() if template.text == text)
    return wanted or next(named, "the base's own")


def _read_template(path: Path) -> str:
    import jinja2

    try:
        text = path.read_text(encoding="utf-8")
        jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(
            _without_generation_marks(text)
        )
    except (OSError, UnicodeDecodeError, jinja2.TemplateSyntaxError) as error:
        raise ConfigError(
            f"model.chat_template: {path} cannot be read as a Jinja file: {error}"
        ) from error
    if not text.strip():
        raise ConfigError(f"model.chat_template: {path} is empty")
    return text


def _without_generation_marks(template: str) -> str:
    """The template without `{% generation %}`, which only transformers' own Jinja knows."""
    return re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template)
