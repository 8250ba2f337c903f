"""How much each searched setting matters, by PED-ANOVA (arXiv:2304.10255)."""

from collections.abc import Mapping, Sequence
from typing import Any

from orpo_ray.config.space import Domain, Options

FEWEST = 8
"""With fewer trials the shares say nothing."""
_TOP = 0.34
"""What sets the best trials apart is asked of this share of them."""


def importances(
    domains: Mapping[str, Domain], trials: Sequence[tuple[Mapping[str, Any], float]]
) -> dict[str, float]:
    """Each setting's share of what sets the best third of the trials apart, the largest first.

    `trials` has the values of each and its score, higher is better. Empty for fewer than FEWEST
    trials, for one setting, and if all scores are equal.
    """
    known = [trial for trial in trials if _hold(domains, trial[0])]
    if len(known) < FEWEST or len(domains) < 2 or len({score for _, score in known}) < 2:
        return {}
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(direction="maximize")
    distributions: dict[str, Any] = {
        name: optuna.distributions.CategoricalDistribution(tuple(range(len(domain.values))))
        if isinstance(domain, Options)
        else optuna.distributions.FloatDistribution(0.0, 1.0)
        for name, domain in domains.items()
    }
    study.add_trials(
        [
            optuna.trial.create_trial(
                params={name: _place(domain, values[name]) for name, domain in domains.items()},
                distributions=distributions,
                value=score,
            )
            for values, score in known
        ]
    )
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=_TOP)
    found = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _hold(domains: Mapping[str, Domain], values: Mapping[str, Any]) -> bool:
    """Whether the ranges hold the values: given ones may lie outside."""
    return all(
        values.get(name) in domain.values
        if isinstance(domain, Options)
        else domain.holds(values.get(name))
        for name, domain in domains.items()
    )


def _place(domain: Domain, value: Any) -> Any:
    """A value as a number that Optuna takes: its place in the list, or in the range."""
    return domain.values.index(value) if isinstance(domain, Options) else domain.share(value)
