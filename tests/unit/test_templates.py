"""The named chat templates against the turn markers that each family publishes."""

from pathlib import Path
from typing import Any

import pytest
from jinja2 import Environment
from text_pairs import text_pair

from orpo_ray import api
from orpo_ray.config.model import ModelConfig
from orpo_ray.data.pairs import Message
from orpo_ray.data.tokenise import PairTokeniser
from orpo_ray.errors import ConfigError
from orpo_ray.models.templates import TEMPLATES
from orpo_ray.models.tokenizer import load_tokenizer
from orpo_ray.runs.console import SILENT
from tests.support import BASE, run_config

SYSTEM: Message = {"role": "system", "content": "Be short."}
ASKED: list[Message] = [{"role": "user", "content": "Two?"}]
EARLIER: list[Message] = [
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": " 1 "},
]

# From the model cards and tokenizer_config.json of each family.
PROMPTS = {
    "plain": "Be short.\n\nHuman: One?\n\nAssistant: 1</s>\n\nHuman: Two?\n\nAssistant:",
    "chatml": "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nOne?<|im_end|>\n"
    "<|im_start|>assistant\n1<|im_end|>\n<|im_start|>user\nTwo?<|im_end|>\n"
    "<|im_start|>assistant\n",
    "llama3": "<|start_header_id|>system<|end_header_id|>\n\nBe short.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nOne?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n1<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nTwo?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "gemma": "<start_of_turn>user\nBe short.\n\nOne?<end_of_turn>\n"
    "<start_of_turn>model\n1<end_of_turn>\n"
    "<start_of_turn>user\nTwo?<end_of_turn>\n<start_of_turn>model\n",
    "mistral": "[INST] Be short.\n\nOne?[/INST] 1</s>[INST] Two?[/INST]",
    "qwen3": "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nOne?<|im_end|>\n"
    "<|im_start|>assistant\n1<|im_end|>\n<|im_start|>user\nTwo?<|im_end|>\n"
    "<|im_start|>assistant\n<think>\n\n</think>\n\n",
    "phi3": "<|system|>\nBe short.<|end|>\n<|user|>\nOne?<|end|>\n<|assistant|>\n1<|end|>\n"
    "<|user|>\nTwo?<|end|>\n<|assistant|>\n",
}
ENDS = {
    "plain": " Good.</s>",
    "chatml": "Good.<|im_end|>\n",
    "llama3": "Good.<|eot_id|>",
    "gemma": "Good.<end_of_turn>\n",
    "mistral": " Good.</s>",
    "qwen3": "Good.<|im_end|>\n",
    "phi3": "Good.<|end|>\n",
}
STARTS_WITH_BOS = ("plain", "llama3", "gemma", "mistral")


def render(name: str, messages: list[Message], generation: bool) -> str:
    template = Environment().from_string(TEMPLATES[name].text)
    return template.render(
        messages=messages, bos_token="<s>", eos_token="</s>", add_generation_prompt=generation
    )


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_named_template_writes_what_its_family_reads(name: str) -> None:
    start = "<s>" if name in STARTS_WITH_BOS else ""
    prompt = render(name, [SYSTEM, *EARLIER, *ASKED], generation=True)
    assert prompt == start + PROMPTS[name]
    answered = [SYSTEM, *EARLIER, *ASKED, {"role": "assistant", "content": "Good."}]
    assert render(name, answered, generation=False) == prompt + ENDS[name]


@pytest.mark.parametrize("name", TEMPLATES)
def test_pairs_are_tokenised_under_each_name(name: str) -> None:
    said: list[str] = []
    tokenizer = load_tokenizer(ModelConfig(base=str(BASE), chat_template=name), said.append)
    (pair,) = PairTokeniser(tokenizer).pairs([text_pair(ASKED, "good", "bad")], ["x:1"])
    text = tokenizer.decode(pair.chosen)
    assert "good" in text and text.endswith(tokenizer.eos_token)
    marks = [mark for mark in TEMPLATES[name].marks if mark not in tokenizer.get_vocab()]
    assert len(said) == bool(marks) and all(mark in said[0] for mark in marks)


def refused(template: str) -> Any:
    with pytest.raises(ConfigError) as error:
        load_tokenizer(ModelConfig(base=str(BASE), chat_template=template), SILENT.announce)
    return str(error.value)


def test_a_name_that_is_none_lists_the_names() -> None:
    message = refused("vicuna")
    assert message.startswith("model.chat_template: there is no template vicuna and no file")
    assert all(name in message for name in TEMPLATES)
    assert "mine.jinja cannot be read as a Jinja file" in refused("mine.jinja")


@pytest.mark.parametrize("text", ["", " \n"])
def test_an_empty_file_is_no_template(tmp_path: Path, text: str) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text(text)
    assert refused(str(file)) == f"model.chat_template: {file} is empty"


def test_a_wrong_template_is_refused_before_a_base_is_looked_at(tmp_path: Path) -> None:
    settings = run_config(tmp_path, model={"base": "./none", "chat_template": "vicuna"})
    stages = ({"model": {"chat_template": "vicuna"}},)
    staged = run_config(tmp_path).model_copy(update={"stages": stages})
    for config in (settings, staged):
        for command in (api.train, api.plan):
            with pytest.raises(ConfigError, match="there is no template vicuna"):
                command(config, SILENT)
    assert list(tmp_path.iterdir()) == []
