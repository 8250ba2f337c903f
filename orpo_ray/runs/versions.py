"""What a run's numbers were made with."""

import importlib.metadata
import platform

_PACKAGES = (
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
    """Versions of Python and of the packages that shape a run's numbers, as far as they are
    installed.
    """
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
