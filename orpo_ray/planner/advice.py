"""ORPO in one stage, or SFT and then DPO: a rule with its source, and how to find out."""

from dataclasses import dataclass

from orpo_ray.planner.interval import Interval

FEW_PAIRS = 5_000
"""Fewer pairs than this teach a base little of how to answer: see `_SOURCES`."""
_CHAT_NAMES = ("instruct", "chat", "-it", "zephyr", "-sft", "-dpo", "rlhf", "assistant")
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
    """Whether a base is instruction-tuned, by its name and its template; None if neither says."""
    if any(word in name.lower() for word in _CHAT_NAMES):
        return True
    return False if has_template is False else None


def advise(
    pairs: int | None,
    is_chat: bool | None,
    hours: Interval | None,
    budget: float | None,
    *,
    has_pairs: bool = True,
) -> Advice:
    """What suits this data and this base, for a budget in hours if there is one."""
    check = (
        "to know for your data, train both (examples/sft-then-dpo) and compare them: "
        "orpo-ray evaluate on the same held-out pairs"
    )
    if not has_pairs:
        return Advice(
            "KTO",
            "it alone reads single answers with a label",
            _SOURCES["kto"],
            "to know what it gained: orpo-ray evaluate compares the held-out answers with the base",
        )
    if is_chat:
        return Advice(
            "DPO alone, at a low rate; ORPO as a second try",
            "the base can chat already, and ORPO's likelihood term would teach it again how to "
            "answer",
            _SOURCES["sft"],
            check,
        )
    if pairs is not None and pairs < FEW_PAIRS:
        return Advice(
            "SFT on the chosen answers first, then DPO",
            f"{pairs:,} pairs are few for a base to learn answering and preferring at once",
            _SOURCES["few"],
            check,
        )
    short = budget is not None and hours is not None and hours.middle * 2 > budget
    reason = "one stage, no reference: about half of the time of SFT and then DPO"
    if short:
        reason += f", and two stages would not end within {budget:g} hours"
    return Advice("ORPO", reason, _SOURCES["orpo"], check)
