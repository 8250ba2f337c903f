"""What each optimizer asks of the rest of a config, and why."""

from dataclasses import dataclass

from orpo_ray.config.model import AdapterConfig
from orpo_ray.config.training import DeepSpeedConfig, GaloreConfig, ScaleConfig, TrainingConfig

_BLOCKS = "keeps its state in 8-bit blocks"
_WHOLE = "keeps its state by whole parameters"
_EIGHT_BITS = 1 + 4 / 256
"""bitsandbytes: a byte for each number, and a float32 scale for a block of 256."""


@dataclass(frozen=True, kw_only=True)
class OptimizerKind:
    """What others need to know of an optimizer."""

    unsharded: str = ""
    """What it does that ZeRO cannot share out, as a clause; empty if ZeRO can."""
    state_bytes: float = 8
    """Bytes of state for each trained parameter, but for those that GaLore projects."""
    embedding_bytes: float | None = None
    """Those of an embedding's, if others: transformers has bitsandbytes keep 32 bits there."""
    package: str = ""
    """The package that it needs, if that is not always installed."""
    has_schedule: bool = False
    """Whether it does without a schedule of the learning rate."""
    is_galore: bool = False
    needs_gpu: bool = False

    def whole_bytes(self, numbers: float, embeddings: float) -> float:
        """Bytes of state for trained numbers, so many of them in embeddings, none projected."""
        own = self.state_bytes if self.embedding_bytes is None else self.embedding_bytes
        return self.state_bytes * (numbers - embeddings) + own * embeddings

    def projected_bytes(self, rows: int, columns: int, rank: int) -> float:
        """Bytes of state for a matrix that GaLore projects to a rank.

        They are the moments of the projected gradient, and the projection itself in float32.
        """
        shorter, longer = sorted((rows, columns))
        return min(rank, shorter) * (self.state_bytes * longer + 4 * shorter)


OPTIMIZERS = {
    "adamw": OptimizerKind(),
    "adamw-8bit": OptimizerKind(unsharded=_BLOCKS, state_bytes=2 * _EIGHT_BITS, embedding_bytes=8),
    "paged-adamw": OptimizerKind(unsharded=_WHOLE),
    "paged-adamw-8bit": OptimizerKind(
        unsharded=_BLOCKS, state_bytes=2 * _EIGHT_BITS, embedding_bytes=8
    ),
    "lion": OptimizerKind(unsharded=_WHOLE, state_bytes=4),
    "lion-8bit": OptimizerKind(unsharded=_BLOCKS, state_bytes=_EIGHT_BITS, embedding_bytes=4),
    "paged-lion": OptimizerKind(unsharded=_WHOLE, state_bytes=4),
    "paged-lion-8bit": OptimizerKind(unsharded=_BLOCKS, state_bytes=_EIGHT_BITS, embedding_bytes=4),
    "ademamix": OptimizerKind(unsharded=_WHOLE, state_bytes=12),
    "ademamix-8bit": OptimizerKind(
        unsharded=_BLOCKS, state_bytes=3 * _EIGHT_BITS, embedding_bytes=12
    ),
    "paged-ademamix": OptimizerKind(unsharded=_WHOLE, state_bytes=12),
    "paged-ademamix-8bit": OptimizerKind(
        unsharded=_BLOCKS, state_bytes=3 * _EIGHT_BITS, embedding_bytes=12
    ),
    "schedule-free-adamw": OptimizerKind(
        unsharded="averages whole weights", package="schedulefree", has_schedule=True
    ),
    "galore-adamw": OptimizerKind(
        unsharded="projects the gradients of whole matrices",
        package="galore-torch",
        is_galore=True,
    ),
    "galore-adamw-8bit": OptimizerKind(
        unsharded="projects the gradients of whole matrices",
        state_bytes=2 * _EIGHT_BITS,
        package="galore-torch",
        is_galore=True,
        needs_gpu=True,
    ),
}
"""By the names that `training.optimizer` takes."""


def refuse_optimizer(
    training: TrainingConfig, adapter: AdapterConfig, scale: ScaleConfig
) -> str | None:
    """Why the optimizer does not fit the other settings; None if it does."""
    name, kind = training.optimizer, OPTIMIZERS[training.optimizer]
    stage = scale.deepspeed.stage if isinstance(scale.deepspeed, DeepSpeedConfig) else 0
    if kind.unsharded and stage > 0:
        return (
            f"training.optimizer: {name} {kind.unsharded}, which ZeRO stage {stage} cannot split; "
            "set scale.deepspeed=none, or training.optimizer=adamw"
        )
    if kind.has_schedule and training.schedule != "constant":
        return (
            f"training.schedule: {name} averages the weights in place of a schedule; set "
            "training.schedule=constant (training.warmup is its own)"
        )
    return _refuse_galore(training, adapter)


def _refuse_galore(training: TrainingConfig, adapter: AdapterConfig) -> str | None:
    name = training.optimizer
    if not OPTIMIZERS[name].is_galore:
        if training.galore != GaloreConfig():
            return f"training.galore: {name} reads none of it; set training.optimizer=galore-adamw"
        return None
    if adapter.kind != "none":
        return (
            f"training.optimizer: {name} trains whole weights through gradients of low rank, and "
            "an adapter has a low rank already; set adapter.kind=none with "
            "model.quantization=none, or training.optimizer=adamw"
        )
    if training.weight_decay:
        return f"training.weight_decay: {name} decays no weights here; set it to 0"
    return None
