"""Twenty losses of each objective in each layout are compared with those on record.

Only this test sees a change that moves all curves together. If a change is meant to move them,
`python tests/invariance/test_golden.py` writes them again, and the commit says why.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
from support import make_artifact, run_config, train_locally

from orpo_ray.data.store import Artifact
from orpo_ray.training.plan import Layout

CURVES = Path(__file__).with_name("golden_curves.json")
STEPS = 20
RELATIVE = 1e-5
"""CPUs of different machines add in different orders. On one machine the curves are equal."""

OBJECTIVES: dict[str, dict[str, Any]] = {
    "orpo": {"kind": "orpo", "lambda": 0.5},
    "orpo-full": {"kind": "orpo", "lambda": 0.5, "nll_on": "full"},
    "orpo-beta": {"kind": "orpo", "nll_weight": 0, "beta": 0.5},
    "dpo": {"kind": "dpo"},
    "dpo-smoothed-nll": {"kind": "dpo", "label_smoothing": 0.1, "nll_weight": 0.5},
    "dpo-hinge": {"kind": "dpo", "loss": "hinge"},
    "dpo-robust": {"kind": "dpo", "loss": "robust", "label_smoothing": 0.1},
    "dpo-sigmoid-norm": {"kind": "dpo", "loss": "sigmoid-norm"},
    "dpo-apo-zero": {"kind": "dpo", "loss": "apo-zero"},
    "dpo-apo-down": {"kind": "dpo", "loss": "apo-down"},
    "dpo-nca": {"kind": "dpo", "loss": "nca"},
    "ipo": {"kind": "ipo"},
    "ipo-token-mean": {"kind": "ipo", "log_probs": "token-mean"},
    "simpo": {"kind": "simpo"},
    "cpo": {"kind": "cpo"},
    "sft": {"kind": "sft"},
    "kto": {"kind": "kto"},
}
ALL = [
    (name, layout)
    for name in OBJECTIVES
    for layout in Layout
    # KTO is trained by TRL, which pads.
    if name != "kto" or layout.pads
]


# One curve of each objective, and every layout of the two most used ones. The others are `long`.
QUICK = {
    *((name, Layout("shared-prefix")) for name in OBJECTIVES),
    *((name, layout) for name in ("orpo", "dpo") for layout in Layout),
    ("kto", Layout("padded")),
}
MARKED = [pytest.param(*case, marks=() if case in QUICK else pytest.mark.long) for case in ALL]


def losses(name: str, layout: Layout, artifact: Artifact, storage: Path) -> list[float]:
    """The curve of a run in float32 without dropout, so that it depends on the code only."""
    training = {
        "max_steps": STEPS,
        "learning_rate": 3.0e-4,
        "eval_every": STEPS,
        "checkpoint_every": STEPS,
        "pairs_per_step": 4,
        "tokens_per_microbatch": 400,
        "gradient_checkpointing": False,
        "layout": str(layout),
        "engine": "trl" if name == "kto" else "fast",
    }
    config = run_config(
        storage,
        f"{name}-{layout}",
        objective=OBJECTIVES[name],
        training=training,
        model={"quantization": "none", "dtype": "float32"},
        adapter={"dropout": 0.0, "targets": ["q_proj", "v_proj"]},
    )
    return train_locally(config, artifact).losses


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return make_artifact(tmp_path_factory.mktemp("prepared"))


@pytest.mark.parametrize(("name", "layout"), MARKED, ids=lambda part: str(part))
def test_the_curve_is_the_one_on_record(
    name: str, layout: Layout, artifact: Artifact, tmp_path: Path
) -> None:
    stored = json.loads(CURVES.read_text(encoding="utf-8"))
    assert losses(name, layout, artifact, tmp_path) == pytest.approx(
        stored[f"{name} {layout}"], rel=RELATIVE, abs=0
    )


def test_every_stored_curve_is_compared_and_learns() -> None:
    stored = json.loads(CURVES.read_text(encoding="utf-8"))
    assert stored.keys() == {f"{name} {layout}" for name, layout in ALL}
    assert all(len(curve) == STEPS and min(curve[10:]) < curve[0] for curve in stored.values())


def write() -> None:
    """Put all curves on record as they are now."""
    with tempfile.TemporaryDirectory() as folder:
        pairs = make_artifact(Path(folder))
        curves = {
            f"{name} {layout}": losses(name, layout, pairs, Path(folder)) for name, layout in ALL
        }
    lines = [f"  {json.dumps(key)}: {json.dumps(curve)}" for key, curve in curves.items()]
    CURVES.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    write()
