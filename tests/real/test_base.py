"""The converted base is a chat model: it answers, and its answers end by themselves."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from orpo_ray.config.model import ModelConfig
from orpo_ray.data.endings import end_ids
from orpo_ray.data.tokenise import PairTokeniser
from orpo_ray.models.base import load_base
from orpo_ray.models.tokenizer import base_location, load_tokenizer
from orpo_ray.runs.console import SILENT
from orpo_ray.training.generate import answers_of
from orpo_ray.training.pair_model import PairModel
from orpo_ray.training.sampling import Sampling

pytestmark = pytest.mark.real
QUESTIONS = ["What is the capital of France? Answer shortly.", "Say hello in one short sentence."]


def test_its_answers_are_right_end_by_themselves_and_are_those_of_transformers(
    real_base: Path,
) -> None:
    config = ModelConfig(base=str(real_base), quantization="none", dtype="float32")
    tokenizer = load_tokenizer(config, SILENT.announce)
    prompts = PairTokeniser(tokenizer).prompts(
        [[{"role": "user", "content": q}] for q in QUESTIONS]
    )
    base = load_base(config, "cpu", "float32", "sdpa", trainable=False)
    answers = answers_of(PairModel(base), tokenizer, prompts, Sampling(max_new_tokens=60))
    assert "Paris" in answers[0].text
    assert not any(answer.is_cut for answer in answers)
    plain = AutoModelForCausalLM.from_pretrained(base_location(config), dtype=torch.float32)
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt])
        out = plain.generate(input_ids=ids, max_new_tokens=60, do_sample=False)
        assert tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True) == answer.text
    assert end_ids(tokenizer, plain.generation_config) == [tokenizer.eos_token_id]
