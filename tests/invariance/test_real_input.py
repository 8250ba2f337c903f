"""ORPO on real preference files, with a small model and a real tokenizer, learns.

The numbers of pairs are those of the files. Some files are offensive, so none of their text may
reach a log or a failure message.
"""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support import Listener, read_metrics
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import orpo_ray
from orpo_ray.config import RunConfig, build
from orpo_ray.data.store import Summary, artifact_path, open_artifact
from orpo_ray.runs.run import Run

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_session")]


@pytest.fixture(scope="module")
def base(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with random weights that knows nothing, and a ChatML tokenizer of 6,400 ids."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "tokenizers" / "minimind_chatml_6400")
    config = LlamaConfig(
        vocab_size=6400,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def train(
    base: Path, source: Path, storage: Path, **training: Any
) -> tuple[Summary, list[dict[str, Any]], list[str]]:
    """What was prepared, the lines of metrics.jsonl, and what was announced."""
    tree = {
        "name": "real",
        "storage": str(storage),
        "model": {"base": str(base), "quantization": "none"},
        "adapter": {"kind": "none"},
        "data": {
            "train": [{"source": str(source)}],
            "eval_fraction": 0.1,
            "max_length": 512,
            "max_prompt_length": 384,
        },
        "objective": {"kind": "orpo", "lambda": 1.0},
        "training": {"learning_rate": 3.0e-3, "warmup": 0.1, "checkpoint_every": 1.0, **training},
    }
    config = build(RunConfig, tree, {(): "test"})
    said: list[str] = []
    orpo_ray.train(config, Listener(said))
    artifact = open_artifact(
        artifact_path(config.storage_dir, Run(config).facts()["identity"]["data"])
    )
    metrics = read_metrics(config.run_dir)
    assert all(math.isfinite(value) for line in metrics for value in line.values())
    return artifact.summary, metrics, said


def curve(metrics: list[dict[str, Any]], name: str) -> list[float]:
    return [line[name] for line in metrics if name in line]


def test_orpo_learns_the_tone_of_real_answers(
    base: Path, shared_data: Path, tmp_path: Path
) -> None:
    source = shared_data / "rasbt_instruction_preference.json"
    summary, metrics, said = train(
        base, source, tmp_path, max_steps=40, pairs_per_step=16, eval_every=40
    )
    assert (summary.read, summary.bad, summary.duplicates) == (798, {"identical": 5}, 0)
    assert summary.train + summary.eval + summary.overlong == 793
    assert any("held out for evaluation" in line for line in said)
    losses = curve(metrics, "train/loss")
    assert len(losses) == 40
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    before, after = curve(metrics, "eval/accuracy")
    assert abs(before - 0.5) < 0.15, "random weights prefer neither answer"
    assert after > 0.65, f"{summary.eval} held-out pairs; by chance 0.5 +- 0.06"
    margins = curve(metrics, "eval/margin")
    assert margins[-1] > margins[0] + 0.1


def test_orpo_over_anthropic_dialogues(base: Path, shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "hh_harmless_train.jsonl.gz"
    summary, metrics, said = train(
        base, source, tmp_path, max_steps=4, pairs_per_step=8, eval_every=4
    )
    assert summary.read == 1189
    assert summary.bad == {"different-prompts": 3, "empty-chosen": 2}
    assert summary.train + summary.eval + summary.overlong == 1184
    assert summary.overlong < 0.15 * summary.read
    assert any("only the last answer is trained" in line for line in said)
    losses = curve(metrics, "train/loss")
    assert len(losses) == 4
    assert losses[-1] < losses[0]
