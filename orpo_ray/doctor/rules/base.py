"""The tokenizer, chat template and end token of a base."""

from collections.abc import Iterator

from orpo_ray.doctor.facts import Asked, Base
from orpo_ray.doctor.findings import Finding, ok, stops, warning

SUBJECT = "base"


def judge(asked: Asked, found: Base) -> Iterator[Finding]:
    """Whether answers of this base have a template and an end."""
    if found.skipped:
        yield ok(SUBJECT, f"{found.name}: not looked at; {found.skipped}")
    elif found.problem:
        yield stops(SUBJECT, found.problem, "name another base (model.base), or repair this one")
    else:
        yield from _template(found)


def _template(found: Base) -> Iterator[Finding]:
    ends = f"answers end with {found.end}"
    others = [line for line in found.said if line.startswith("model.chat_template")]
    for line in others:
        yield warning(
            SUBJECT, line, "choose the template of the base's own family: model.chat_template=NAME"
        )
    if found.template == "plain" and not found.has_own_template and not others:
        yield warning(
            SUBJECT,
            f"{found.name} has no chat template: the plain one is used (Human: ... "
            f"Assistant: ...), and {ends}",
            "set model.chat_template=chatml, or another, if the model is to speak it",
        )
    elif not others:
        yield ok(SUBJECT, f"{found.name}: template {found.template}, {ends}")
