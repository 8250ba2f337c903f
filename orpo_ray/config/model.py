"""The base model and what is trained on top of it."""

from typing import Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from orpo_ray.config.section import Section
from orpo_ray.config.storage import checked_place, is_gguf, is_url

_EVERY_MODULE = ("all", "all_linear")
"""What other trainers call `all-linear`."""


class ModelConfig(Section):
    """The base model, how memory holds its weights, and how it reads a conversation."""

    base: str = Field(
        min_length=1, description="hub name, folder, GGUF file, or s3://bucket/folder"
    )
    revision: str | None = Field(None, description="commit or tag of a hub model")
    quantization: Literal["nf4", "int8", "none"] = Field(
        "nf4", description="how the frozen weights are held; nf4: four bits (QLoRA)"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="number format; auto: bfloat16 if the GPU computes it, float32 on a CPU"
    )
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = Field(
        "auto",
        description="how padded rows are computed; auto: the best that is installed",
    )
    chat_template: str | None = Field(
        None,
        description="in place of the base's own: plain, chatml, llama3, gemma, mistral, qwen3, "
        "phi3, or the path of a Jinja file",
    )

    @field_validator("base")
    @classmethod
    def _base_is_no_other_url(cls, base: str) -> str:
        if is_gguf(base) and is_url(base):
            raise ValueError("a GGUF file is read from a folder; copy it to the servers")
        return checked_place(base)


class AdapterConfig(Section):
    """The trained part: a LoRA adapter, or every weight of the base (`kind: none`)."""

    kind: Literal["lora", "none"] = Field(
        "lora", description="none: every weight of the base is trained"
    )
    r: PositiveInt = Field(16, description="rank")
    alpha: PositiveFloat = Field(16, description="the update is scaled by alpha / r")
    dropout: float = Field(0.05, ge=0, lt=1, description="share of inputs left out in training")
    targets: Literal["all-linear"] | tuple[str, ...] = Field(
        "all-linear", description="module names; all-linear: every linear layer of the body"
    )
    dora: bool = Field(False, description="DoRA: trains magnitude and direction separately")
    init_from: str | None = Field(
        None, description="adapter folder, or a finished run, to start from; s3:// too"
    )

    @field_validator("init_from")
    @classmethod
    def _adapter_is_no_other_url(cls, init_from: str | None) -> str | None:
        return init_from if init_from is None else checked_place(init_from)

    @field_validator("targets")
    @classmethod
    def _all_is_no_module(cls, targets: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if len(targets) == 1 and targets[0] in _EVERY_MODULE:
            raise ValueError(f"{targets[0]} is no module; write all-linear for every linear layer")
        return targets

    @model_validator(mode="after")
    def _full_training_has_no_adapter(self) -> Self:
        if self.kind == "none" and (self.dora or self.init_from):
            raise ValueError(
                "kind: none trains the base itself, so dora and init_from have no meaning; remove "
                "them"
            )
        if self.targets == ():
            raise ValueError(
                "targets is empty: name modules such as [q_proj, v_proj], or write all-linear"
            )
        return self
