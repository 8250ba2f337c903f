"""The reporter of a Ray Train worker: files by the first rank, news to the driver, checkpoints
acknowledged by Ray.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train import Checkpoint, CheckpointConsistencyMode, CheckpointUploadMode

from orpo_ray.distributed.mailbox import Message
from orpo_ray.errors import RunError
from orpo_ray.runs.console import Metrics
from orpo_ray.runs.metrics import plain_record
from orpo_ray.training.checkpoint import Position
from orpo_ray.training.reporter import GroupReporter, LocalReporter
from orpo_ray.training.world import World

_ACKNOWLEDGEMENT_S = 120.0

_NEWS_EVERY_S = 2.0
"""Steps can be short, and each exchange takes three processes some time."""
_ANSWER_S = 0.5


class RayReporter(GroupReporter):
    """Reports of all ranks of a worker group; each rank has one and calls it in step with the
    others.
    """

    def __init__(self, local: LocalReporter, world: World, mailbox: Any) -> None:
        super().__init__(local, world)
        self._local = local
        self._mailbox = mailbox
        self._news: list[Message] = []
        self._told_at = float("-inf")
        self._stop_requested = False

    def report(self, step: int, total_steps: int, metrics: Metrics) -> None:
        """Publish a step's metrics; Ray, where every report is a barrier, hears of evaluations
        only.
        """
        super().report(step, total_steps, metrics)
        evaluated = any(name.startswith("eval/") for name in metrics)
        if self._world.is_first:
            self._news.append(Message("metrics", (step, total_steps, metrics)))
            if evaluated:
                self._tell()
        if evaluated:
            ray.train.report(plain_record(step, metrics))

    def save(self, position: Position, write: Callable[[Path], None]) -> None:
        """Write a checkpoint once, tell Ray where it lies, and go on when Ray has it on record."""
        super().save(position, write)
        # Ray, which only takes note, knows the run's folder as the driver's server has it.
        run_dir = Path(ray.train.get_context().get_storage().experiment_fs_path)
        folder = str(
            run_dir / self._local.folder_of(position.step).relative_to(self._local.run.folder)
        )
        ray.train.report(
            plain_record(position.step, position.metrics),
            checkpoint=Checkpoint(folder) if self._world.is_first else None,
            checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD,
        )
        on_record = ray.train.get_all_reported_checkpoints(
            consistency_mode=CheckpointConsistencyMode.COMMITTED, timeout_s=_ACKNOWLEDGEMENT_S
        )
        if not any(reported.checkpoint.path == folder for reported in on_record):
            raise RunError(
                f"Ray did not take note of the checkpoint of step {position.step}; it lies in "
                f"{folder}"
            )
        if self._world.is_first:
            self._stop_requested = ray.get(
                self._tell()
            )  # a message that nobody waits for may die with its sender

    def stop_requested(self) -> bool:
        """Whether the driver was asked to stop; it is asked now and then, and answers at once
        unless it is busy.
        """
        if self._world.is_first and time.monotonic() - self._told_at > _NEWS_EVERY_S:
            answered, _ = ray.wait([self._tell()], timeout=_ANSWER_S)
            for answer in answered:
                self._stop_requested = ray.get(answer)  # raises where the driver is gone
        return self._stop_requested

    def _tell(self) -> Any:
        """Send what is new; the answer says whether to stop."""
        answer = self._mailbox.exchange.remote(*self._news)
        self._news, self._told_at = [], time.monotonic()
        return answer
