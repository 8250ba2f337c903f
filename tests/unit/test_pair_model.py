"""A model computes in the same number format for every caller."""

from pathlib import Path

import pytest
import torch

from orpo_ray.training.layout import collate
from orpo_ray.training.load import autocast_dtype, load_pair_model
from orpo_ray.training.plan import PADDED
from tests.support import decided, demo_pairs, run_config


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("float32", None), ("bfloat16", torch.bfloat16), ("float16", torch.float16)],
)
def test_each_sixteen_bit_format_has_its_autocast(dtype: str, expected: torch.dtype | None):
    assert autocast_dtype(decided(512, dtype=dtype)) == expected


def test_layers_compute_in_the_format_of_the_run_inside_a_foreign_autocast(tmp_path: Path):
    config = run_config(tmp_path, model={"quantization": "none"}, adapter={"kind": "none"})
    decisions = decided(512, dtype="bfloat16")
    model = load_pair_model(config, decisions, lambda line: None)
    seen: list[torch.dtype] = []
    layer = model.causal_model.get_submodule("model.layers.0.mlp.up_proj")
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    batch = collate(demo_pairs("h1", 2), PADDED, 0, score_prompt=False)
    with torch.autocast("cpu", dtype=torch.float16):
        log_probs = model(batch)
    assert seen == [torch.bfloat16]
    assert log_probs.dtype == torch.float32, "log-probs are float32 whatever the layers compute in"
    assert next(model.parameters()).dtype == torch.float32, "what is trained stays float32"
