"""Which objectives each engine computes, in which form, and on which turns.

TRL's definitions differ from the papers' for some objectives.
"""

from orpo_ray.config.data import DataConfig
from orpo_ray.config.model import AdapterConfig
from orpo_ray.config.objectives import ObjectiveConfig
from orpo_ray.config.training import TrainingConfig


def refuse_engine(
    objective: ObjectiveConfig, training: TrainingConfig, adapter: AdapterConfig
) -> str | None:
    """Why the chosen engine cannot compute the objective with these settings; None if it can."""
    return _REFUSALS[training.engine](objective, training, adapter)


def _refuse_ours(
    objective: ObjectiveConfig, training: TrainingConfig, adapter: AdapterConfig
) -> str | None:
    if objective.only_in_trl:
        return (
            f"objective.kind: {objective.kind} is computed by TRL's trainer; set "
            "training.engine=trl"
        )
    return None


def _refuse_trls(
    objective: ObjectiveConfig, training: TrainingConfig, adapter: AdapterConfig
) -> str | None:
    if training.layout not in ("auto", "padded"):
        return f"training.layout: TRL's trainers pad; {training.layout} needs training.engine=fast"
    if objective.compares_below_adapter and adapter.kind == "none":
        return (
            f"adapter.kind: TRL's {objective.kind.upper()} compares with the base below the "
            "adapter, and kind: none has no adapter; set adapter.kind=lora"
        )
    found = objective.in_trl()
    return f"{found}, or training.engine=fast" if isinstance(found, str) else None


def refuse_turns(
    data: DataConfig, objective: ObjectiveConfig, training: TrainingConfig
) -> str | None:
    """Why the turns that `data.train_on` names cannot be trained; None if they can."""
    if data.train_on == "last":
        return None
    if training.engine == "trl":
        ours = "" if objective.only_in_trl else ", or training.engine=fast"
        return (
            f"data.train_on: TRL's trainers train whole answers, not {data.train_on}; set "
            f"data.train_on=last{ours}"
        )
    if getattr(objective, "nll_on", "response") == "full":
        return (
            f"data.train_on: with objective.nll_on: full all tokens are trained already, not "
            f"{data.train_on}; set objective.nll_on=response, or data.train_on=last"
        )
    return None


_REFUSALS = {"fast": _refuse_ours, "trl": _refuse_trls}
