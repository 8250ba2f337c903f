"""Imports that most runs never need happen at their first use, and then all is there."""

import gc
import subprocess
import sys
import threading

import pytest
from support import BASE

from orpo_ray.lean_imports import _later, without_collections

IS_LOADED = "import sys; print('loaded:', *(name for name in sys.argv[1:] if name in sys.modules))"
PUT_OFF = ("pandas", "datasets.arrow_dataset", "torch._inductor.compile_fx", "deepspeed")


def loaded_after(code: str, *names: str) -> set[str]:
    """The modules that a new interpreter has imported after it ran the code."""
    command = [sys.executable, "-c", f"{code}\n{IS_LOADED}", *names]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rpartition("loaded:")[2].split())


def test_what_a_run_computes_with_is_there_and_nothing_that_it_never_calls():
    loaded = loaded_after("import orpo_ray.training.loop", "peft", "bitsandbytes.nn", *PUT_OFF)
    assert loaded == {"peft", "bitsandbytes.nn"}


def test_the_trainer_still_knows_a_data_set_once_there_is_one():
    asks = (
        "import orpo_ray, transformers.trainer as trainer; assert not "
        "trainer.is_datasets_available()\n"
        "from datasets.arrow_dataset import Dataset\n"
        "assert trainer.is_datasets_available() and trainer.datasets.Dataset is Dataset"
    )
    assert loaded_after(asks, "datasets.arrow_dataset") == {"datasets.arrow_dataset"}


def test_a_tokenizer_and_a_config_load_no_model_code():
    reads = (
        "import orpo_ray; from transformers import AutoTokenizer as T; "
        f"T.from_pretrained({str(BASE)!r})"
    )
    models = ("transformers.models.llama.configuration_llama", "transformers.modeling_utils")
    assert loaded_after(reads, *models, "transformers.activations", "torch._dynamo", "sympy") == {
        models[0]
    }


def test_activations_are_checked_when_a_config_names_one():
    checks = (
        "import orpo_ray, sys, transformers.utils.type_validators as validators\n"
        "assert 'transformers.activations' not in sys.modules\n"
        "assert 'silu' in validators.ACT2FN and 'silly' not in validators.ACT2FN\n"
        "from transformers.activations import ACT2FN, SiLUActivation\n"
        "assert list(ACT2FN) == list(validators.ACT2FN) and ACT2FN['silu'].__class__ is "
        "SiLUActivation"
    )
    assert loaded_after(checks, "transformers.activations") == {"transformers.activations"}


def test_activations_that_are_there_are_taken_as_they_are():
    order = (
        "import orpo_ray, transformers.activations as a, transformers.utils.type_validators as "
        "validators\n"
        "assert validators.ACT2FN is a.ACT2FN"
    )
    assert loaded_after(order, "transformers.activations") == {"transformers.activations"}


def test_bitsandbytes_compiles_what_is_called():
    """Without a C compiler the function is called as it is; that is torch's own behaviour."""
    calls = (
        "import orpo_ray, sys, torch, bitsandbytes.backends.default.ops as ops\n"
        "assert 'torch._inductor.compile_fx' not in sys.modules\n"
        "found = ops._dequantize_blockwise_compute(\n"
        "    torch.ones(4, dtype=torch.uint8), torch.full((1,), 2.0), torch.arange(256.0), 4, "
        "torch.float32)\n"
        "assert found.tolist() == [2.0] * 4"
    )
    assert loaded_after(calls, "torch._inductor.compile_fx") == {"torch._inductor.compile_fx"}


def test_a_model_in_deepspeeds_engine_is_still_taken_out_of_it():
    """accelerate asks whether a model is wrapped; it looks at it once DeepSpeed is imported."""
    asks = (
        "import orpo_ray, accelerate.utils.other as other; assert not "
        "other.is_deepspeed_available()\n"
        "import deepspeed; assert other.is_deepspeed_available()"
    )
    assert loaded_after(asks, "deepspeed") == {"deepspeed"}


def test_a_function_is_compiled_once_at_its_first_call():
    compiled = []

    def compiles(function, **options):
        compiled.append(options)
        return lambda *args: ("compiled", function(*args))

    torch_compile = _later(compiles)

    @torch_compile(dynamic=False)
    def add(a, b):
        return a + b

    assert compiled == []
    assert [add(1, 2), add(3, 4)] == [("compiled", 3), ("compiled", 7)]
    assert compiled == [{"dynamic": False}]
    assert torch_compile(len)("ab") == ("compiled", 2)
    assert len(compiled) == 2, "what is no function of Python is compiled as it comes"


def test_another_thread_has_torchs_own_compile_meanwhile():
    torch_compile = _later(lambda function, **options: "at once")
    found = []
    thread = threading.Thread(target=lambda: found.append(torch_compile(lambda: None)))
    thread.start()
    thread.join()
    assert found == ["at once"]


def test_torch_compile_is_itself_again_after_bitsandbytes():
    import torch

    kept = torch.compile
    import bitsandbytes  # noqa: F401

    assert torch.compile is kept
    assert kept.__module__ == "torch"


@pytest.mark.parametrize("was_enabled", [True, False])
def test_garbage_collection_is_as_before_after_any_error(was_enabled):
    (gc.enable if was_enabled else gc.disable)()
    try:
        with pytest.raises(ImportError), without_collections():
            assert not gc.isenabled()
            raise ImportError
        assert gc.isenabled() == was_enabled
    finally:
        gc.enable()
