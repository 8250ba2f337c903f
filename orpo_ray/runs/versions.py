"""The versions of software that a run used."""

import importlib.metadata
import platform

PACKAGES = (
    "orpo-ray",
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "accelerate",
    "trl",
    "deepspeed",
    "ray",
)


def versions() -> dict[str, str]:
    """Versions of Python and of those packages that change a run's numbers, if installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
