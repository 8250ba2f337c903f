"""A real chat model, exported: plain transformers answer as the trained model does."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import ENVIRONMENT, HANG_S
from transformers import AutoModelForCausalLM, AutoTokenizer

import orpo_ray

pytestmark = pytest.mark.real
COMMAND = (sys.executable, "-m", "orpo_ray.cli.main")


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_an_exported_model_answers_as_the_trained_one(
    quantization: str, real_base: Path, shared_data: Path, tmp_path: Path
) -> None:
    """NF4 is where the two ways to merge differ."""
    run, out = tmp_path / "run", tmp_path / "out"
    settings = {
        "name": "run",
        "storage": str(tmp_path),
        "model": {"base": str(real_base), "quantization": quantization, "dtype": "float32"},
        "adapter": {"r": 16, "alpha": 32, "dropout": 0.0},
        "data": {
            "train": {
                "source": str(shared_data / "rasbt_instruction_preference.json"),
                "limit": 64,
            },
            "eval_fraction": 0.2,
            "max_length": 256,
        },
        "training": {
            "learning_rate": 1e-3,
            "pairs_per_step": 8,
            "max_steps": 6,
            "eval_every": 6,
            "checkpoint_every": 6,
            "tokens_per_microbatch": 4096,
            "gradient_checkpointing": False,
        },
        "scale": {"workers": 1, "gpus_per_worker": 0},
    }
    config = tmp_path / "run.json.yaml"
    config.write_text(json.dumps(settings), encoding="utf-8")  # JSON is YAML, too
    asked = (("train", config), ("export", run, "--to", out, "--answers", "4"))
    for words in asked:
        subprocess.run([*COMMAND, *map(str, words)], env=ENVIRONMENT, check=True, timeout=HANG_S)
    found = json.loads((out / "export.json").read_text(encoding="utf-8"))
    print({quantization: found})
    assert found["merge"] == ("original" if quantization == "none" else "dequantised")
    assert found["reloaded"]["greedy_agreement"] == 1.0
    if quantization == "nf4":
        distances = {
            name: like["max_log_prob_difference"] for name, like in found["candidates"].items()
        }
        assert distances["dequantised"] < distances["original"] / 10
    ours, tokenizer = orpo_ray.load(run)
    again = AutoTokenizer.from_pretrained(out)
    plain = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    prompt = again.apply_chat_template(
        [{"role": "user", "content": "Name three colours of the rainbow."}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    # The base is stored in 16 bits, so merged weights are rounded, and a near tie between two words
    # may end otherwise. What is said of the next word is nearly the same.
    with torch.no_grad():
        one, two = (model(**prompt).logits[0, -1].log_softmax(-1) for model in (plain, ours))
    likely = one.topk(20).indices
    assert torch.allclose(one[likely], two[likely], atol=0.03)
    assert tokenizer.chat_template == again.chat_template
