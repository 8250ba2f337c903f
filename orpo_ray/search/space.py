"""What a search varies: the ranges asked for, or those that suit the objective; and the config that a trial trains."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

from orpo_ray.config import RunConfig, SearchConfig, build, dump, stage_configs
from orpo_ray.config.load import parse_override, set_dotted
from orpo_ray.config.space import Domain, Options, Span

# Ranges of the papers and of shipped recipes: ORPO arXiv:2403.07691, DPO 2305.18290, IPO 2310.12036, SimPO 2405.14734,
# CPO 2401.08417.
_WEIGHTS: dict[str, dict[str, Span]] = {
    "orpo": {"objective.lambda": Span(0.1, 2.0, log=True)},
    "dpo": {"objective.beta": Span(0.01, 0.1, log=True)},
    "ipo": {"objective.beta": Span(0.01, 1.0, log=True)},
    "simpo": {"objective.beta": Span(2.0, 10.0, log=True), "objective.gamma_beta_ratio": Span(0.0, 1.0)},
    "cpo": {"objective.beta": Span(0.01, 0.1, log=True)},
    "sft": {},
}
_WITH_LIKELIHOOD = ("orpo", "sft", "cpo")
_LEARNING_RATES = {
    ("lora", True): Span(2e-5, 4e-4, log=True),
    ("lora", False): Span(1e-6, 1e-4, log=True),
    ("none", True): Span(2e-7, 1e-5, log=True),
    ("none", False): Span(2e-8, 2e-6, log=True),
}
"""By adapter kind, and whether the loss has a likelihood term, which holds the text together at higher rates."""


@dataclass(frozen=True)
class Space:
    """The range of each searched field, and the stage that they are fields of, None where the run has none."""

    domains: dict[str, Domain]
    stage: int | None = None


def resolve(config: RunConfig, announce: Callable[[str], None]) -> Space:
    """What to vary. Raises ConfigError where one of the values makes no valid run."""
    search = settings_of(config)
    domains = search.domains
    if not domains:
        domains = _defaults(config)
        announce("search.space: " + "; ".join(f"{name} {_shown(domain)}" for name, domain in domains.items()))
    # In one order however they are written: draws and grids go by it.
    domains = dict(sorted(domains.items()))
    space = Space(domains, int(next(iter(domains)).split(".")[1]) if config.stages else None)
    for values in probes(config, space):
        trial_config(config, space, values, config.name)
    return space


def settings_of(config: RunConfig) -> SearchConfig:
    """The search section, or its defaults where the config has none."""
    return config.search or SearchConfig()


def trial_config(config: RunConfig, space: Space, values: dict[str, Any], name: str) -> RunConfig:
    """The run that tries `values`: the config itself, or one stage of it, under a name of its own."""
    changed = with_values(config, values)
    if space.stage is not None:
        changed = stage_configs(changed)[space.stage]
    # Always under Ray Train, where a trial finds its room; one worker would otherwise train in the trial's process.
    return changed.model_copy(update={"name": name, "scale": changed.scale.model_copy(update={"ray": True})})


def with_values(config: RunConfig, values: dict[str, Any]) -> RunConfig:
    """The config with searched fields set, and no search. Raises ConfigError where they make no valid run."""
    tree = dump(config) | {"search": None}
    for field, value in values.items():
        set_dotted(tree, parse_override(f"{field}=")[0], value)
    return build(RunConfig, tree, {(): "search.space"})


def grid_points(domains: dict[str, Domain]) -> list[dict[str, Any]]:
    """Every combination of the values of a grid, the last field running fastest."""
    lists = [domain.values for domain in domains.values() if isinstance(domain, Options)]
    return [dict(zip(domains, point, strict=True)) for point in product(*lists)]


def _defaults(config: RunConfig) -> dict[str, Domain]:
    kind, prefix, shown = config.objective.kind, "", config
    if config.stages:
        shown = stage_configs(config)[-1]
        kind, prefix = shown.objective.kind, f"stages.{len(config.stages) - 1}."
    rate = _LEARNING_RATES[shown.adapter.kind, kind in _WITH_LIKELIHOOD]
    fields: dict[str, Span] = {**_WEIGHTS[kind], "training.learning_rate": rate}
    return {prefix + name: span for name, span in fields.items()}


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
