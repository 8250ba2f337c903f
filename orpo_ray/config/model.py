"""The base model and what is trained on top of it."""

from typing import Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from orpo_ray.config.section import Section
from orpo_ray.config.storage import checked_place, is_gguf, is_url

_EVERY_MODULE = ("all", "all_linear")
"""What other trainers call `all-linear`."""
_TAKING_APART = ("olora", "pissa")


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
    rslora: bool = Field(
        False, description="rank-stabilised LoRA: the update is scaled by alpha / sqrt(r)"
    )
    dora: bool = Field(False, description="DoRA: trains magnitude and direction separately")
    init: Literal["default", "loftq", "eva", "olora", "pissa"] = Field(
        "default",
        description="how a new adapter starts; default: A random, B zero; loftq: makes up for the "
        "rounding to 4 bits; eva: from what the layers read; olora, pissa: from the weights",
    )
    lora_plus_ratio: float | None = Field(
        None,
        ge=1,
        le=10_000,
        allow_inf_nan=False,
        description="LoRA+: the learning rate of B is so many times that of A; null: the same",
    )
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

    @property
    def starts_elsewhere(self) -> bool:
        """Whether the model with a new adapter computes otherwise than its base, if only a little.

        OLoRA and PiSSA round what they leave of the base.
        """
        return self.init in ("loftq", *_TAKING_APART)

    @property
    def takes_base_apart(self) -> bool:
        """Whether a part of the base's weights becomes the adapter, and is trained."""
        return self.init in _TAKING_APART

    @property
    def saved_shape(self) -> dict[str, float]:
        """Rank and alpha of the adapter that is saved, which is one for the base as it is.

        To one that takes the base apart, its start is added with a minus: twice the rank at the
        same scale.
        """
        if not self.takes_base_apart:
            return {"r": self.r, "alpha": self.alpha}
        return {"r": 2 * self.r, "alpha": self.alpha * (2**0.5 if self.rslora else 2)}

    @model_validator(mode="after")
    def _full_training_has_no_adapter(self) -> Self:
        if self.kind == "none" and (own := [name for name, value in self._own() if value]):
            have = "has" if len(own) == 1 else "have"
            raise ValueError(
                f"kind: none trains the base itself, so {' and '.join(own)} {have} no meaning; "
                f"remove {'it' if len(own) == 1 else 'them'}"
            )
        if self.targets == ():
            raise ValueError(
                "targets is empty: name modules such as [q_proj, v_proj], or write all-linear"
            )
        return self

    def _own(self) -> list[tuple[str, object]]:
        """Settings that an adapter alone has, with what is asked of each."""
        init = self.init != "default"
        return [
            ("dora", self.dora),
            ("rslora", self.rslora),
            ("init", init),
            ("lora_plus_ratio", self.lora_plus_ratio),
            ("init_from", self.init_from),
        ]

    @model_validator(mode="after")
    def _starts_in_one_way(self) -> Self:
        if self.init != "default" and self.init_from:
            raise ValueError(
                f"init: {self.init} is the start of a new adapter, but init_from names an earlier "
                "one; remove one of them"
            )
        if self.takes_base_apart and self.dropout:
            raise ValueError(
                f"dropout: with init: {self.init} the adapter holds a part of the weights, which "
                "dropout would leave out at random; set dropout=0, or init=default"
            )
        if self.init == "loftq" and self.dora:
            raise ValueError(
                "dora: its magnitudes are those of the base, and init: loftq starts beside it; set "
                "dora=false, or init=default"
            )
        return self


def refuse_start(adapter: AdapterConfig, model: ModelConfig) -> str | None:
    """Why a new adapter cannot start on the base as it is held; None if it can."""
    if adapter.takes_base_apart and model.quantization != "none":
        return (
            f"adapter.init: {adapter.init} takes a part out of the weights, and "
            f"model.quantization={model.quantization} would round what is left anew; set "
            "model.quantization=none, or adapter.init=default"
        )
    if adapter.init == "loftq" and model.quantization != "nf4":
        return (
            "adapter.init: loftq makes up for the rounding to 4 bits; set "
            "model.quantization=nf4, or adapter.init=default"
        )
    return None
