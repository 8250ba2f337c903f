"""Starts a submitted job: checks the cluster's versions, then becomes the command of orpo-ray.

It is sent as a single file, and imports nothing of orpo_ray, which the cluster may not have.
Usage: python job.py PYTHON RAY VERSION COMMAND...
VERSION is the version of orpo-ray that the cluster must have, or - if the code was sent along.
"""

import importlib.metadata
import json
import os
import signal
import sys
from collections.abc import Sequence

WRONG_USAGE = 2
ANY = "-"


def complaint(python: str, ray: str, version: str) -> str | None:
    """How the cluster differs from what the submitter has, or None."""
    here = {"Python": ".".join(map(str, sys.version_info[:2])), "Ray": _installed("ray")}
    if here["Ray"] is None:
        return (
            f"the cluster's python ({sys.executable}) has no Ray; start Ray with its "
            "environment first in PATH"
        )
    for what, wanted in (("Python", python), ("Ray", ray)):
        if here[what] != wanted:
            return (
                f"the cluster has {what} {here[what]}, but the run was submitted with {wanted}; "
                "use the same on both"
            )
    found = _installed("orpo-ray")
    if version not in (ANY, found):
        has = f"has orpo-ray {found}" if found else "has no orpo-ray"
        return (
            f"the cluster {has}, but the run was submitted with {version}; install it there, or "
            "use --ship-code"
        )
    return None


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def main(arguments: Sequence[str]) -> None:
    """Become the command, or end with one line that says why not."""
    python, ray, version, *command = arguments
    if problem := complaint(python, ray, version):
        print(f"orpo-ray: {problem}", file=sys.stderr)
        print(json.dumps({"error": problem, "exit_code": WRONG_USAGE}))
        sys.exit(WRONG_USAGE)
    # A cluster that a script started in the background ignores SIGINT. So do its child processes.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.execv(sys.executable, [sys.executable, "-m", "orpo_ray.cli.main", *command])


if __name__ == "__main__":
    main(sys.argv[1:])
