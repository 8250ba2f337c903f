"""The command line answers at once: help loads no torch, no Ray and no transformers."""

import importlib.util
import pkgutil
import resource
import subprocess
import sys

import pytest

import orpo_ray.planner

HEAVY = {"torch", "ray", "transformers"}
LIGHT_MODULES = [
    "orpo_ray",
    "orpo_ray.api",
    "orpo_ray.cli.main",
    "orpo_ray.config",
    "orpo_ray.config.load",
    "orpo_ray.errors",
    "orpo_ray.ray_runtime",
    "orpo_ray.runs.run",
    "orpo_ray.runs.search",
]
COMPUTING = {"peft", "bitsandbytes", "datasets"}
"""What is loaded only with the trainer."""
LIGHT_WHEN_THERE = ["orpo_ray.report"]
HELP = [sys.executable, "-m", "orpo_ray.cli.main", "--help"]

REPORT = "import sys; print('loaded:', *sorted({name.partition('.')[0] for name in sys.modules}))"
RUN_HELP = """
import runpy, sys
sys.argv = ["orpo-ray", *sys.argv[1:]]
try:
    runpy.run_module("orpo_ray.cli.main", run_name="__main__", alter_sys=True)
except SystemExit as stop:
    assert not stop.code, stop.code
"""


def loaded_by(code: str, *arguments: str) -> set[str]:
    """Top-level modules in a fresh interpreter after it ran the code."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{REPORT}", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rpartition("loaded:")[2].split())


def cpu_seconds(command: list[str]) -> float:
    """User and system time of a command and its children."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (after.ru_utime - before.ru_utime) + (after.ru_stime - before.ru_stime)


def exists(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


@pytest.mark.parametrize("module", [*LIGHT_MODULES, *filter(exists, LIGHT_WHEN_THERE)])
def test_importing_loads_nothing_heavy(module):
    assert loaded_by(f"import {module}") & HEAVY == set()


def test_the_whole_planner_loads_nothing_heavy_and_nothing_to_compute_with():
    modules = [each.name for each in pkgutil.iter_modules(orpo_ray.planner.__path__)]
    assert {"bases", "hardware", "shapes"} <= set(modules)
    code = "\n".join(f"import orpo_ray.planner.{name}" for name in modules)
    assert loaded_by(code) & (HEAVY | COMPUTING) == set()


def test_the_process_that_forks_for_probes_has_loaded_nothing_with_threads_or_settings():
    loaded = loaded_by("import orpo_ray.doctor.server")
    assert loaded & (HEAVY | COMPUTING | {"huggingface_hub", "pyarrow"}) == set()


def test_what_each_process_of_a_run_is_told_loads_nothing_heavy():
    assert loaded_by("import orpo_ray.distributed.task") & (HEAVY | COMPUTING) == set()


def test_rays_controller_which_names_what_workers_call_loads_nothing_to_compute_with():
    loaded = loaded_by("import orpo_ray.distributed.entry, orpo_ray.distributed.network")
    assert "ray" in loaded
    assert loaded & {"torch", "transformers", *COMPUTING} == set()


def test_a_process_that_only_looks_after_workers_loads_nothing_to_compute_with():
    loaded = loaded_by(
        "import orpo_ray.distributed.run, orpo_ray.search.search, orpo_ray.search.trial"
    )
    assert "ray" in loaded
    assert loaded & COMPUTING == set()


def test_who_evaluates_or_computes_a_reference_loads_no_trainer():
    trains = (
        "trains = [name for name in sys.modules if name in ('orpo_ray.training.trainer', "
        "'orpo_ray.training.loop')]"
    )
    code = (
        f"import sys, orpo_ray.evaluation.evaluate, orpo_ray.training.load; {trains}; assert "
        "not trains, trains"
    )
    assert "torch" in loaded_by(code)


def test_the_check_sees_a_heavy_import():
    assert "torch" in loaded_by(
        "import sys, types; sys.modules['torch.nn'] = types.ModuleType('torch.nn')"
    )


def test_help_loads_nothing_heavy():
    assert loaded_by(RUN_HELP, "--help") & (HEAVY | {"pydantic"}) == set()


def test_help_takes_under_four_fifths_of_a_second():
    assert min(cpu_seconds(HELP) for _ in range(3)) < 0.8
