"""What a search varies, and the config that a trial trains.

The ranges come from the config. If it has none, they are chosen to suit the objective.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from orpo_ray.config import RunConfig, SearchConfig, stage_configs
from orpo_ray.config.searched import given_values, grid_points, settings_of, with_values
from orpo_ray.config.space import Domain, Options, Span, parse_domain, written
from orpo_ray.config.suited import suited_rates
from orpo_ray.runs.console import Announce


@dataclass(frozen=True)
class Space:
    """The range of each searched field, and the stage that they belong to."""

    domains: dict[str, Domain]
    stage: int | None = None
    """None for a run without stages."""


def with_ranges(config: RunConfig, announce: Announce) -> RunConfig:
    """The config with the ranges that the search uses; ranges that it chooses are announced.

    Chosen ranges depend on the size of the base. Raises ConfigError if the base is not found.
    """
    search = config.search or SearchConfig()
    if not search.space:
        domains = _defaults(config, announce)
        notes: list[str] = []
        wide = _widened(config, domains, notes.append) if search.try_given else domains
        shown = "; ".join(f"{name} {shown_range(domain)}" for name, domain in wide.items())
        for line in (f"search.space: {shown}", *notes):
            announce(line)
        search = search.model_copy(update={"space": {name: written(d) for name, d in wide.items()}})
    return config.model_copy(update={"search": search})


def _defaults(config: RunConfig, announce: Announce) -> dict[str, Domain]:
    # Imported here, so that a cluster that is too small is refused before torch is loaded.
    from orpo_ray.models.size import count_parameters
    from orpo_ray.models.tokenizer import make_local

    make_local(config.model, announce)
    prefix, searched = "", config
    if config.stages:
        prefix, searched = f"stages.{len(config.stages) - 1}.", stage_configs(config)[-1]
    parameters = count_parameters(config.model).total
    rates = suited_rates(searched.adapter.kind, searched.objective.has_likelihood, parameters)
    fields = {**searched.objective.suited_space, "training.learning_rate": rates}
    return {prefix + name: parse_domain(suited.range) for name, suited in fields.items()}


def _widened(
    config: RunConfig, domains: dict[str, Domain], announce: Announce
) -> dict[str, Domain]:
    """The ranges, widened to hold the given values. Each widening is announced."""
    wide = dict(domains)
    for name, value in given_values(config, domains).items():
        domain = domains[name]
        assert isinstance(domain, Span), "ranges that suit an objective are spans"
        if domain.holds(value):
            continue
        if domain.log and value <= 0:
            announce(f"search.space: {name} {value:g} has no logarithm: only trial 0 tries it")
            continue
        wide[name] = replace(domain, low=min(domain.low, value), high=max(domain.high, value))
        announce(
            f"search.space: the range of {name}, {domain.low:g} to {domain.high:g}, is widened "
            f"to hold the given {value:g}"
        )
    return wide


def resolve(config: RunConfig) -> Space:
    """What to vary. Raises ConfigError if a value in the ranges makes no valid run."""
    # Sorted, because draws and grids must not depend on the order in which fields are written.
    domains = dict(sorted(settings_of(config).domains.items()))
    first_field = next(iter(domains))  # such as stages.1.objective.beta
    stage = int(first_field.split(".")[1]) if config.stages else None
    space = Space(domains, stage)
    for values in probes(config, space):
        trial_config(config, space, values, config.name)
    return space


def trial_config(config: RunConfig, space: Space, values: dict[str, Any], name: str) -> RunConfig:
    """The run that tries `values` under its own name: the whole run, or one stage of it."""
    changed = with_values(config, values)
    if space.stage is not None:
        changed = stage_configs(changed, {(): f"search.space: stages.{space.stage}"})[space.stage]
    # Without `ray`, one worker would train in the trial's own process, which reserves no resources.
    return changed.model_copy(
        update={"name": name, "scale": changed.scale.model_copy(update={"ray": True})}
    )


def probes(config: RunConfig, space: Space) -> Iterator[dict[str, Any]]:
    """Values that are checked before anything is trained.

    For a grid, these are all points. Other searchers vary one field at a time: a choice gives each
    of its values, and a range gives both ends and one point between them.
    """
    if settings_of(config).searcher == "grid":
        yield from grid_points(config, space.domains)
        return
    for name, domain in space.domains.items():
        if isinstance(domain, Options):
            yield from ({name: value} for value in domain.values)
        else:
            inside = domain.low + 0.6180339887 * (domain.high - domain.low)
            yield from ({name: domain.settle(value)} for value in (domain.low, domain.high, inside))


def shown_range(domain: Domain) -> str:
    """A range in a message."""
    if isinstance(domain, Options):
        return f"one of {list(domain.values)}"
    return f"{domain.low:g} to {domain.high:g}" + (", on a log scale" if domain.log else "")
