"""What lies beside exported weights: end tokens, templates, pages for servers."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from support import BASE
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from orpo_ray.data.endings import Endings, end_ids, end_texts
from orpo_ray.errors import ConfigError, DataError
from orpo_ray.models.finishing import (
    rendered,
    write_generation_config,
    write_model_config,
    write_tokenizer,
)
from orpo_ray.models.ollama import GO_TEMPLATES, family_of, modelfile
from orpo_ray.models.serve_page import Served, serve_page
from orpo_ray.models.templates import TEMPLATES
from orpo_ray.models.vllm import max_rank, refuse_unservable

ENDS = {
    "plain": "<|im_end|>",
    "chatml": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "mistral": "<|im_end|>",
    "gemma": "<end_of_turn>",
    "qwen3": "<|im_end|>",
    "phi3": "<|end|>",
}
"""With the demo's tokenizer, whose `eos_token` is <|im_end|>."""


def tokenizer_with(name: str) -> Any:
    """The demo's tokenizer with a template, whose marks are tokens of it."""
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    template = TEMPLATES[name]
    marks = [mark for mark in template.marks if mark not in tokenizer.get_vocab()]
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    tokenizer.chat_template = template.text
    return tokenizer


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_token_that_ends_an_answer_is_where_programs_look(name: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_with(name)
    ends, own = end_ids(tokenizer, None), Endings(tokenizer).own
    assert own == ENDS[name]
    write_model_config(tmp_path, BASE, ends, torch.bfloat16)
    write_generation_config(tmp_path, BASE, tokenizer, ends)
    write_tokenizer(tmp_path, tokenizer, own)
    generation = GenerationConfig.from_pretrained(tmp_path)
    listed = generation.eos_token_id
    assert (listed if isinstance(listed, list) else [listed]) == ends
    assert tokenizer.convert_tokens_to_ids(own) in ends
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert config["eos_token_id"] == listed and config["dtype"] == "bfloat16"
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert rendered(again) == rendered(tokenizer)
    # Plain and Mistral write `eos_token` themselves, and it is the end of an answer already.
    assert again.eos_token == own
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    file = (tmp_path / "chat_template.jinja").read_text(encoding="utf-8")
    assert settings["chat_template"] == file == tokenizer.chat_template


@pytest.mark.parametrize("name", TEMPLATES)
def test_plain_transformers_stop_at_the_end_of_an_answer(name: str, tmp_path: Path) -> None:
    """The model says nothing but the token that the template writes after an answer."""
    tokenizer = tokenizer_with(name)
    end = tokenizer.convert_tokens_to_ids(Endings(tokenizer).own)
    model = saying(end, len(tokenizer))
    model.generation_config.eos_token_id = None
    model.save_pretrained(tmp_path)
    write_generation_config(tmp_path, tmp_path, tokenizer, end_ids(tokenizer, None))
    write_tokenizer(tmp_path, tokenizer, Endings(tokenizer).own)
    again = AutoTokenizer.from_pretrained(tmp_path)
    asked = again.apply_chat_template(
        [{"role": "user", "content": "Who?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    out = plain.generate(**asked, max_new_tokens=8, do_sample=False)
    assert out[0, asked["input_ids"].shape[1] :].tolist() == [end]


def saying(token: int, vocabulary: int) -> Any:
    """A model that says one token, whatever it reads: all hidden states are the same."""
    config = AutoConfig.for_model(
        "llama",
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        vocab_size=vocabulary,
        tie_word_embeddings=False,
    )
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.fill_(0.0 if "proj" in name or "head" in name else 1.0)
        model.lm_head.weight[token] = 1.0
    return model


def test_an_end_without_a_token_and_one_that_is_no_special_token_become_no_odd_stops() -> None:
    tokenizer = tokenizer_with("chatml")
    newline = tokenizer.encode("\n", add_special_tokens=False)[0]
    texts = end_texts(tokenizer, [newline, len(tokenizer) + 5])
    assert texts == ["\n"]
    assert 'PARAMETER stop "\\n"\n' in modelfile(tokenizer, texts, "<|im_end|>")


def test_a_template_that_writes_eos_token_otherwise_keeps_it(tmp_path: Path) -> None:
    """It begins each prompt with the token, which the end of a turn must not replace."""
    tokenizer = tokenizer_with("llama3")
    tokenizer.chat_template = "{{ eos_token }}" + tokenizer.chat_template
    write_tokenizer(tmp_path, tokenizer, "<|eot_id|>")
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.eos_token == tokenizer.eos_token
    assert rendered(again) == rendered(tokenizer)


def test_a_template_whose_answers_do_not_end_is_refused() -> None:
    tokenizer = tokenizer_with("chatml")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}"
    )
    with pytest.raises(DataError, match="ends an answer with no end token"):
        Endings(tokenizer)


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_modelfile_has_the_template_of_the_family_and_every_stop(name: str) -> None:
    tokenizer = tokenizer_with(name)
    own = Endings(tokenizer).own
    assert family_of(tokenizer, own) == name
    text = modelfile(tokenizer, (own, "<|im_end|>"), own)
    assert text.startswith("FROM .\nTEMPLATE ")
    assert GO_TEMPLATES[name].replace("END", own) in text
    assert f'PARAMETER stop "{own}"\nPARAMETER stop "<|im_end|>"\n' in text


def test_a_template_of_no_known_family_is_left_to_the_user() -> None:
    tokenizer = tokenizer_with("chatml")
    tokenizer.chat_template = "{{ messages[0]['content'] }}<|im_end|>"
    text = modelfile(tokenizer, ("<|im_end|>",), "<|im_end|>")
    assert 'TEMPLATE """' not in text and "Write TEMPLATE yourself" in text


def test_a_template_from_the_hub_with_other_words_is_known() -> None:
    tokenizer = tokenizer_with("chatml")
    tokenizer.chat_template = (
        "{%- for m in messages -%}{{- '<|im_start|>' ~ m.role ~ '\\n' ~ m.content | trim }}"
        "{{- '<|im_end|>\\n' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"
    )
    assert family_of(tokenizer, "<|im_end|>") == "chatml"


@pytest.mark.skipif(shutil.which("go") is None, reason="needs Go, whose template engine it asks")
@pytest.mark.parametrize("name", TEMPLATES)
def test_go_writes_what_the_chat_template_writes(name: str, go_render: Path) -> None:
    tokenizer = tokenizer_with(name)
    own = Endings(tokenizer).own
    asked = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "Me."},
        {"role": "user", "content": "Why?"},
    ]
    for messages in (asked[1:2], asked[1:], asked):
        request = {"Template": GO_TEMPLATES[name].replace("END", own), "Messages": messages}
        done = subprocess.run(
            [go_render], input=json.dumps(request), capture_output=True, text=True, check=True
        )
        expected = str(
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        )
        assert done.stdout == expected.removeprefix(str(tokenizer.bos_token or ""))


_GO = """\
package main

import (
    "encoding/json"
    "os"
    "text/template"
)

type request struct {
    Template string
    Messages []struct{ Role, Content string }
}

func main() {
    var asked request
    if err := json.NewDecoder(os.Stdin).Decode(&asked); err != nil {
        panic(err)
    }
    parsed := template.Must(template.New("").Parse(asked.Template))
    if err := parsed.Execute(os.Stdout, map[string]any{"Messages": asked.Messages}); err != nil {
        panic(err)
    }
}
"""


@pytest.fixture(scope="module")
def go_render(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program that renders a template in Go's syntax."""
    folder = tmp_path_factory.mktemp("go")
    (folder / "main.go").write_text(_GO, encoding="utf-8")
    subprocess.run(["go", "build", "-o", "render", "main.go"], cwd=folder, check=True)
    return folder / "render"


def test_vllm_takes_the_next_rank_that_it_knows() -> None:
    assert [max_rank(rank) for rank in (1, 4, 16, 24, 64, 400)] == [1, 8, 16, 32, 64, 512]
    with pytest.raises(ConfigError, match="adapters up to rank 512, and this one has 513"):
        max_rank(513)


@pytest.mark.parametrize(
    ("settings", "tensors", "reason"),
    [
        ({"use_dora": True}, [], "it is a DoRA adapter"),
        ({"target_parameters": ["experts.gate_up_proj"]}, [], "it adapts the weights of experts"),
        ({"modules_to_save": ["lm_head"]}, [], r"it holds whole layers \(modules_to_save\)"),
        ({}, ["base_model.model.lm_head.lora_A.weight"], "it adapts embeddings or the head"),
        ({}, ["base_model.model.wte.lora_embedding_A"], "it adapts embeddings or the head"),
        ({"rank_pattern": {"q_proj": 4}}, [], "its layers have ranks of their own"),
        ({"alpha_pattern": {"q_proj": 4}}, [], "its layers have an alpha of their own"),
        ({"bias": "all"}, [], "it has biases"),
    ],
)
def test_an_adapter_that_vllm_does_not_load_is_refused(
    settings: dict[str, Any], tensors: list[str], reason: str
) -> None:
    refuse_unservable({"r": 8}, ["base_model.model.layers.0.self_attn.q_proj.lora_A.weight"])
    with pytest.raises(ConfigError, match=f"because {reason}"):
        refuse_unservable({"r": 8, **settings}, tensors)


def test_the_page_for_servers_has_this_models_commands() -> None:
    whole = {"name": "mine", "stops": ("</s>",), "dtype": "bfloat16", "positions": 4096}
    page = serve_page(Served(**whole))
    assert "vllm serve . --served-model-name mine --dtype bfloat16 --max-model-len 4096" in page
    assert "python convert_hf_to_gguf.py . --outfile mine-bf16.gguf --outtype bf16" in page
    assert '"model_id": "mine"' in page and "ollama create mine -f Modelfile" in page
    served = Served(**whole, base="owner/name", revision="abc", rank=32)
    assert "vllm serve owner/name --revision abc" in serve_page(served)
    assert "--enable-lora --max-lora-rank 32" in serve_page(served)
