"""Where the preference pairs come from, and which of them may be trained on."""

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from orpo_ray.config.section import Section


class Source(Section):
    """One file or hub dataset of preference pairs."""

    source: str = Field(
        min_length=1, description="hub name, or path or URL of .jsonl .json .jsonl.gz .parquet .csv"
    )
    split: str = Field("train", description="split of a hub dataset; files have none")
    config: str | None = Field(
        None, description="configuration (subset) of a hub dataset; the default one if not set"
    )
    revision: str | None = Field(None, description="commit or tag of a hub dataset")
    weight: PositiveFloat = Field(
        1.0, le=1000, description="how often an epoch sees each pair: 2 twice, 0.5 a seeded half"
    )
    limit: PositiveInt | None = Field(
        None, le=2**53, description="at most this many rows, from the start"
    )

    @model_validator(mode="before")
    @classmethod
    def _text_is_the_source(cls, data: Any) -> Any:
        """`train: pairs.jsonl` needs no section."""
        return {"source": data} if isinstance(data, str) else data


class Columns(Section):
    """Names of the columns that hold a pair, for files whose format is not recognised."""

    prompt: str = Field(description="what was asked: text, or chat messages")
    chosen: str | None = Field(None, description="the better answer")
    rejected: str | None = Field(None, description="the worse answer")
    completion: str | None = Field(
        None, description="the only answer, which `label` calls good or bad; for objective.kind=kto"
    )
    label: str | None = Field(None, description="whether the answer in `completion` is good")
    system: str | None = Field(
        None,
        description="text of the system turn; if not set, the column system or system_prompt is "
        "used",
    )

    @model_validator(mode="after")
    def _names_two_answers_or_one(self) -> Self:
        pair, one = (self.chosen, self.rejected), (self.completion, self.label)
        for names, others, what in (
            (pair, one, "chosen and rejected"),
            (one, pair, "completion and label"),
        ):
            if all(names) and not any(others):
                return self
            if any(names) and not any(others):
                raise ValueError(f"name both {what}")
        raise ValueError("name chosen and rejected, or completion and label, and not both pairs")

    @property
    def named(self) -> tuple[str, str, str]:
        """The columns of the prompt and of both answers; or of the prompt, the answer, its label"""
        first, second = self.chosen or self.completion, self.rejected or self.label
        assert first is not None and second is not None
        return self.prompt, first, second


class DataConfig(Section):
    """The pairs of a run."""

    train: tuple[Source, ...] = Field(
        min_length=1, description="sources of the training pairs; a path alone is one"
    )
    eval: tuple[Source, ...] = Field(
        (), description="empty: a seeded share of the training pairs is held out"
    )
    eval_fraction: float = Field(
        0.05, gt=0, lt=1, description="share held out when `eval` is empty"
    )
    max_length: int = Field(2048, ge=8, description="tokens of prompt and answer together")
    max_prompt_length: int = Field(
        1024, ge=4, description="tokens of the prompt; half of max_length unless set"
    )
    overlong: Literal["drop", "truncate-prompt-left", "error"] = Field(
        "drop", description="what to do with a pair beyond these lengths"
    )
    train_on: Literal["last", "all-assistant"] = Field(
        "last",
        description="assistant turns that are trained: the last one, or all of them; all-assistant "
        "also reads answers that part at an earlier turn",
    )
    pairs: Literal["best-worst", "all", "adjacent"] = Field(
        "best-worst",
        description="which scored answers of a row are pairs: the best and the worst, all that "
        "differ, or neighbours in the order of the scores",
    )
    min_margin: float = Field(
        0.0, ge=0, description="scored answers that differ by less are no pair"
    )
    dedup: Literal["exact", "near"] = Field(
        "exact",
        description="exact drops pairs that come twice; near also drops training pairs that are "
        "equal or nearly equal to an evaluation pair",
    )
    bad_rows: Literal["quarantine", "fail"] = Field(
        "quarantine", description="put bad rows aside with their reason, or stop at the first"
    )
    max_bad_fraction: float = Field(
        0.05, ge=0, le=1, description="stop when a larger share of all rows is bad"
    )
    columns: Columns | None = Field(None, description="for files whose format is not recognised")

    @model_validator(mode="before")
    @classmethod
    def _prompt_follows_the_whole(cls, data: Any) -> Any:
        """`max_length` alone is enough: the prompt gets half of it."""
        length = data.get("max_length") if isinstance(data, Mapping) else None
        if not isinstance(length, int) or "max_prompt_length" in data:
            return data
        return {**data, "max_prompt_length": max(4, length // 2)}

    @model_validator(mode="after")
    def _prompt_leaves_room(self) -> Self:
        if self.max_prompt_length >= self.max_length:
            raise ValueError(
                f"max_prompt_length ({self.max_prompt_length}) must be below max_length "
                f"({self.max_length}), or no answer fits"
            )
        return self

    @model_validator(mode="after")
    def _evaluation_has_no_weights(self) -> Self:
        if any(source.weight != 1 for source in self.eval):
            raise ValueError("eval: every evaluation pair counts once; remove weight")
        return self
