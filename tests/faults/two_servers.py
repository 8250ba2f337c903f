"""A run on two servers of which one is lost, in a process of its own."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from support import ENVIRONMENT, HANG_S

_SCRIPT = Path(__file__).with_name("lost_server.py")
_QUICK_TO_NOTICE = {
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}
"""With these settings Ray notices within seconds that a server is gone."""


def train_and_lose_one(
    config: Path, step: int, *cache: Path, environment: Mapping[str, str] = ENVIRONMENT
) -> Any:
    """What `lost_server.py` prints: the result, and what was announced."""
    done = subprocess.run(
        [sys.executable, str(_SCRIPT), str(config), str(step), *map(str, cache)],
        env={**environment, **_QUICK_TO_NOTICE},
        capture_output=True,
        text=True,
        check=False,
        timeout=HANG_S,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])
