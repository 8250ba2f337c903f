"""Programs that only say what they were told, for shell scripts that tests run."""

import sys
from pathlib import Path


def stand_in(path: Path, code: str) -> None:
    """Write an executable of that name, in Python."""
    path.write_text(f"#!{sys.executable}\nimport json, os, sys\n{code}\n", encoding="utf-8")
    path.chmod(0o755)
