"""Checks what wandb and mlflow need before a run reports to them. It makes no connection."""

import importlib.util
import netrc
import os
from pathlib import Path

from orpo_ray.config import RunConfig
from orpo_ray.errors import ResourceError

_WANDB_HOST = "api.wandb.ai"
_WITHOUT_KEY = ("offline", "disabled", "dryrun")


def refuse_missing_trackers(config: RunConfig) -> None:
    """Raise ResourceError if a tracker is not installed, or would ask for a key during the run."""
    for tracker in config.training.trackers:
        if importlib.util.find_spec(tracker) is None:
            raise ResourceError(
                f"training.trackers: {tracker} is not installed; pip install {tracker}"
            )
    if "wandb" in config.training.trackers and not _has_wandb_key():
        raise ResourceError(
            "training.trackers: wandb has no key on this machine; run wandb login, "
            "or set WANDB_API_KEY or WANDB_MODE=offline"
        )


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE") in _WITHOUT_KEY:
        return True
    host = os.environ.get("WANDB_BASE_URL", f"https://{_WANDB_HOST}").rpartition("//")[2]
    try:
        found = netrc.netrc(os.environ.get("NETRC", str(Path.home() / ".netrc")))
    except (OSError, netrc.NetrcParseError):
        return False
    return found.authenticators(host.partition("/")[0]) is not None
