"""Installed versions, and those that orpo-ray's own package says that it supports."""

import importlib.metadata
import platform

from packaging.requirements import Requirement

from orpo_ray.doctor.facts import Software

_OURS = "orpo-ray"


def look() -> Software:
    """The versions of Python, of orpo-ray and of all that it requires."""
    try:
        ours = importlib.metadata.distribution(_OURS)
    except importlib.metadata.PackageNotFoundError:
        return Software(python=platform.python_version(), packages={}, supported={})
    supported = {"python": ours.metadata["Requires-Python"] or ""}
    packages = {_OURS: ours.version}
    for text in ours.requires or ():
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue  # it belongs to an extra
        supported[requirement.name] = str(requirement.specifier)
        try:
            packages[requirement.name] = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return Software(python=platform.python_version(), packages=packages, supported=supported)
