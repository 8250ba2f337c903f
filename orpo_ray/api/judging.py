"""Judge: which of two files of answers is better."""

from __future__ import annotations

from os import PathLike, fspath
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

from orpo_ray.api.ground import (
    PRINTING,
    refuse_other_console,
    tokenizer_of,
)
from orpo_ray.api.trained import config_of, decide_for_one, to_load
from orpo_ray.config import RunConfig
from orpo_ray.errors import ConfigError
from orpo_ray.lean_imports import without_collections
from orpo_ray.runs.console import Console
from orpo_ray.runs.results import WinRate
from orpo_ray.runs.stop import StopSignal

if TYPE_CHECKING:
    from orpo_ray.evaluation.judge.by_endpoint import ByEndpoint
    from orpo_ray.evaluation.judge.by_reward import ByReward
    from orpo_ray.evaluation.judge.judging import Judge

_ENDING = ".verdicts.jsonl"


def judge(
    a: str | PathLike[str],
    b: str | PathLike[str] | None = None,
    *,
    endpoint: str | None = None,
    model: str | None = None,
    key_file: str | PathLike[str] | None = None,
    reward: RunConfig | str | PathLike[str] | None = None,
    out: str | PathLike[str] | None = None,
    parallel: int = 4,
    max_requests: int | None = None,
    console: Console = PRINTING,
) -> WinRate:
    """How often the answers in file A are better than those to the same prompts in file B.

    Without `b`, A holds the answers of both models, and the trained one is compared with the base.
    The judge is the model of that name at an OpenAI-compatible `endpoint`, or with `reward` the
    log-probs of a run's model. Verdicts are kept in `out`, beside A if it is not given; while they
    come, in the same name with `.part`, so the same call goes on after it was ended.
    """
    refuse_other_console(console)
    first, second = fspath(a), None if b is None else fspath(b)
    place = _beside(first, second) if out is None else Path(out)
    with without_collections():
        from orpo_ray.evaluation.answers_file import refuse_unwritable
        from orpo_ray.evaluation.judge.answers import read_sides
        from orpo_ray.evaluation.judge.judging import write_verdicts

    refuse_unwritable(place)
    if reward is not None:
        if endpoint or model or key_file or max_requests:
            raise ConfigError(
                "reward: a run judges without requests; leave out endpoint, model, key_file and "
                "max_requests"
            )
        sides = read_sides(first, second)
        by: Judge = _by_reward(reward, console)
    elif endpoint is not None:
        by = by_endpoint(endpoint, model, key_file, parallel, max_requests)
        sides = read_sides(first, second)
    else:
        raise ConfigError(
            "endpoint: name the URL of an OpenAI-compatible endpoint, or judge by the reward of a "
            "run"
        )
    with StopSignal(console, "stopping after the requests that are under way") as heard:
        return write_verdicts(place, sides, by, heard)


def _beside(a: str, b: str | None) -> Path:
    """The file of the verdicts if none is named: beside A, or here if that is a URL."""
    names = [PurePath(file).name.partition(".")[0] for file in (a, b) if file is not None]
    name = "-vs-".join(names) + _ENDING
    return Path(name) if "://" in a else Path(a).with_name(name)


def by_endpoint(
    url: str,
    model: str | None,
    key_file: str | PathLike[str] | None,
    parallel: int = 4,
    max_requests: int | None = None,
) -> ByEndpoint:
    """The judge behind an endpoint. Raises ConfigError for what is no endpoint, or no key."""
    from orpo_ray.evaluation.judge.by_endpoint import ByEndpoint
    from orpo_ray.evaluation.judge.endpoint import PATIENCE, endpoint_of

    endpoint = endpoint_of(url, model, None if key_file is None else fspath(key_file))
    return ByEndpoint(
        endpoint=endpoint,
        chat=endpoint.connect(PATIENCE.answer),
        patience=PATIENCE,
        parallel=parallel,
        max_requests=max_requests,
    )


def _by_reward(run: RunConfig | str | PathLike[str], console: Console) -> ByReward:
    last, trained = to_load(config_of(run), None)
    assert trained is not None, "a run judges by what it trained"
    with without_collections():
        from orpo_ray.evaluation.judge.by_reward import ByReward
        from orpo_ray.models.hardware import probe_hardware

    tokenizer = tokenizer_of(last.config, console)
    return ByReward(
        config=last.config,
        decisions=decide_for_one(last, None, probe_hardware(), console),
        trained=trained,
        tokenizer=tokenizer,
    )
