"""Hands models to lm-evaluation-harness, and brings back its numbers with their settings.

Tasks, prompts and metrics are lm-eval's. What is ours is the model: as it was trained, or as
`export` wrote it.
"""

import hashlib
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from orpo_ray.config import RunConfig
from orpo_ray.config.storage import expanded
from orpo_ray.data.endings import end_ids
from orpo_ray.errors import ConfigError, DataError, RunError, on_one_line
from orpo_ray.evaluation.evaluate import load_trained
from orpo_ray.evaluation.exporting import EXPORT_FILE
from orpo_ray.evaluation.likeness import loaded_folder
from orpo_ray.models.identity import hub_revision
from orpo_ray.models.trained import ADAPTER_CONFIG
from orpo_ray.runs.files import read_json
from orpo_ray.runs.results import Benchmarks
from orpo_ray.runs.versions import versions
from orpo_ray.training.decisions import Decisions
from orpo_ray.training.pair_model import PairModel

_NEAR_NAMES = 3
_YAML = (".yaml", ".yml")
_SEEDS = ("random_seed", "numpy_seed", "torch_seed", "fewshot_seed")
_REJECTED = ".rejected"
"""The end of a folder's name that `export` did not let through."""
_STDERR = "_stderr"
"""What lm-eval adds to the name of a metric for its standard error."""


@dataclass(frozen=True, kw_only=True)
class Tasks:
    """What lm-eval is asked, as its own objects, and in which way."""

    names: Sequence[str]
    loaded: Sequence[Any]
    limit: int | None
    """The first rows of each task; None for all."""
    fewshot: int | None
    """Solved examples before each question; None for as many as the task says."""
    chat_template: bool
    batch_size: int | None
    """Rows at once; None for what fits a GPU, and for single rows on a CPU."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A model to evaluate, not loaded yet."""

    config: RunConfig
    decisions: Decisions
    tokenizer: PreTrainedTokenizerBase
    trained: str | None = None
    """The adapter or whole model of a run; None for the base alone."""
    merged: Path | None = None
    """A folder that `export` wrote, in place of all this."""

    @contextmanager
    def model(self) -> Iterator[PairModel]:
        """The model in memory, which stops at the tokens that end an answer in training."""
        if self.merged is not None:
            with loaded_folder(self.merged, self.decisions) as model:
                yield model
            return
        model = load_trained(self.config, self.decisions, self.trained)
        settings = model.model.generation_config
        settings.eos_token_id = end_ids(self.tokenizer, settings)
        yield model

    def told(self, chat_template: bool) -> dict[str, Any]:
        """What the record says of the model."""
        template = str(self.tokenizer.chat_template).encode()
        plain: dict[str, Any] = {
            "base": self.config.model.base,
            "revision": hub_revision(self.config.model),
            "quantization": self.config.model.quantization,
            "trained": self.trained,
            "merged": None,
            "dtype": self.decisions.dtype,
            "device": self.decisions.device,
            "chat_template_sha256": hashlib.sha256(template).hexdigest() if chat_template else None,
        }
        if self.merged is None:
            return plain
        merge = (read_json(self.merged / EXPORT_FILE) or {}).get("merge")
        return {**plain, "quantization": "none", "merged": str(self.merged), "merge": merge}


def merged_folder(place: str, run: str) -> Path:
    """The folder of a whole model that `export` wrote of a run. Raises ConfigError for any other.

    Folders of earlier versions do not say their run.
    """
    folder = expanded(place, "--merged").absolute()
    if not (folder / EXPORT_FILE).is_file():
        raise ConfigError(
            f"--merged: no {EXPORT_FILE} in {place}; name a folder that `orpo-ray export` wrote"
        )
    if (folder / ADAPTER_CONFIG).exists():
        raise ConfigError(
            f"--merged: {place} holds an adapter alone; leave out --merged to evaluate it"
        )
    if folder.resolve().name.endswith(_REJECTED):
        raise ConfigError(
            f"--merged: {place} was rejected by `orpo-ray export`, because it behaves otherwise "
            "than the trained model"
        )
    exported = (read_json(folder / EXPORT_FILE) or {}).get("run", run)
    if exported != run:
        raise ConfigError(f"--merged: {place} holds run {exported}, not {run}; evaluate that run")
    return folder


def merged_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that an exported folder holds."""
    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"--merged: the tokenizer in {folder} cannot be loaded: {on_one_line(error)}"
        ) from error


def load_tasks(names: Sequence[str]) -> list[Any]:
    """The tasks and groups of these names or YAML files, as lm-eval loads them, with their data.

    Raises ConfigError without the extra `lm-eval`, for a task that it does not know, and for one
    that runs what a model writes; DataError for a task whose parts cannot be fetched.
    """
    files = [name for name in names if _is_file(name)]
    for name in files:
        _refuse_unreadable(name)
    manager = _manager(with_own_tasks=len(files) < len(names))
    for name in names:
        if name not in files:
            _refuse_unknown(name, manager.task_index)
    loaded = []
    for name in names:
        found = _load(name, manager)
        for task in found["tasks"].values():
            _refuse_unfit(name, task)
        loaded += _outermost(found)
    return loaded


def _manager(with_own_tasks: bool) -> Any:
    """lm-eval's index of tasks. It takes seconds to list its own."""
    # Metrics that lm-eval lacks would be fetched from the hub as code. This variable is read when
    # the package of metrics is imported.
    os.environ["HF_EVALUATE_OFFLINE"] = "1"
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError(
            "--lm-eval: it needs the package lm-eval; pip install 'orpo_ray[lm-eval]'"
        ) from error
    return TaskManager(include_defaults=with_own_tasks)


def _is_file(name: str) -> bool:
    """Whether this names the YAML file of a task, and not a task of lm-eval."""
    return Path(name).suffix in _YAML


def _refuse_unreadable(name: str) -> None:
    """Raise ConfigError for a file that lm-eval does not read: none, or that of a group."""
    try:
        text = Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--lm-eval: {name} cannot be read: {on_one_line(error)}") from error
    if re.search(r"^group\s*:", text, re.MULTILINE):
        raise ConfigError(
            f"--lm-eval: {name} describes a group, and lm-eval reads files of single tasks only; "
            "name those of its tasks"
        )


def _refuse_unknown(name: str, known: Mapping[str, Any]) -> None:
    """Raise ConfigError for a task that lm-eval does not know, or that runs what a model writes."""
    if name not in known:
        near = get_close_matches(name, known, _NEAR_NAMES)
        told = f"did you mean {', '.join(near)}?" if near else "`lm-eval ls tasks` lists them"
        raise ConfigError(f"--lm-eval: there is no task {name}; {told}")
    if (known[name].cfg or {}).get("unsafe_code"):
        raise _runs_answers(name)


def _runs_answers(name: str) -> ConfigError:
    return ConfigError(
        f"--lm-eval: {name} runs code that the model writes, which is not done here; leave it out"
    )


def _load(name: str, manager: Any) -> Any:
    """What lm-eval makes of a name: its tasks and groups."""
    from datasets.exceptions import DatasetsError
    from yaml import YAMLError

    try:
        return manager.load([name])
    except ImportError as error:
        raise ConfigError(
            f"--lm-eval: {name} needs a package that is not installed: {on_one_line(error)[:300]}"
        ) from error
    except ConnectionError as error:
        raise DataError(
            f"--lm-eval: the data of {name} cannot be fetched, and is not in the local cache: "
            f"{on_one_line(error)[:300]} (is the network reachable?)"
        ) from error
    # A task is settings and code of others, which fail in many ways.
    except (
        OSError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        RuntimeError,
        AssertionError,
        DatasetsError,
        YAMLError,
    ) as error:
        reason = on_one_line(error)[:300] or type(error).__name__
        raise DataError(f"--lm-eval: {name} cannot be loaded: {reason}") from error


def _refuse_unfit(name: str, task: Any) -> None:
    if getattr(task, "UNSAFE_CODE", False):
        raise _runs_answers(name)
    if getattr(task, "MULTIMODAL", False):
        raise ConfigError(f"--lm-eval: {name} shows more than text to the model; leave it out")


def _outermost(found: Mapping[str, Any]) -> list[Any]:
    """The groups that are in no other group; without groups, the tasks."""
    inside = {child for children in found["group_map"].values() for child in children}
    groups = [group for name, group in found["groups"].items() if name not in inside]
    return groups or list(found["tasks"].values())


def measure(candidate: Candidate, tasks: Tasks) -> Mapping[str, Any]:
    """What lm-eval says of one model, in its own form.

    Raises RunError if a metric would have to be fetched as code.
    """
    from lm_eval import simple_evaluate

    # lm-eval would fork a pool for the standard error of some metrics. This process has threads,
    # and a fork of it may inherit a lock that nobody releases.
    os.environ["DISABLE_MULTIPROC"] = "1"
    with candidate.model() as model, redirect_stdout(sys.stderr):
        handed = _handed(model, candidate, tasks)
        try:
            found: Mapping[str, Any] = simple_evaluate(
                model=handed,
                tasks=list(tasks.loaded),
                num_fewshot=tasks.fewshot,
                limit=tasks.limit,
                apply_chat_template=tasks.chat_template,
                fewshot_as_multiturn=tasks.chat_template,
                batch_size=handed.batch_size,
                log_samples=False,
                confirm_run_unsafe_code=False,
            )
        except FileNotFoundError as error:
            raise RunError(
                "--lm-eval: a metric of these tasks is missing, and those that the hub keeps as "
                f"code are not fetched: {on_one_line(error)}"
            ) from error
    return found


def _handed(model: PairModel, candidate: Candidate, tasks: Tasks) -> Any:
    """The model as lm-eval takes it."""
    from lm_eval.models.huggingface import HFLM

    own: Any = model.model
    return HFLM(
        pretrained=own,
        tokenizer=candidate.tokenizer,
        mixed_precision_dtype=model.autocast,
        batch_size=tasks.batch_size or _batch_size(candidate.decisions.device),
        trust_remote_code=False,
    )


def _batch_size(device: str) -> str | int:
    """A CPU gains nothing from padding rows to one length."""
    return 1 if device == "cpu" else "auto"


def benchmarks_of(
    name: str,
    models: Mapping[str, dict[str, Any]],
    tasks: Tasks,
    found: Mapping[str, Mapping[str, Any]],
) -> Benchmarks:
    """The result, from what lm-eval said of `base` and `trained`, or of one of them."""
    one = next(iter(found.values()))
    settings = {
        "tasks": list(tasks.names),
        "limit": tasks.limit,
        "fewshot": dict(one["n-shot"]),
        "chat_template": tasks.chat_template,
        "task_versions": dict(one["versions"]),
        "rows": {task: rows["effective"] for task, rows in one["n-samples"].items()},
        "batch_size": one["config"]["batch_size"],
        "seeds": {seed: one["config"][seed] for seed in _SEEDS},
        "versions": {**versions(), **{each: version(each) for each in ("datasets", "lm_eval")}},
    }
    metrics = {who: _metrics(said) for who, said in found.items()}
    return Benchmarks(name=name, models=dict(models), metrics=metrics, settings=settings)


def _metrics(said: Mapping[str, Any]) -> dict[str, dict[str, dict[str, float | None]]]:
    """By task and group: each metric with its standard error, if lm-eval gives one."""
    return {
        task: {
            name: {"value": _number(value), "stderr": _number(numbers.get(_stderr_of(name)))}
            for name, value in numbers.items()
            if "," in name and _STDERR not in name
        }
        for task, numbers in {**said["results"], **said.get("groups", {})}.items()
    }


def _stderr_of(name: str) -> str:
    """`acc,none`, a metric and how answers were read, is `acc_stderr,none`."""
    metric, _, read_by = name.partition(",")
    return f"{metric}{_STDERR},{read_by}"


def _number(value: Any) -> float | None:
    """None for what lm-eval writes as N/A."""
    return float(value) if isinstance(value, int | float) else None
