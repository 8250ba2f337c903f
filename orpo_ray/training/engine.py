"""The engines that compute the loss: our own code, and stock TRL.

Heavy modules are imported only when they are used, because the driver of a run needs no more than
the layout.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orpo_ray.config import RunConfig
from orpo_ray.training.decisions import Decisions
from orpo_ray.training.layout_choice import LayoutChoice
from orpo_ray.training.plan import Layout

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from orpo_ray.training.pair_model import PairModel
    from orpo_ray.training.trainer import PreferenceTrainer


class Engine(ABC):
    """What a run needs to know of the engine that computes its loss."""

    only_layout: LayoutChoice | None = None
    """The one layout that it computes; None if it computes all."""
    untried: str | None = None
    """Why micro-batches are not tried for their memory; None if they are."""

    @abstractmethod
    def model(
        self,
        model: "PeftModel | PreTrainedModel",
        config: RunConfig,
        autocast: "torch.dtype | None",
    ) -> "PairModel":
        """Wrap base and adapter for this engine's trainer.

        Raises ConfigError for a model that the engine cannot compute.
        """

    @abstractmethod
    def trainer(
        self, config: RunConfig, tokenizer: "PreTrainedTokenizerBase", decisions: Decisions
    ) -> "Callable[..., PreferenceTrainer]":
        """What makes the trainer. It takes the arguments of PreferenceTrainer."""


class FastEngine(Engine):
    """Our own code: any layout, log-probs of selected tokens only, micro-batches fit to memory."""

    def model(
        self,
        model: "PeftModel | PreTrainedModel",
        config: RunConfig,
        autocast: "torch.dtype | None",
    ) -> "PairModel":
        """A PairModel, whose head scores selected tokens only."""
        from orpo_ray.training.pair_model import PairModel

        return PairModel(model, autocast)

    def trainer(
        self, config: RunConfig, tokenizer: "PreTrainedTokenizerBase", decisions: Decisions
    ) -> "Callable[..., PreferenceTrainer]":
        """PreferenceTrainer itself."""
        from orpo_ray.training import trainer

        return trainer.PreferenceTrainer


class TrlEngine(Engine):
    """Stock TRL's trainers inside ours, on padded rows, for comparison and for KTO."""

    only_layout = LayoutChoice(Layout.PADDED, "TRL's trainers pad")
    untried = "TRL computes the loss"

    def model(
        self,
        model: "PeftModel | PreTrainedModel",
        config: RunConfig,
        autocast: "torch.dtype | None",
    ) -> "PairModel":
        """A PairModel that also computes TRL's loss."""
        from orpo_ray.training.trl_engine import trl_model

        return trl_model(model, config, autocast)

    def trainer(
        self, config: RunConfig, tokenizer: "PreTrainedTokenizerBase", decisions: Decisions
    ) -> "Callable[..., PreferenceTrainer]":
        """TrlTrainer, a PreferenceTrainer with one of TRL's trainers inside."""
        from orpo_ray.training.arguments import training_arguments
        from orpo_ray.training.trl_engine import TrlTrainer

        def arguments(kind: Any, folder: Path, **own: Any) -> Any:
            return training_arguments(config.training, folder, 1, decisions, kind=kind, **own)

        return partial(
            TrlTrainer, objective_config=config.objective, tokenizer=tokenizer, arguments=arguments
        )


_ENGINES: dict[str, Engine] = {"fast": FastEngine(), "trl": TrlEngine()}


def engine_of(config: RunConfig) -> Engine:
    """The engine that a run names."""
    return _ENGINES[config.training.engine]
