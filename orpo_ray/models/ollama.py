"""The Modelfile with which Ollama serves an exported model.

Ollama reads templates in Go's syntax. Those here write what the chat templates of the same names
write; the start token is left out, because Ollama's engine adds it.
"""

import json
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from orpo_ray.models.finishing import rendered
from orpo_ray.models.templates import TEMPLATES

_TURNS = "{{- range .Messages }}"
_IS_ASSISTANT = '{{- if eq .Role "assistant" }}'
_SYSTEM_FIRST = '{{- $system := "" }}{{- range .Messages }}{{- if eq .Role "system" }}'
_KEEP_SYSTEM = '{{- $system = printf "%s\\n\\n" .Content }}'
_FORGET_SYSTEM = '{{ $system = "" }}'
_CHATML_TURN = "<|im_start|>{{ .Role }}\n{{ .Content }}END\n"

GO_TEMPLATES = {
    "plain": (
        "{{- range $number, $turn := .Messages }}{{ if $number }}\n\n{{ end }}"
        '{{- if eq .Role "system" }}{{ .Content }}'
        '{{- else if eq .Role "user" }}Human: {{ .Content }}'
        "{{- else }}Assistant: {{ .Content }}END{{ end }}{{- end }}\n\nAssistant:"
    ),
    "chatml": f"{_TURNS}{_CHATML_TURN}{{{{ end }}}}<|im_start|>assistant\n",
    "qwen3": (f"{_TURNS}{_CHATML_TURN}{{{{ end }}}}<|im_start|>assistant\n<think>\n\n</think>\n\n"),
    "llama3": (
        f"{_TURNS}<|start_header_id|>{{{{ .Role }}}}<|end_header_id|>\n\n{{{{ .Content }}}}END"
        "{{- end }}<|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "phi3": f"{_TURNS}<|{{{{ .Role }}}}|>\n{{{{ .Content }}}}END\n{{{{ end }}}}<|assistant|>\n",
    "gemma": (
        f"{_SYSTEM_FIRST}{_KEEP_SYSTEM}{{{{- else }}}}"
        '<start_of_turn>{{ if eq .Role "assistant" }}model{{ else }}user{{ end }}\n'
        f"{{{{ $system }}}}{{{{ .Content }}}}END\n{_FORGET_SYSTEM}"
        "{{ end }}{{- end }}<start_of_turn>model\n"
    ),
    "mistral": (
        f'{_SYSTEM_FIRST}{_KEEP_SYSTEM}{{{{- else if eq .Role "assistant" }}}} '
        f"{{{{ .Content }}}}END{{{{- else }}}}[INST] {{{{ $system }}}}{{{{ .Content }}}}[/INST]"
        f"{_FORGET_SYSTEM}{{{{- end }}}}{{{{- end }}}}"
    ),
}
"""By the name of the chat template. END stands for the token that ends an answer."""


def modelfile(tokenizer: PreTrainedTokenizerBase, stops: Sequence[str], end: str) -> str:
    """The text of a Modelfile that lies beside the weights.

    Generation stops at each of `stops`. The template writes `end` after an answer.
    """
    lines = ["FROM ."]
    family = family_of(tokenizer, end)
    if family is None:
        lines.append(
            "# This chat template is of no family that is known here, so none is written in Go's "
            "syntax.\n# Write TEMPLATE yourself: chat_template.jinja has what the model learned."
        )
    else:
        text = GO_TEMPLATES[family].replace("END", end)
        lines.append(f'TEMPLATE """{text}"""')
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops]
    return "\n".join(lines) + "\n"


def family_of(tokenizer: PreTrainedTokenizerBase, end: str) -> str | None:
    """The name of the chat template that writes what the tokenizer's own does; None if none does.

    A template from the hub often writes the same with other words.
    """
    own = rendered(tokenizer)
    for name, template in TEMPLATES.items():
        if rendered(tokenizer, template.ending_with(end)) == own:
            return name
    return None
