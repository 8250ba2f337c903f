"""Which objectives each engine computes, and in which form: TRL's definitions are not always the papers'."""

from orpo_ray.config.model import AdapterConfig
from orpo_ray.config.objectives import (
    AnyObjectiveConfig,
    CpoConfig,
    DpoConfig,
    IpoConfig,
    KtoConfig,
    OrpoConfig,
    SftConfig,
)
from orpo_ray.config.training import TrainingConfig


def refuse_engine(objective: AnyObjectiveConfig, training: TrainingConfig, adapter: AdapterConfig) -> str | None:
    """Why the engine that was asked for does not compute the objective as it is set, or None where it does."""
    if training.engine == "fast":
        kto = "objective.kind: kto is computed by TRL's trainer; set training.engine=trl"
        return kto if isinstance(objective, KtoConfig) else None
    if training.layout not in ("auto", "padded"):
        return f"training.layout: TRL's trainers pad; {training.layout} needs training.engine=fast"
    if isinstance(objective, KtoConfig) and adapter.kind == "none":
        return "adapter.kind: TRL's KTO compares with the model below the adapter; none has no such model"
    difference = _other_definition(objective)
    return f"{difference}, or training.engine=fast" if difference else None


def _other_definition(objective: AnyObjectiveConfig) -> str | None:
    """What TRL means by an objective where that is not what the config says."""
    if isinstance(objective, SftConfig):
        return "objective.kind: the trainers that TRL brings to pairs have no sft; use another objective"
    if isinstance(objective, OrpoConfig) and objective.nll_on != "full":
        return "objective.nll_on: TRL's ORPO takes the likelihood over prompt and response; set full"
    if isinstance(objective, CpoConfig) and objective.nll_on != "response":
        return "objective.nll_on: TRL's CPO takes the likelihood over the response; set response"
    if isinstance(objective, IpoConfig) and objective.log_probs != "token-mean":
        return "objective.log_probs: TRL's IPO takes means over tokens; set token-mean"
    if isinstance(objective, DpoConfig) and (objective.nll_weight or objective.label_smoothing):
        return "objective: TRL's DPO has neither nll_weight nor label_smoothing in this form; set them to 0"
    return None
