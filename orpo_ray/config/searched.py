"""The values of searched fields: those that a config has, and those that a trial gets."""

from itertools import product
from typing import Any

from orpo_ray.config.build import build, dump
from orpo_ray.config.load import parse_override, set_dotted
from orpo_ray.config.merge import merged
from orpo_ray.config.plain_yaml import Key
from orpo_ray.config.run import RunConfig
from orpo_ray.config.search import TRIALS, SearchConfig
from orpo_ray.config.space import Domain, Options
from orpo_ray.config.stages import stage_configs
from orpo_ray.errors import ConfigError


def settings_of(config: RunConfig) -> SearchConfig:
    """The search section of a config that `with_ranges` has completed."""
    assert config.search is not None and config.search.space, "a search has ranges"
    return config.search


def given_values(config: RunConfig, domains: dict[str, Domain]) -> dict[str, Any]:
    """The value of each searched field in the config.

    If the field is searched over a list, it is the item that leaves the config as it is.
    """
    return {field: _given(config, field, domain) for field, domain in domains.items()}


def _given(config: RunConfig, field: str, domain: Domain) -> Any:
    if isinstance(domain, Options):
        for value in domain.values:
            if _changes_nothing(config, field, value):
                return value
    name, at = field, dump(config)
    if field.startswith("stages."):
        _, number, name = field.split(".", 2)
        at = dump(stage_configs(config)[int(number)])
    for part in name.split("."):
        at = at[part]
    return at


def _changes_nothing(config: RunConfig, field: str, value: Any) -> bool:
    try:
        changed = with_values(config, {field: value})
        now, before = stage_configs(changed), stage_configs(config)
    except ConfigError:
        return False  # the trial with this value is refused later
    if config.stages:
        return now == before
    return changed == with_values(config, {})


def grid_points(config: RunConfig, domains: dict[str, Domain]) -> list[dict[str, Any]]:
    """What a grid tries: the given configuration, then every other combination.

    The last field changes fastest.
    """
    lists = [domain.values for domain in domains.values() if isinstance(domain, Options)]
    points = [dict(zip(domains, point, strict=True)) for point in product(*lists)]
    if not settings_of(config).try_given:
        return points
    given = given_values(config, domains)
    return [given, *(point for point in points if point != given)]


def trial_count(config: RunConfig) -> int:
    """How many trials a search has."""
    search = config.search
    assert search is not None, "only a search has trials"
    if search.searcher == "grid":
        return len(grid_points(config, search.domains))
    return search.trials or TRIALS


def with_values(config: RunConfig, values: dict[str, Any]) -> RunConfig:
    """The config of a trial: searched fields set, and no search.

    Raises ConfigError if the values make no valid run.
    """
    tree = dump(config) | {"search": None, "compare": None}
    if not config.stages and config.training.learning_rate == config.usual_rate:
        tree["training"]["learning_rate"] = None  # a trial may have another usual one
    for field, value in values.items():
        _set(tree, parse_override(f"{field}=")[0], value)
    return build(RunConfig, tree, {(): "search.space"})


def _set(tree: dict[str, Any], key: Key, value: Any) -> None:
    """Put a value in its place.

    A value that is a section changes only the settings that it names, as a stage does.
    """
    if not isinstance(value, dict):
        set_dotted(tree, key, value)
        return
    *stage, section = key
    owner = tree["stages"][stage[1]] if stage else tree
    owner.update(merged(owner, {str(section): value}))
