"""What the Trainer's optimizers need besides being made: rates, targets, weights for use."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.optimizers import create_loraplus_optimizer
from torch import nn
from torch.optim import Optimizer
from transformers import TrainingArguments

from orpo_ray.errors import ConfigError


def lora_plus(
    model: nn.Module, args: TrainingArguments, chosen: tuple[Any, dict[str, Any]], ratio: float
) -> Optimizer:
    """An optimizer with `ratio` times the learning rate for B (LoRA+, arXiv:2402.12354).

    `chosen` are the class and the settings that the Trainer would take. The magnitudes of DoRA are
    trained as B is, and adapters of embeddings as A.
    """
    kind, settings = chosen
    rate = settings.pop("lr")
    made: Any = create_loraplus_optimizer(
        model,  # type: ignore[arg-type]  # it asks for names and modules only
        kind,
        lr=rate,
        loraplus_lr_ratio=ratio,
        loraplus_lr_embedding=rate,
        **{"loraplus_weight_decay": args.weight_decay, **settings},
    )
    # DeepSpeed would drop an empty group, and the schedule give its rate to the next.
    made.param_groups = [group for group in made.param_groups if group["params"]]
    optimizer: Optimizer = made
    return optimizer


def galore(
    make: Callable[[], Optimizer], args: TrainingArguments, body: nn.Module, model: nn.Module
) -> Optimizer:
    """GaLore on every linear layer of the body, as AdapterConfig's `all-linear` means it."""
    linear = set(projected_layers(body))
    args.optim_target_modules = [name for name, module in model.named_modules() if module in linear]
    if not linear:
        raise ConfigError(
            "training.optimizer: GaLore projects linear layers, and this base has none of "
            "PyTorch's; set training.optimizer=adamw"
        )
    with warnings.catch_warnings():
        # Its AdamW calls itself deprecated, as that of transformers from which it was copied.
        warnings.filterwarnings("ignore", "This implementation of AdamW", FutureWarning)
        return mended(make())


def projected_layers(body: nn.Module) -> list[nn.Linear]:
    """The layers whose gradients GaLore projects."""
    return [module for module in body.modules() if isinstance(module, nn.Linear)]


def trained_embeddings(model: nn.Module) -> list[torch.Tensor]:
    """The embeddings that are trained whole, for which 8-bit optimizers keep 32 bits."""
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    return [each.weight for each in tables if each.weight.requires_grad]


def mended(optimizer: Any) -> Optimizer:
    """A GaLore optimizer with the settings that it was meant to have.

    Its 8-bit one would decay weights by 0.01. It also passes two settings by position that
    bitsandbytes has dropped since, so that they mean others: a limit of each update by the size of
    the weight, which is 0 where GaLore has it computed, and layers of few numbers would not move.
    """
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    own = getattr(optimizer, "args", None)
    if own is not None:
        own.max_unorm, own.skip_zeros = 0.0, False
    made: Optimizer = optimizer
    return made


@contextmanager
def averaged_weights(optimizer: Any) -> Iterator[None]:
    """Have the weights that are for use in the model; a schedule-free optimizer averages them.

    Those that training goes on from come back afterwards, to the last bit: going back by the
    optimizer's own formula would round them. Other optimizers train the weights that are for use.
    """
    if not is_averaging(optimizer):
        yield
        return
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    before = [parameter.detach().clone() for parameter in trained]
    optimizer.eval()
    try:
        yield
    finally:
        optimizer.train()
        with torch.no_grad():
            for parameter, value in zip(trained, before, strict=True):
                parameter.copy_(value)


def is_averaging(optimizer: Any) -> bool:
    """Whether an optimizer trains other weights than those that are for use."""
    return "train_mode" in optimizer.param_groups[0]
