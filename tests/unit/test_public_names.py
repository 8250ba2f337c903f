"""What `import orpo_ray` gives, pinned: a name that is missing or new is seen here first."""

import inspect
from dataclasses import FrozenInstanceError, is_dataclass
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import yaml
from support import run_config, settings

import orpo_ray
from orpo_ray import errors
from orpo_ray.config import dump

FUNCTIONS = {
    "compare",
    "estimate",
    "evaluate",
    "export",
    "generate",
    "judge",
    "load",
    "load_config",
    "plan",
    "plan_search",
    "prepare",
    "train",
    "tune",
}
ERRORS = {
    "CannotTellError",
    "ConfigError",
    "DataError",
    "NonFiniteError",
    "OrpoRayError",
    "ResourceError",
    "RunError",
    "SetupError",
    "StoppedError",
    "UserError",
}
RESULTS = {
    "Artifact",
    "Comparison",
    "Estimate",
    "Evaluation",
    "Exported",
    "Generated",
    "Likeness",
    "Sample",
    "SearchPlan",
    "SearchResult",
    "TrainPlan",
    "TrainResult",
    "WinRate",
}
OTHERS = {"Console", "RunConfig", "__version__"}


def test_the_public_names_are_these() -> None:
    assert set(dir(orpo_ray)) == set(orpo_ray.__all__) == FUNCTIONS | ERRORS | RESULTS | OTHERS
    assert orpo_ray.__version__ == version("orpo-ray")
    with pytest.raises(AttributeError, match="module 'orpo_ray' has no attribute 'tran'"):
        _ = orpo_ray.tran


@pytest.mark.parametrize("name", sorted(FUNCTIONS | ERRORS | RESULTS | {"Console", "RunConfig"}))
def test_each_says_what_it_is_for(name: str) -> None:
    documented = getattr(orpo_ray, name).__doc__ or ""  # of a class its own, and not its signature
    assert len(documented) > 20 and not documented.startswith(f"{name}(")


@pytest.mark.parametrize("name", sorted(RESULTS))
def test_results_are_frozen(name: str) -> None:
    kind = getattr(orpo_ray, name)
    assert is_dataclass(kind)
    result = object.__new__(kind)
    with pytest.raises(FrozenInstanceError):
        result.name = "other"


def test_functions_say_what_they_return() -> None:
    returned = {
        name: inspect.signature(getattr(orpo_ray, name)).return_annotation for name in FUNCTIONS
    }
    assert returned == {
        "compare": "Comparison",
        "estimate": "Estimate",
        "evaluate": "Evaluation",
        "export": "Exported",
        "load": "tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]",
        "load_config": "RunConfig",
        "plan": "TrainPlan",
        "plan_search": "SearchPlan",
        "prepare": "Artifact",
        "generate": "Generated",
        "judge": "WinRate",
        "train": "TrainResult",
        "tune": "SearchResult",
    }


def test_every_error_of_a_run_is_public() -> None:
    ours = {name for name, item in vars(errors).items() if isinstance(item, type)}
    assert ours - ERRORS == {"JobError"}, "which only commands raise"


def test_a_config_comes_from_plain_data_as_from_a_file(tmp_path: Path) -> None:
    tree = settings(tmp_path)
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(tree), encoding="utf-8")
    overrides = ["objective.lambda=0.3"]
    assert orpo_ray.load_config(tree) == run_config(tmp_path)
    assert orpo_ray.load_config(tree, overrides) == orpo_ray.load_config(file, overrides)
    assert tree == settings(tmp_path), "what was passed is left as it was"
    assert orpo_ray.load_config(dump(run_config(tmp_path))) == run_config(tmp_path)


def test_plain_data_may_hold_paths_and_is_copied(tmp_path: Path) -> None:
    tree = MappingProxyType(settings(tmp_path) | {"storage": tmp_path})
    assert orpo_ray.load_config(tree, ["training.seed=7"]).training.seed == 7
    one_by_one = (override for override in ["training.seed=7"])
    assert orpo_ray.load_config(tree, one_by_one).training.seed == 7
    assert orpo_ray.load_config(tree) == run_config(tmp_path)


ITSELF: dict[str, Any] = {"name": "x"}
ITSELF["model"] = ITSELF


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((None,), "config: must be a YAML file's path or a dict of sections, not NoneType"),
        (([],), "config: must be a YAML file's path or a dict of sections, not list"),
        (({}, "name=x"), r"overrides: must be a list of texts such as \['name=second'\], not str"),
        (({}, [3]), "overrides: must be a list of texts"),
        (({}, None), r"overrides: must be a list of texts such as .*, not NoneType"),
        (({}, 3), r"overrides: must be a list of texts such as .*, not int"),
        (({"name": np.int64(3)},), "config: must be plain data such as numbers and texts; int64"),
        ((ITSELF,), "config: nested too deeply; check that no section holds itself"),
        (({},), "config: name: missing"),
    ],
)
def test_what_is_no_config_is_refused_in_one_line(arguments: tuple[Any, ...], says: str) -> None:
    with pytest.raises(orpo_ray.ConfigError, match=f"^{says}"):
        orpo_ray.load_config(*arguments)


@pytest.mark.parametrize(
    "name", ["compare", "estimate", "evaluate", "plan", "plan_search", "prepare", "train", "tune"]
)
def test_a_wrong_config_or_console_is_refused_before_anything_begins(
    name: str, tmp_path: Path
) -> None:
    function = getattr(orpo_ray, name)
    with pytest.raises(
        orpo_ray.ConfigError, match=r"^config: must be what load_config returns, not str"
    ):
        function("run.yaml")
    for wrong in (print, orpo_ray.Console):
        with pytest.raises(
            orpo_ray.ConfigError, match=r"^console: must be an orpo_ray\.Console, not "
        ):
            function(run_config(tmp_path), console=wrong)
    assert list(tmp_path.iterdir()) == []


def test_what_is_wrong_in_plain_data_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        orpo_ray.ConfigError, match=r"^config: training\.seeds: unknown key; did you mean"
    ):
        orpo_ray.load_config(settings(tmp_path, training={"seeds": 1}))
