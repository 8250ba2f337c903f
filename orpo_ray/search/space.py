"""What a search varies: the ranges asked for, or those that suit the objective; and the config that a trial trains."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from orpo_ray.config import RunConfig, SearchConfig, build, dump, stage_configs
from orpo_ray.config.load import parse_override, set_dotted
from orpo_ray.config.plain_yaml import Key
from orpo_ray.config.space import Domain, Options
from orpo_ray.config.stages import merged
from orpo_ray.runs.console import Announce

_LEARNING_RATES = {
    ("lora", True): {"loguniform": [2e-5, 4e-4]},
    ("lora", False): {"loguniform": [1e-6, 1e-4]},
    ("none", True): {"loguniform": [2e-7, 1e-5]},
    ("none", False): {"loguniform": [2e-8, 2e-6]},
}
"""By adapter kind, and whether the loss has a likelihood term, which holds the text together at higher rates."""


@dataclass(frozen=True)
class Space:
    """The range of each searched field, and the stage that they are fields of, None where the run has none."""

    domains: dict[str, Domain]
    stage: int | None = None


def with_ranges(config: RunConfig, announce: Announce) -> RunConfig:
    """The config with all that a search goes by; ranges that suit the objective, where none are written, announced."""
    search = config.search or SearchConfig()
    if not search.space:
        search = search.model_copy(update={"space": _defaults(config)})
        shown = (f"{name} {_shown(domain)}" for name, domain in search.domains.items())
        announce(f"search.space: {'; '.join(shown)}")
    return config.model_copy(update={"search": search})


def resolve(config: RunConfig) -> Space:
    """What to vary. Raises ConfigError where one of the values makes no valid run."""
    # In one order however they are written: draws and grids go by it.
    domains = dict(sorted(settings_of(config).domains.items()))
    space = Space(domains, int(next(iter(domains)).split(".")[1]) if config.stages else None)
    for values in probes(config, space):
        trial_config(config, space, values, config.name)
    return space


def settings_of(config: RunConfig) -> SearchConfig:
    """The search section of a config that `with_ranges` has completed."""
    assert config.search is not None and config.search.space, "a search has ranges"
    return config.search


def trial_config(config: RunConfig, space: Space, values: dict[str, Any], name: str) -> RunConfig:
    """The run that tries `values`: the config itself, or one stage of it, under a name of its own."""
    changed = with_values(config, values)
    if space.stage is not None:
        changed = stage_configs(changed, {(): f"search.space: stages.{space.stage}"})[space.stage]
    # Always under Ray Train, where a trial finds its room; one worker would otherwise train in the trial's process.
    return changed.model_copy(update={"name": name, "scale": changed.scale.model_copy(update={"ray": True})})


def with_values(config: RunConfig, values: dict[str, Any]) -> RunConfig:
    """The config with searched fields set, and no search. Raises ConfigError where they make no valid run."""
    tree = dump(config) | {"search": None}
    for field, value in values.items():
        _set(tree, parse_override(f"{field}=")[0], value)
    return build(RunConfig, tree, {(): "search.space"})


def _set(tree: dict[str, Any], key: Key, value: Any) -> None:
    """Put a value in its place; of a section only the settings that are named change, as in a stage."""
    if not isinstance(value, dict):
        set_dotted(tree, key, value)
        return
    *stage, section = key
    owner = tree["stages"][stage[1]] if stage else tree
    owner.update(merged(owner, {str(section): value}))


def grid_points(domains: dict[str, Domain]) -> list[dict[str, Any]]:
    """Every combination of the values of a grid, the last field running fastest."""
    lists = [domain.values for domain in domains.values() if isinstance(domain, Options)]
    return [dict(zip(domains, point, strict=True)) for point in product(*lists)]


def _defaults(config: RunConfig) -> dict[str, Mapping[str, Any]]:
    prefix, shown = "", config
    if config.stages:
        prefix, shown = f"stages.{len(config.stages) - 1}.", stage_configs(config)[-1]
    rate = _LEARNING_RATES[shown.adapter.kind, shown.objective.has_likelihood]
    fields = {**shown.objective.search_space, "training.learning_rate": rate}
    return {prefix + name: written for name, written in fields.items()}


def probes(config: RunConfig, space: Space) -> Iterator[dict[str, Any]]:
    """Values to try on paper: every point of a grid, else the ends and a point inside of each range by itself."""
    if settings_of(config).searcher == "grid":
        yield from grid_points(space.domains)
        return
    for name, domain in space.domains.items():
        if isinstance(domain, Options):
            yield from ({name: value} for value in domain.values)
        else:
            inside = domain.low + 0.6180339887 * (domain.high - domain.low)
            yield from ({name: domain.settle(value)} for value in (domain.low, domain.high, inside))


def _shown(domain: Domain) -> str:
    if isinstance(domain, Options):
        return f"one of {list(domain.values)}"
    return f"{domain.low:g} to {domain.high:g}" + (", by its logarithm" if domain.log else "")
