"""Where a run's metrics and checkpoints go.

The training loop knows only the protocol `Reporter`. `LocalReporter` works without Ray, and
`GroupReporter` in several processes. `distributed` adds what Ray needs.
"""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from safetensors import SafetensorError

from orpo_ray.config.storage import local_path
from orpo_ray.errors import RunError
from orpo_ray.runs.console import Console, Metrics
from orpo_ray.runs.files import CHECKPOINTS, EVALUATIONS, METRICS_FILE, SAMPLES_FILE, TENSORBOARD
from orpo_ray.runs.metrics import lines_until, plain_record
from orpo_ray.runs.run import Run
from orpo_ray.runs.samples import SampleAnswer, sample_line
from orpo_ray.runs.scores import PairScores, scores_file, write_scores
from orpo_ray.training import checkpoint as checkpoints
from orpo_ray.training.checkpoint import Position
from orpo_ray.training.world import World


class Reporter(Protocol):
    """What the training loop needs from its surroundings.

    If several processes train, each of them calls every method.
    """

    def report(self, step: int, total_steps: int, metrics: Metrics) -> None:
        """Report the metrics of one step: plain numbers under `train/` and `eval/` names.

        They are the same in every process.
        """

    def keep_scores(self, step: int, scores: PairScores) -> None:
        """Keep the scores of each held-out pair at a step; intervals are computed from them.

        The metrics of the same evaluation are reported next.
        """

    def keep_samples(self, samples: Sequence[SampleAnswer]) -> None:
        """Keep the answers that the first process took at an evaluation; others have none."""

    def save(self, position: Position, write: Callable[[Path], None]) -> None:
        """Make a checkpoint durable. `write` fills the folder it is given, in one process only."""

    def latest_checkpoint(self) -> Path | None:
        """The newest whole checkpoint to resume from."""

    def bring(self, checkpoint: Path) -> None:
        """Bring all files of the latest checkpoint to this server."""

    def rewind(self, step: int) -> None:
        """Forget metrics and samples of steps after `step`: they will be made again."""

    def stop_requested(self) -> bool:
        """Whether the run should save a checkpoint and end at this step.

        It is enough if one process returns True.
        """


class LocalReporter:
    """Reports to a run's folder on this machine, and to the console."""

    def __init__(self, run: Run, console: Console) -> None:
        self.run = run
        self._metrics_file = run.path(METRICS_FILE)
        self._checkpoints = run.path(CHECKPOINTS)
        self._console = console
        self.stop_requested = console.stop_requested

    def report(self, step: int, total_steps: int, metrics: Metrics) -> None:
        """Append a line to metrics.jsonl, and show it to the console."""
        with self._metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(plain_record(step, metrics)) + "\n")
        if any(name.startswith("eval/") for name in metrics):
            # Each checkpoint stores this file, too. But a trial may be given up here, before its
            # next checkpoint.
            self.run.store(METRICS_FILE)
        self._console.watch(step, total_steps, metrics)

    def keep_scores(self, step: int, scores: PairScores) -> None:
        """Write the scores into the folder of evaluations."""
        path = scores_file(self.run.path(EVALUATIONS), step)
        write_scores(path, scores)
        self.run.storage.store(path)

    def keep_samples(self, samples: Sequence[SampleAnswer]) -> None:
        """Append the answers to samples.jsonl, on disk for good before a checkpoint follows."""
        if not samples:
            return
        with self.run.path(SAMPLES_FILE).open("a", encoding="utf-8") as file:
            file.writelines(map(sample_line, samples))
            file.flush()
            os.fsync(file.fileno())
        self.run.store(SAMPLES_FILE)

    def save(self, position: Position, write: Callable[[Path], None]) -> None:
        """Write a checkpoint, move it to its place, then delete those that are not kept."""
        try:
            _make_durable(self._metrics_file)
            folder = checkpoints.save(self._checkpoints, position, write)
            self.run.store(METRICS_FILE, TENSORBOARD)
            self.run.storage.store_folder(folder, checkpoints.MANIFEST)
            for pruned in checkpoints.prune(self._checkpoints, self.run.config.training.keep):
                self.run.storage.remove_folder(pruned, checkpoints.MANIFEST)
        except (OSError, SafetensorError) as error:
            raise RunError(
                f"the checkpoint of step {position.step} cannot be written to {self._checkpoints}: "
                f"{error}; make room there; the same command then resumes from the checkpoint "
                "before it"
            ) from error

    def folder_of(self, step: int) -> Path:
        """The folder of a step's checkpoint, whether it exists or not."""
        return checkpoints.folder_of(self._checkpoints, step)

    def latest_checkpoint(self) -> Path | None:
        """The newest checkpoint whose files are whole. Damaged ones are announced."""
        self.run.storage.fetch_folders(self._checkpoints, checkpoints.MANIFEST)
        return checkpoints.newest_whole(self._checkpoints, self._console.announce)

    def bring(self, checkpoint: Path) -> None:
        """Do nothing: the checkpoint is on this machine."""

    def rewind(self, step: int) -> None:
        """Remove the lines of steps after `step` from metrics.jsonl and samples.jsonl."""
        for path in map(self.run.fetch, (METRICS_FILE, SAMPLES_FILE)):
            if not path.exists():
                continue
            text = path.read_text(encoding="utf-8", errors="replace")
            temporary = path.with_suffix(".tmp")
            temporary.write_text(lines_until(text, step), encoding="utf-8")
            temporary.replace(path)


class GroupReporter:
    """A reporter for processes that train together: the first one writes, the others wait."""

    def __init__(self, first: LocalReporter, world: World) -> None:
        self._first = first
        self._world = world
        self._storage = first.run.storage

    def report(self, step: int, total_steps: int, metrics: Metrics) -> None:
        """Report a step's metrics in the first process."""
        if self._world.is_first:
            self._first.report(step, total_steps, metrics)

    def keep_scores(self, step: int, scores: PairScores) -> None:
        """Write the scores in the first process."""
        if self._world.is_first:
            self._first.keep_scores(step, scores)

    def keep_samples(self, samples: Sequence[SampleAnswer]) -> None:
        """Write the answers in the first process."""
        if self._world.is_first:
            self._first.keep_samples(samples)

    def save(self, position: Position, write: Callable[[Path], None]) -> None:
        """Write a checkpoint in the first process. The others wait until it is durable."""
        if self._world.is_first:
            self._first.save(position, write)
        self._world.wait()

    def latest_checkpoint(self) -> Path | None:
        """The newest whole checkpoint, which the first process looks for.

        Other servers fetch only its position.
        """
        found = self._first.latest_checkpoint() if self._world.is_first else None
        place = self._world.from_first(self._storage.place_of(found) if found else None)
        if place is None:
            return None
        checkpoint = local_path(place)
        if self._fetches:
            self._storage.fetch(checkpoint / checkpoints.POSITION)
        self._world.wait()
        return checkpoint

    def bring(self, checkpoint: Path) -> None:
        """Bring all files of the latest checkpoint to every server."""
        if self._fetches:
            self._storage.fetch_folder(checkpoint, checkpoints.MANIFEST)
        self._world.wait()

    @property
    def _fetches(self) -> bool:
        """Whether this process fetches files for its server.

        One process of each server does, except on the first process's server, which has them.
        """
        return self._world.local_rank == 0 and not self._world.is_first

    def rewind(self, step: int) -> None:
        """Forget metrics and samples of steps after `step`."""
        if self._world.is_first:
            self._first.rewind(step)

    def stop_requested(self) -> bool:
        """Whether the first process was asked to stop."""
        return self._world.is_first and self._first.stop_requested()


def _make_durable(path: Path) -> None:
    """Write a file to the disk for good. A checkpoint must not exist without its metrics."""
    with path.open("ab") as file:
        os.fsync(file.fileno())
