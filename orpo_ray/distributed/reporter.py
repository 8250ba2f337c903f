"""The reporter of a Ray Train worker.

The first rank writes the files and sends news to the driver. Ray acknowledges each checkpoint.
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
"""Steps can be short, and each exchange costs three processes some time."""
_ANSWER_S = 0.5


class RayReporter(GroupReporter):
    """The reporter of one rank; all ranks of the group call theirs in step with each other."""

    def __init__(self, local: LocalReporter, world: World, mailbox: Any) -> None:
        super().__init__(local, world)
        self._local = local
        self._mailbox = mailbox
        self._news: list[Message] = []
        self._sent_at = float("-inf")
        self._stop_requested = False

    def report(self, step: int, total_steps: int, metrics: Metrics) -> None:
        """Publish a step's metrics.

        Only evaluations are reported to Ray as well, because each of its reports is a barrier.
        """
        super().report(step, total_steps, metrics)
        evaluated = any(name.startswith("eval/") for name in metrics)
        if self._world.is_first:
            self._news.append(Message("metrics", (step, total_steps, metrics)))
            if evaluated:
                self._send()
        if evaluated:
            ray.train.report(plain_record(step, metrics))

    def save(self, position: Position, write: Callable[[Path], None]) -> None:
        """Write a checkpoint once, report its place to Ray, and wait until Ray has recorded it."""
        super().save(position, write)
        # Ray only records the path. For Ray the run's folder is the one on the driver's server.
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
                f"Ray did not record the checkpoint of step {position.step}, which lies in "
                f"{folder}; the same command resumes from it"
            )
        if self._world.is_first:
            # A message without a wait for its answer may be lost when its sender ends.
            self._stop_requested = ray.get(self._send())

    def stop_requested(self) -> bool:
        """Whether the driver was asked to stop, as far as the first rank knows.

        It asks every few seconds, and does not wait long for the answer.
        """
        if self._world.is_first and time.monotonic() - self._sent_at > _NEWS_EVERY_S:
            answered, _ = ray.wait([self._send()], timeout=_ANSWER_S)
            for answer in answered:
                self._stop_requested = ray.get(answer)  # raises if the driver is gone
        return self._stop_requested

    def _send(self) -> Any:
        """Send the news to the mailbox. Its answer, a future, says whether to stop."""
        answer = self._mailbox.exchange.remote(*self._news)
        self._news, self._sent_at = [], time.monotonic()
        return answer
