"""How much memory an export takes: a shard of the weights, whatever the size of the model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support import DEMO, random_base
from transformers import AutoModelForCausalLM

SHARD = "160MB"
MEASURE = """
import gc, json, sys, threading
from pathlib import Path

def held():  # kB that this process alone holds; pages of files can be dropped at any time
    with open("/proc/self/status") as file:
        return int(next(line for line in file if line.startswith("RssAnon")).split()[1])

import orpo_ray
from orpo_ray.models import placement
from orpo_ray.models.weights import Weights
from orpo_ray.runs.console import SILENT

settings, adapter, small, out = json.loads(sys.argv[1])
# Room for the quantised base, but not for its weights in float32.
placement.free_memory = lambda device: 4 * Weights(Path(base)).numbers
for base, trained in ((small, small + "-adapter"), (settings["model"]["base"], adapter)):
    config = orpo_ray.load_config({**settings, "model": {**settings["model"], "base": base}})
    gc.collect()
    before = most = held()  # the first export is the start-up: it loads all that is imported
    done = threading.Event()

    def watch():
        global most
        while not done.wait(0.002):
            most = max(most, held())

    watcher = threading.Thread(target=watch, daemon=True)  # an error must end this program
    watcher.start()
    orpo_ray.export(config, f"{out}-{base == small}", adapter=trained, answers=1, console=SILENT)
    done.set()
    watcher.join()
print(json.dumps((most - before) * 1024))
"""


def with_adapter(base: Path) -> Path:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    lora = LoraConfig(
        task_type="CAUSAL_LM", r=8, target_modules="all-linear", init_lora_weights=False
    )
    folder = Path(f"{base}-adapter")
    get_peft_model(model, lora).save_pretrained(str(folder))
    return folder


@pytest.mark.long
def test_an_export_holds_less_than_a_shard_and_the_adapter(tmp_path: Path) -> None:
    """A base of 320 MB in two files, of which one layer's weights are small, as in real ones."""
    small, large = tmp_path / "small", tmp_path / "large"
    random_base(small, "llama")
    random_base(large, "llama", hidden_size=512, intermediate_size=1536, num_hidden_layers=46)
    model = AutoModelForCausalLM.from_pretrained(large, dtype=torch.float16)
    model.save_pretrained(large, max_shard_size=SHARD)
    (large / "model.safetensors").unlink()
    shards = sorted(large.glob("*.safetensors"))
    assert len(shards) > 1
    adapter = with_adapter(large) / "adapter_model.safetensors"
    with_adapter(small)
    settings = {
        "name": "memory",
        "storage": str(tmp_path / "runs"),
        "model": {"base": str(large), "quantization": "nf4"},
        "adapter": {"r": 8, "alpha": 8, "dropout": 0.0},
        "data": {
            "train": [{"source": str(DEMO / "train.jsonl"), "limit": 8}],
            "eval": [{"source": str(DEMO / "h1.jsonl"), "limit": 4}],
            "max_length": 96,
        },
        "training": {"pairs_per_step": 4, "max_steps": 1},
        "scale": {"workers": 1},
    }
    asked = json.dumps([settings, str(adapter.parent), str(small), str(tmp_path / "out")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, asked],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    held = json.loads(done.stdout.splitlines()[-1])
    bound = 1.2 * max(map(size, shards)) + size(adapter)
    print(f"held {held / 1e6:.0f} MB, bound {bound / 1e6:.0f} MB")
    assert held <= bound


def size(file: Path) -> int:
    return file.stat().st_size
