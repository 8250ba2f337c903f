"""How the weights are trained, and on how many workers."""

from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from orpo_ray.config.plain_yaml import shown
from orpo_ray.config.section import Section

Steps = Annotated[int, Field(ge=1, strict=True)]
Fraction = Annotated[float, Field(gt=0, le=1, strict=True)]
Every = Steps | Fraction

_AN_EVENT = "a whole number of steps (1 or more), or a share of the run (above 0, at most 1.0)"
_A_WARMUP = "a whole number of steps (0 or more), or a share of the run (0 or more, below 1.0)"
_NO_TRACKERS = {
    "none": "no tracker; write [] for none",
    "tensorboard": "it is always on, so it is not listed here; remove it",
}


def every_to_steps(every: int | float, total_steps: int) -> int:
    """Steps between two events: `every` if whole, else that fraction of the run, at least 1."""
    return every if isinstance(every, int) else max(1, round(every * total_steps))


def warmup_steps(warmup: int | float, total_steps: int) -> int:
    """Steps of warm-up.

    A fraction is rounded down: the first step of a warm-up has rate 0, which a short run cannot
    afford.
    """
    return warmup if isinstance(warmup, int) else int(warmup * total_steps)


class GaloreConfig(Section):
    """GaLore (arXiv:2403.03507): gradients of the body's linear layers, projected to a low rank."""

    rank: PositiveInt = Field(128, description="of the projected gradients")
    update_every: PositiveInt = Field(
        200, description="steps between two projections, which are found anew from a gradient"
    )
    scale: PositiveFloat = Field(0.25, description="what the update of such a layer is scaled by")


class TrainingConfig(Section):
    """Optimisation, evaluation and checkpoints of a run."""

    learning_rate: PositiveFloat | None = Field(
        None,
        description="the highest of the schedule; null: a usual one for the objective and the "
        "adapter (2e-4 for orpo with LoRA)",
    )
    pairs_per_step: PositiveInt = Field(
        64, description="the global batch, whatever the number of GPUs"
    )
    tokens_per_microbatch: Literal["auto"] | PositiveInt = Field(
        "auto",
        description="auto: what fits; with engine: fast it changes memory, not results",
    )
    memory_limit: PositiveFloat | None = Field(
        None,
        description="GB that a worker uses at most, of its GPU or else of the machine; null: what "
        "is free",
    )
    epochs: PositiveInt | PositiveFloat | None = Field(
        None, description="passes over the pairs, such as 1.5; 1 unless max_steps is set"
    )
    max_steps: PositiveInt | None = Field(None, description="optimizer steps, in place of epochs")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="of the learning rate, after the warm-up"
    )
    warmup: (
        Annotated[int, Field(ge=0, strict=True)] | Annotated[float, Field(ge=0, lt=1, strict=True)]
    ) = Field(0.1, description="steps if whole, else a fraction of the run")
    weight_decay: float = Field(0.0, ge=0, description="the optimizer's, apart from the gradient")
    max_grad_norm: float = Field(1.0, ge=0, description="0: no clipping")
    optimizer: Literal[
        "adamw",
        "adamw-8bit",
        "paged-adamw",
        "paged-adamw-8bit",
        "lion",
        "lion-8bit",
        "paged-lion",
        "paged-lion-8bit",
        "ademamix",
        "ademamix-8bit",
        "paged-ademamix",
        "paged-ademamix-8bit",
        "schedule-free-adamw",
        "galore-adamw",
        "galore-adamw-8bit",
    ] = Field(
        "adamw",
        description="8bit: state in 8 bits; paged: its state may leave the GPU; galore: gradients "
        "of low rank, for `adapter.kind: none`",
    )
    galore: GaloreConfig = Field(
        GaloreConfig(), description="settings of the galore optimizers; others read none of them"
    )
    gradient_checkpointing: Literal["auto"] | bool = Field(
        "auto",
        description="recompute activations in the backward pass; auto: if memory is short",
    )
    eval_every: Every = Field(0.1, description="steps if whole, else a fraction of the run")
    samples: int = Field(
        3,
        ge=0,
        description="held-out prompts, drawn by the seed, that the model answers at each "
        "evaluation, for samples.jsonl; 0: none. They change nothing in training",
    )
    checkpoint_every: Every = Field(0.1, description="steps if whole, else a fraction of the run")
    keep: PositiveInt = Field(2, description="checkpoints kept: the best one and the newest")
    adapter_from: Literal["last", "best"] = Field(
        "last",
        description="the checkpoint that the adapter is taken from; best: by held-out accuracy, "
        "and if that is equal by margin",
    )
    seed: int = Field(
        42,
        ge=0,
        lt=2**32,
        description="of data order, the first weights of the adapter, and dropout",
    )
    layout: Literal["auto", "padded", "packed", "shared-prefix"] = Field(
        "auto", description="how pairs stand in a micro-batch; speed and memory, not results"
    )
    engine: Literal["fast", "trl"] = Field(
        "fast", description="trl: stock TRL computes the loss, padded"
    )
    trackers: tuple[Literal["wandb", "mlflow"], ...] = Field(
        (), description="added to TensorBoard, which is always on"
    )

    trl_metric_names: bool = Field(
        False,
        description="report TRL's names too, to TensorBoard and the trackers, so that its curves "
        "and ours overlay; sft: nll_loss only; engine trl: metrics of held-out pairs only",
    )

    @field_validator("warmup", "eval_every", "checkpoint_every", mode="wrap")
    @classmethod
    def _steps_or_a_share(cls, value: Any, read: Any, field: ValidationInfo) -> Any:
        try:
            return read(value)
        except ValidationError:
            allowed = _A_WARMUP if field.field_name == "warmup" else _AN_EVENT
            raise ValueError(f"must be {allowed}, not {shown(value)}") from None

    @field_validator("trackers", mode="before")
    @classmethod
    def _tensorboard_is_no_tracker(cls, trackers: Any) -> Any:
        for name in trackers if isinstance(trackers, list | tuple) else ():
            if isinstance(name, str) and name in _NO_TRACKERS:
                raise ValueError(f"{name}: {_NO_TRACKERS[name]}")
        return trackers

    @model_validator(mode="after")
    def _the_best_is_kept(self) -> Self:
        if self.adapter_from == "best" and self.keep < 2:
            raise ValueError("keep: 1 keeps the newest checkpoint only; adapter_from: best needs 2")
        return self

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if self.epochs is not None and self.max_steps is not None:
            raise ValueError(
                "epochs and max_steps both set the length of the run; keep one of them, or unset "
                "one with an override such as training.epochs=null"
            )
        return self


class DeepSpeedConfig(Section):
    """A ZeRO stage that the user names."""

    stage: Annotated[int, Field(ge=0, le=3, strict=True)] = Field(
        description="what the workers share out: 0 nothing, 1 optimizer state, 2 gradients too, "
        "3 weights too"
    )


class ScaleConfig(Section):
    """Workers of a run: how many, what each holds, and how they share the work."""

    workers: Literal["auto"] | PositiveInt = Field(
        "auto", description="auto: every GPU in sight, or two CPU workers if there is none"
    )
    ray: bool = Field(False, description="use Ray Train for a single worker too")
    gpus_per_worker: Literal["auto"] | Annotated[float, Field(ge=0, le=1)] = Field(
        "auto",
        description="a worker uses one GPU, a part of one, or none; auto: one if there are GPUs",
    )
    cpus_per_worker: Literal["auto"] | PositiveFloat = Field(
        "auto",
        description="whole or in parts, with four decimals at most; auto: 1, or an equal part of "
        "a machine without GPUs that a run has for itself",
    )
    deepspeed: Literal["auto", "none"] | DeepSpeedConfig = Field(
        "auto", description="none: DDP; a section {stage: 0} to {stage: 3}: ZeRO"
    )
    max_failures: int = Field(3, ge=0, description="lost workers a run survives")
    queue_timeout: float = Field(
        600.0,
        ge=0,
        description="seconds that a run waits if others use the CPUs or GPUs that it needs",
    )

    @property
    def least_cpus(self) -> float:
        """CPUs that a worker must have."""
        return 1.0 if self.cpus_per_worker == "auto" else self.cpus_per_worker

    @field_validator("cpus_per_worker")
    @classmethod
    def _ray_counts_four_decimals(cls, cpus: float | str) -> float | str:
        if isinstance(cpus, float) and round(cpus, 4) != cpus:
            raise ValueError(
                f"{cpus:g} has more than four decimals, which Ray does not count; round it"
            )
        return cpus

    @model_validator(mode="after")
    def _a_part_of_a_gpu_serves_one_worker(self) -> Self:
        if self.gpus_per_worker != "auto" and 0 < self.gpus_per_worker < 1 and self.workers != 1:
            raise ValueError(
                f"gpus_per_worker: {self.gpus_per_worker:g} makes workers share a GPU, which NCCL "
                "does not allow; set gpus_per_worker=1, or workers=1"
            )
        return self
