"""Versions against what orpo-ray supports."""

from collections.abc import Iterator

from packaging.specifiers import SpecifierSet

from orpo_ray.doctor.facts import Asked, Software
from orpo_ray.doctor.findings import Finding, note, ok, stops

SUBJECT = "software"
_SHOWN = ("orpo-ray", "torch", "transformers", "ray")


def judge(asked: Asked, found: Software) -> Iterator[Finding]:
    """What of Python and of the packages is missing, too old or too new."""
    if not found.supported:
        yield note(
            SUBJECT,
            "orpo-ray is not installed here as a package, so versions cannot be compared",
            "pip install orpo-ray, with the constraints.txt of its release",
        )
        return
    wrong = [
        name
        for name, wanted in found.supported.items()
        if not _is_in(_version(found, name), wanted)
    ]
    for name in wrong:
        wanted, here = found.supported[name], _version(found, name)
        what = f"{name} {here}" if here else f"{name} is missing"
        yield stops(SUBJECT, f"{what}; orpo-ray supports {wanted}", _install(name, wanted))
    if not wrong:
        shown = ", ".join(f"{name} {found.packages[name]}" for name in _SHOWN)
        yield ok(SUBJECT, f"Python {found.python}, {shown}")


def _version(found: Software, name: str) -> str:
    return found.python if name == "python" else found.packages.get(name, "")


def _is_in(version: str, wanted: str) -> bool:
    """A version of before a release counts as that release."""
    return bool(version) and SpecifierSet(wanted).contains(version, prereleases=True)


def _install(name: str, wanted: str) -> str:
    if name == "python":
        return f"make the virtual environment anew with Python {wanted}"
    return f"pip install '{name}{wanted}'"
