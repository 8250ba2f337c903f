"""Which methods to compare, with what budget, and how often. Only `compare` and `plan` read it."""

import re
from typing import Any, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from orpo_ray.config.near import near_name
from orpo_ray.config.objectives import OBJECTIVES
from orpo_ray.config.section import Section

Unit = Literal["pairs", "tokens", "seconds"]
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_TAKEN = re.compile(r"tune|references|pairs-\d+|.*\.(json|html|log)")
"""Names of what a comparison's folder holds besides the folders of its methods."""
_CHANGED = ("model", "adapter", "objective", "training")
_OF_ALL = {
    **dict.fromkeys(
        ("model.base", "model.revision", "model.chat_template"), "all methods train the same base"
    ),
    **dict.fromkeys(("training.epochs", "training.max_steps"), "compare.budget gives the steps"),
}
"""What no method may change of these sections, and why."""
_USUAL: dict[str, dict[str, Any]] = {
    **{
        kind: {
            "objective": {"kind": kind},
            **({"training": {"engine": "trl"}} if settings.only_in_trl else {}),
        }
        for kind, settings in OBJECTIVES.items()
    },
    "orpo-beta": {"objective": {"kind": "orpo", "nll_weight": 0.0}},
}
"""What each method changes of a run. orpo-beta is a second stage: arXiv:2502.01237."""
THEN = ">"
"""Stands between the stages of a method."""


def folder_name(method: str) -> str:
    """The name of the folder of a method."""
    return method.replace(THEN, "-")


class BudgetConfig(Section):
    """How much each method may use, in one of three units."""

    pairs: PositiveInt | None = Field(
        None, description="pairs that are trained; a pass of the reference counts a third of them"
    )
    tokens: PositiveInt | None = Field(
        None, description="tokens that are trained, counted in the same way"
    )
    seconds: PositiveFloat | None = Field(
        None, description="seconds of training, by the speed that a short run of each method shows"
    )

    @model_validator(mode="after")
    def _one_unit(self) -> Self:
        if sum(amount is not None for amount in (self.pairs, self.tokens, self.seconds)) != 1:
            raise ValueError("name one of pairs, tokens and seconds")
        return self

    @property
    def unit(self) -> Unit:
        """What is counted."""
        if self.pairs is not None:
            return "pairs"
        return "tokens" if self.tokens is not None else "seconds"

    def times(self, factor: float) -> Self:
        """The same budget, so many times as large; at least 1."""
        amount = factor * self.amount
        if self.unit == "seconds":
            return type(self)(seconds=amount)
        return type(self).model_validate({self.unit: max(1, round(amount))})

    @property
    def amount(self) -> float:
        """How much of it there is."""
        return float(self.pairs or self.tokens or self.seconds or 0)


class JudgeConfig(Section):
    """A model behind an OpenAI-compatible endpoint that compares answers."""

    endpoint: str = Field(description="its URL, as http://HOST:8000/v1")
    model: str = Field(description="the model that judges, as the endpoint calls it")
    key_file: str | None = Field(None, description="a file that holds the endpoint's key")


class CompareConfig(Section):
    """A tournament of methods on the same base, pairs and budget."""

    methods: tuple[str, ...] = Field(
        ("orpo", "sft>dpo"),
        min_length=1,
        description=f"{', '.join(_USUAL)}, or names of `settings`; a{THEN}b trains two stages",
    )
    budget: BudgetConfig | None = Field(
        None, description="what each method may use of the pairs; one epoch without it"
    )
    seeds: PositiveInt = Field(3, description="runs of each method, with a seed of their own each")
    search: NonNegativeInt = Field(
        0, description="trials that each method gets to find its settings first; not in the budget"
    )
    answers: NonNegativeInt = Field(
        64, description="held-out prompts that every result answers greedily"
    )
    judge: JudgeConfig | None = Field(
        None,
        description="who says whether an answer beats the base's; without one, the words that it "
        "shares with the chosen and the rejected answer",
    )
    settings: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="sections that a method changes, by its name; new names make new methods",
    )

    @model_validator(mode="after")
    def _methods_are_known(self) -> Self:
        known = {**_USUAL, **self.settings}
        folders: dict[str, str] = {}
        for method in self.methods:
            twin = folders.setdefault(folder_name(method), method)
            if twin != method:
                raise ValueError(
                    f"methods: {twin} and {method} have the same folder; give one another name"
                )
        for number, method in enumerate(self.methods):
            if method in self.methods[:number]:
                raise ValueError(f"methods: {method} stands twice")
            for part in method.split(THEN):
                if part not in known:
                    near = near_name(part, known)
                    hint = f"did you mean {near}?" if near else f"known: {', '.join(known)}"
                    raise ValueError(f"methods: no method {part!r}; {hint}")
        if self.judge is not None and not self.answers:
            raise ValueError("judge: there is nothing to judge with answers: 0")
        return self

    @model_validator(mode="after")
    def _settings_change_sections(self) -> Self:
        for name, sections in self.settings.items():
            if not _NAME.fullmatch(name):
                raise ValueError(f"settings: {name} must be letters, digits and . _ -")
            if _TAKEN.fullmatch(name):
                raise ValueError(f"settings: {name} is a name of a comparison's own files")
            for section, content in sections.items():
                if problem := _refuse_section(section, content):
                    raise ValueError(f"settings.{name}.{section}{problem}")
        return self

    def changes(self, part: str) -> dict[str, dict[str, Any]]:
        """The sections that a part of a method changes."""
        changed = dict(_USUAL.get(part, {}))
        for section, content in self.settings.get(part, {}).items():
            changed[section] = {**changed.get(section, {}), **content}
        return changed


def _refuse_section(section: str, content: Any) -> str | None:
    """What is wrong with a section that a method changes, or None."""
    if section not in _CHANGED:
        near = near_name(section, _CHANGED)
        hint = f"did you mean {near}?" if near else f"they are {', '.join(_CHANGED)}"
        return f": no section that a method may change; {hint}"
    if not isinstance(content, dict):
        return f": must be a section, not {content!r}"
    for key in content:
        if why := _OF_ALL.get(f"{section}.{key}"):
            return f".{key}: {why}; leave it out"
    return None
