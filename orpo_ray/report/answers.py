"""Answers of a model to the same prompts, in the order in which it learnt, and what ails them."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from orpo_ray.report.page import Asked, Said
from orpo_ray.report.thin import spaced

MOST_STEPS = 12
"""Answers to a prompt, at equal distances over the run. More nobody reads."""
_REPEATED = re.compile(r"(\S.{2,80}?)(?:\s*\1){3,}", re.DOTALL)
"""The same piece of text four times in a row."""


def is_broken(sample: Mapping[str, Any]) -> bool:
    """Whether an answer did not end by itself, says nothing, or repeats itself."""
    text = str(sample["answer"])
    return _does_not_end(sample) or not text.strip() or bool(_REPEATED.search(text))


def _does_not_end(sample: Mapping[str, Any]) -> bool:
    """Whether an answer goes on where it should have ended.

    One that was cut may have been on its way to an end, if the chosen answer of the data is longer.
    """
    is_cut = sample.get("ended") is False
    return is_cut and len(str(sample["answer"])) >= len(_text(sample.get("chosen") or ""))


def broken_share(samples: Iterable[Mapping[str, Any]]) -> float | None:
    """The share of broken answers at the last step that has any; None without answers."""
    rows = list(samples)
    if not rows:
        return None
    last = max(int(row["step"]) for row in rows)
    found = [is_broken(row) for row in rows if int(row["step"]) == last]
    return sum(found) / len(found)


def over_steps(samples: Iterable[Mapping[str, Any]]) -> tuple[Asked, ...]:
    """Each prompt with the answers at every step, and the chosen answer of the data at the end."""
    by_prompt: dict[str, list[Mapping[str, Any]]] = {}
    for row in samples:
        by_prompt.setdefault(str(row.get("id", row["prompt"])), []).append(row)
    return tuple(
        Asked(_text(rows[0]["prompt"]), (*_by_step(rows), *_chosen(rows[0])))
        for rows in by_prompt.values()
    )


def _by_step(rows: list[Mapping[str, Any]]) -> list[Said]:
    """One answer for each step that is shown: a resumed run may have written some twice."""
    latest = {int(row["step"]): row for row in rows}
    return [
        Said(who=_when(step), text=_text(row["answer"]), note=_note(row))
        for step, row in spaced(sorted(latest.items()), MOST_STEPS)
    ]


def _when(step: int) -> str:
    return "before training" if step == 0 else f"step {step}"


def _note(row: Mapping[str, Any]) -> str:
    if _does_not_end(row):
        return "did not end"
    if is_broken(row):
        return "repeats or is empty"
    return "cut" if row.get("ended") is False else ""


def _chosen(row: Mapping[str, Any]) -> list[Said]:
    text = _text(row.get("chosen") or "")
    return [Said(who="chosen in the data", text=text, held_up=True)] if text else []


def _text(value: Any) -> str:
    """A prompt or an answer as text; of messages, each with its role."""
    if isinstance(value, list):
        turns = [turn for turn in value if isinstance(turn, Mapping)]
        if len(turns) == 1:
            return str(turns[0].get("content", ""))
        return "\n".join(f"{turn.get('role', '')}: {turn.get('content', '')}" for turn in turns)
    return str(value)


def of_evaluation(evaluation: Mapping[str, Any]) -> tuple[Asked, ...]:
    """What `evaluate` asked: each prompt with the answers of the base and of the trained model."""
    asked = []
    for sample in evaluation.get("samples", ()):
        said = [
            Said(who=who, text=str(sample[key]), note="cut" if sample.get(f"{key}_is_cut") else "")
            for key, who in (("base", "before training"), ("trained", "after training"))
            if sample.get(key) is not None
        ]
        asked.append(Asked(str(sample["prompt"]), tuple(said)))
    return tuple(asked)


def of_search(answers: Iterable[Mapping[str, str]]) -> tuple[Asked, ...]:
    """What the best trials of a search answered."""
    return tuple(
        Asked(
            str(sample["prompt"]),
            tuple(
                Said(who=str(who), text=str(text))
                for who, text in sample.items()
                if who != "prompt"
            ),
        )
        for sample in answers
    )
