"""What wandb and mlflow need before a run reports to them, and the page that they get."""

import importlib
import importlib.util
import netrc
import os
from pathlib import Path
from typing import Any

from orpo_ray.config import RunConfig
from orpo_ray.errors import ResourceError
from orpo_ray.report.write import try_to_report
from orpo_ray.runs.console import Announce
from orpo_ray.runs.files import REPORT_FILE
from orpo_ray.runs.run import Run

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


def send_page(run: Run, announce: Announce) -> None:
    """Give the page of a finished run to its trackers, as an artifact of what they recorded.

    It is called in the process that reported to them. What fails is announced, and fails no run.
    """
    if not run.config.training.trackers or try_to_report(run, announce) is None:
        return
    for tracker in run.config.training.trackers:
        try:
            _SENDERS[tracker](importlib.import_module(tracker), run.path(REPORT_FILE))
        except Exception as error:  # noqa: BLE001 - the run itself went well
            announce(f"{tracker} did not get {REPORT_FILE}: {type(error).__name__}: {error}")


def _to_wandb(wandb: Any, page: Path) -> None:
    if wandb.run is not None:
        artifact = wandb.Artifact(f"report-{wandb.run.id}", type="report")
        artifact.add_file(str(page))
        wandb.run.log_artifact(artifact)


def _to_mlflow(mlflow: Any, page: Path) -> None:
    # The Trainer's callback has ended the run by now.
    if (last := mlflow.last_active_run()) is not None:
        mlflow.log_artifact(str(page), run_id=last.info.run_id)


_SENDERS = {"wandb": _to_wandb, "mlflow": _to_mlflow}
