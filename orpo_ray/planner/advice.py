"""ORPO in one stage, or SFT and then DPO: a rule with its source, and how to find out."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from orpo_ray.planner.contest import Contest
from orpo_ray.planner.interval import Interval
from orpo_ray.planner.roads import Roads

FEW_PAIRS = 5_000
"""Fewer pairs than this teach a base little of how to answer: see `_SOURCES`."""
_CHAT_WORDS = frozenset(
    {"instruct", "chat", "it", "zephyr", "sft", "dpo", "orpo", "rlhf", "assistant"}
)
_BASE_WORDS = frozenset({"base", "pt", "pretrained"})
"""Words of a base's name that say that it has been taught to chat, or that it has not."""
_SOURCES = {
    "orpo": "arXiv:2403.07691 aligns bases in one stage with 61,135 pairs of UltraFeedback",
    "sft": "arXiv:2305.18290 starts DPO from a model that SFT has trained on the chosen answers",
    "kto": "arXiv:2402.01306 aligns with answers that have a label each, and no counterpart",
    "few": "arXiv:2305.11206 (LIMA) makes a base chat with 1,000 careful answers, by SFT alone",
}


@dataclass(frozen=True)
class Advice:
    """What to train, why, where the rule is from, and how to check it on the own data."""

    method: str
    reason: str
    source: str
    check: str


def is_chat_model(name: str, has_template: bool | None) -> bool | None:
    """Whether a base can chat: its name says it, or no template says that it cannot.

    A template alone says nothing, because pre-trained bases of Qwen bring one, too. None: unknown.
    """
    words = set(re.split(r"[^a-z0-9]+", name.rstrip("/").rpartition("/")[2].lower()))
    if words & _CHAT_WORDS:
        return True
    return False if words & _BASE_WORDS or has_template is False else None


def has_template(folder: Path | None) -> bool | None:
    """Whether the files of a base's tokenizer bring a chat template; None if none of them is here.

    `folder` has the base's files, or those that were fetched from the hub.
    """
    if folder is None:
        return None
    if (folder / "chat_template.jinja").is_file():
        return True
    try:
        written = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # a run says what is wrong with it
    return isinstance(written, dict) and bool(written.get("chat_template"))


def advise(
    pairs: int | None,
    is_chat: bool | None,
    roads: Roads | None = None,
    contest: Contest | None = None,
    *,
    budget: float | None = None,
    has_pairs: bool = True,
) -> Advice:
    """What suits this data and this base, for a budget in hours if there is one."""
    if not has_pairs:
        return Advice(
            "KTO",
            "it alone reads single answers with a label" + _late("kto", roads, budget),
            _SOURCES["kto"],
            "to know what it gained: orpo-ray evaluate compares the held-out answers with the base",
        )
    check = _check(contest)
    if is_chat:
        return Advice(
            "DPO alone, at a low rate; ORPO as a second try",
            "the base can chat already, and ORPO's likelihood term would teach it again how to "
            "answer" + _late("dpo", roads, budget),
            _SOURCES["sft"],
            check,
        )
    if pairs is not None and pairs < FEW_PAIRS:
        return Advice(
            "SFT on the chosen answers first, then DPO",
            f"{pairs:,} pairs are few for a base to learn answering and preferring at once"
            + _late("sft>dpo", roads, budget),
            _SOURCES["few"],
            check,
        )
    return Advice("ORPO", _why_one_stage(is_chat, roads, budget), _SOURCES["orpo"], check)


def _late(method: str, roads: Roads | None, budget: float | None) -> str:
    """The remark that a method does not end within the budget; nothing if it does."""
    hours = None if roads is None else roads.hours.get(method)
    if hours is None or budget is None or hours.middle <= budget:
        return ""
    return f"; it does not end within {budget:g} hours ({_hours(hours)})"


def _check(contest: Contest | None) -> str:
    """How to find out, and what that takes."""
    check = "to know for your data: orpo-ray compare"
    if contest is None:
        return check
    methods, seeds = " and ".join(contest.methods), contest.seeds
    return (
        f"{check} trains {methods} on the same budget, each with {seeds} "
        f"seed{'s' * (seeds > 1)}: {_hours(contest.hours)} on {contest.gpu}"
    )


def _why_one_stage(is_chat: bool | None, roads: Roads | None, budget: float | None) -> str:
    reason = "one stage, no reference"
    if roads is not None:
        one, two = roads.hours["orpo"], roads.hours["sft>dpo"]
        reason += f": {_hours(one)}, and SFT, then DPO {_hours(two)}"
        if budget is not None and two.middle > budget:
            what = "even this does" if one.middle > budget else "two stages would"
            reason += f"; {what} not end within {budget:g} hours"
    if is_chat is None:
        reason += (
            "; is the base instruction-tuned? Neither its name nor its template says it: answer "
            "with --tuned, and DPO alone may do, or with --pretrained"
        )
    return reason


def _hours(found: Interval) -> str:
    low, high = (f"{end:.2g}" if end < 10 else f"{end:,.0f}" for end in (found.low, found.high))
    return f"{low} to {high} hours"
