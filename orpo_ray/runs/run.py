"""A run on disk: its folder, its lock, the settings it was made with, and its result."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from orpo_ray.config import RunConfig, dump
from orpo_ray.config.storage import inside, is_url
from orpo_ray.errors import ConfigError, RunError
from orpo_ray.runs import files
from orpo_ray.runs.changes import EXTENSIONS, FREE_KEYS, refuse_changed_config
from orpo_ray.runs.console import Console
from orpo_ray.runs.lock import (
    RUN_LOCK_FILE,
    WORKERS_LOCK_FILE,
    LockedError,
    is_locked,
    is_ours,
    locked,
)
from orpo_ray.runs.results import Benchmarks, Evaluation, TrainResult
from orpo_ray.runs.scores import PairScores, read_scores, scores_file
from orpo_ray.storage import Storage, storage_at

Outcome = TypeVar("Outcome")

_REOPENED = "extended"
"""The status of a result while the run is extended."""

_RECORDS = (files.CONFIG_FILE, files.RUN_FILE, files.RESULT_FILE, files.SEARCH_FILE, files.LOG_FILE)


class RunFolder(Generic[Outcome]):
    """What runs and searches share: a folder in a storage, a lock, and a config that is fixed.

    In the docstrings below, "it" is the run or the search.
    """

    free_keys: ClassVar[tuple[str, ...]] = FREE_KEYS
    """Settings that may change when it is resumed."""
    records: ClassVar[tuple[str, ...]] = _RECORDS
    """Files that say how far it is."""
    can_be_extended = False
    """Whether --extend continues it with more steps when it is finished."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.name = config.name
        self.folder = config.run_dir
        self.place = config.place
        self.root = config.storage_dir
        """The storage on this server, with all runs and what they share."""
        self.storage: Storage = storage_at(config.storage)

    def path(self, name: str) -> Path:
        """The path of one of its files or folders on this server."""
        return self.folder / name

    def place_of(self, name: str) -> str:
        """Where a reader on another server finds one of its files or folders: a path or a URL."""
        return inside(self.place, name)

    def store(self, *names: str) -> None:
        """Store those of its files that exist."""
        self.storage.store(*map(self.path, names))

    def fetch(self, name: str) -> Path:
        """Fetch a file, if the storage has it, and return its path on this server."""
        self.storage.fetch(self.path(name))
        return self.path(name)

    def refresh(self) -> None:
        """Fetch its records from the storage, before this process works on it.

        If another process of this server is at work on it, the local files are newer and stay.
        """
        if not self.storage.is_remote or is_locked(self.path(WORKERS_LOCK_FILE)):
            return
        if is_locked(self.path(RUN_LOCK_FILE)) and not self.is_ours:
            return
        for name in self.records:
            if name != files.LOG_FILE:
                self.fetch(name)
        # The local log stays if this process writes it, or if the storage has none.
        if not self.is_ours and self.storage.holds(self.path(files.LOG_FILE)):
            self.fetch(files.LOG_FILE)
        # Manifests only. The worker that resumes, maybe on another server, fetches the rest.
        self.storage.fetch_folders(
            self.path(files.CHECKPOINTS), files.CHECKPOINT_MANIFEST, only_manifests=True
        )

    @property
    def is_ours(self) -> bool:
        """Whether this process is at work on it, so that its folder may be written to."""
        return is_ours(self.path(RUN_LOCK_FILE))

    @property
    def has_started(self) -> bool:
        """Whether there is something to resume from.

        A run that never saved a checkpoint begins again.
        """
        begun = self.path(files.RESULT_FILE).exists() or self.path(files.SEARCH_FILE).exists()
        return begun or any(self.path(files.CHECKPOINTS).glob("step-*"))

    @property
    def extended_from(self) -> dict[str, Any] | None:
        """The settings that defined its first schedule; None if it was not extended."""
        facts = files.read_json(self.path(files.RUN_FILE)) or {}
        extensions = facts.get(EXTENSIONS)
        return {"training": extensions[0]["training"]} if extensions else None

    def refuse_changes(self) -> None:
        """Raise ConfigError if it has started with other settings. The error names the first."""
        stored = files.read_json(self.path(files.CONFIG_FILE))
        if stored is not None and self.has_started:
            refuse_changed_config(
                stored,
                self.config,
                self.free_keys,
                self.extended_from,
                can_continue=self.can_be_extended and self.path(files.RESULT_FILE).exists(),
            )

    def finished(self) -> Outcome | None:
        """Its result, if nothing is left to do."""
        raise NotImplementedError

    def what_next(self) -> str:
        """What a user can do with it when it is finished."""
        raise NotImplementedError

    def look(self, console: Console) -> Outcome | None:
        """Fetch its records, refuse changed settings, and return its result if it is finished."""
        self.refresh()
        self.refuse_changes()
        finished = self.finished()
        if finished is not None:
            console.announce(f"run {self.name} is finished: {self.place}; {self.what_next()}")
        return finished

    def refuse_busy(self, patience_s: float) -> None:
        """Raise ConfigError if another process is at work on it for longer than `patience_s`."""
        if is_locked(self.path(RUN_LOCK_FILE)) and not self.is_ours:
            with self.lock(patience_s):
                pass

    @contextmanager
    def at_work(self, console: Console, patience_s: float = 0.0) -> Iterator[Outcome | None]:
        """Begin it, and keep other processes away during the work.

        Yields its result if another process has finished it in the meantime; then nothing is left
        to do. Raises ConfigError for changed settings, and if another process is still at work
        after `patience_s`.
        """
        with self.lock(patience_s):
            finished = self.look(console)
            if finished is None:
                self.write_config()
            yield finished

    @contextmanager
    def lock(self, patience_s: float = 0.0) -> Iterator[None]:
        """Keep other processes away. Raises ConfigError if one is at work after `patience_s`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with locked(self.path(RUN_LOCK_FILE), patience_s):
                yield
        except LockedError:
            raise ConfigError(
                f"{self.folder}: another process is at work here; wait for it, or choose "
                "another name"
            ) from None

    def check_writable(self) -> None:
        """Raise ConfigError if its folder cannot be made or written.

        A folder that was made for this test is removed. Raises ResourceError if the storage is on
        other machines and cannot be reached.
        """
        self.storage.check()
        is_new = not self.folder.exists()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.folder).close()
            if is_new:
                self.folder.rmdir()
        except OSError as error:
            raise ConfigError(
                f"storage: {self.folder} cannot be written: {error.strerror}"
            ) from error

    def write_config(self) -> None:
        """Keep its settings, for its workers and for the next start."""
        self.folder.mkdir(parents=True, exist_ok=True)
        files.write_json(self.path(files.CONFIG_FILE), dump(self.config))
        self.store(files.CONFIG_FILE)


class Run(RunFolder[TrainResult]):
    """A run that trains one model, or several in stages."""

    def __init__(self, config: RunConfig, is_stage: bool = False) -> None:
        super().__init__(config)
        self.can_be_extended = not (is_stage or config.stages)

    def what_next(self) -> str:
        """What a user can do with it when it is finished."""
        more = ", or more steps with --extend" if self.can_be_extended else ""
        return f"give another name to train again{more}"

    def refuse_changes(self) -> None:
        """Raise ConfigError if it has started with other settings, or if a search has its name."""
        if self.path(files.SEARCH_FILE).exists():
            raise ConfigError(
                f"name: {self.place} holds a search; train its best.yaml, or choose another name"
            )
        super().refuse_changes()

    def finished(self) -> TrainResult | None:
        """Its result, if it was trained to its end and its adapter still exists."""
        result = self.result()
        return (
            result if result is not None and self.storage.holds(self.path(files.ADAPTER)) else None
        )

    def result(self) -> TrainResult | None:
        """What result.json says; None before the end.

        Raises ConfigError for a file that is damaged.
        """
        path = self.path(files.RESULT_FILE)
        written = files.read_json(path)
        if written is None or written.get("status") == _REOPENED:
            return None
        try:
            found = replace(TrainResult.from_json(written), adapter=self.adapter)
            return replace(found, report=found.report and self.place_of(files.REPORT_FILE))
        except (TypeError, KeyError, AttributeError) as error:
            raise files.damaged(path, error) from error

    def scores(self, step: int) -> PairScores | None:
        """The scores of each held-out pair after a step; None if they are not on record."""
        path = scores_file(self.path(files.EVALUATIONS), step)
        self.storage.fetch(path)
        return read_scores(path)

    @property
    def adapter(self) -> str:
        """Where its adapter is once it has ended, as a path or URL.

        For full training it is the whole model.
        """
        return self.place_of(files.ADAPTER)

    @property
    def storage_place(self) -> str:
        """The storage as its users name it: a URL, or the folder's path."""
        return self.config.storage if is_url(self.config.storage) else str(self.root)

    def facts(self) -> dict[str, Any]:
        """What run.json says; empty for a run that has nothing to resume from."""
        if not self.has_started:
            return {}
        stored = files.read_json(self.path(files.RUN_FILE))
        if stored is None:
            raise ConfigError(
                f"{self.path(files.RUN_FILE)}: the file is missing. It says what the run began "
                "with; restore it, or give the new run another name"
            )
        return stored

    def write_facts(self, facts: dict[str, Any]) -> None:
        """Replace the content of run.json."""
        files.write_json(self.path(files.RUN_FILE), facts)

    def add_facts(self, facts: dict[str, Any]) -> None:
        """Add to the content of run.json."""
        self.write_facts({**(files.read_json(self.path(files.RUN_FILE)) or {}), **facts})

    def keep_evaluation(self, evaluation: Evaluation) -> None:
        """Keep what `evaluate` found, with the answers.

        An evaluation of another adapter is kept only if this run has a folder already.
        """
        if evaluation.adapter not in (None, self.adapter) and not self.folder.exists():
            return
        alone = evaluation.adapter is None
        name = files.BASE_EVALUATION_FILE if alone else files.EVALUATION_FILE
        self.folder.mkdir(parents=True, exist_ok=True)
        files.write_json(self.path(name), evaluation.to_json())
        self.store(name)

    def benchmarks(self) -> list[dict[str, Any]]:
        """What was kept of earlier benchmarks, the oldest first.

        Raises ConfigError for a file that is damaged.
        """
        written = files.read_json(self.fetch(files.LM_EVAL_FILE)) or {}
        return list(written.get("evaluations", []))

    def keep_benchmarks(self, found: Benchmarks) -> None:
        """Keep what lm-evaluation-harness found, after what it found before."""
        kept = {"evaluations": [*self.benchmarks(), found.to_json()]}
        self.folder.mkdir(parents=True, exist_ok=True)
        files.write_json(self.path(files.LM_EVAL_FILE), kept)
        self.store(files.LM_EVAL_FILE)

    def lay_adapter(self, adapter: Path) -> Path:
        """Copy an adapter's folder to this run's place for it."""
        own = self.path(files.ADAPTER)
        shutil.rmtree(own, ignore_errors=True)
        shutil.copytree(adapter, own)
        return own

    def conclude(self, result: TrainResult) -> None:
        """Store all that it made. The result comes last: it says that the rest is there."""
        self.store(files.METRICS_FILE, files.SAMPLES_FILE, files.TENSORBOARD, files.RUN_FILE)
        self.storage.store_folder(self.path(files.ADAPTER))
        files.write_json(self.path(files.RESULT_FILE), result.to_json())
        self.store(files.RESULT_FILE)

    def keep_report(self, result: TrainResult, report: str | None) -> TrainResult:
        """Keep in result.json where the page of the finished run is. Returns the new result."""
        result = replace(result, report=report)
        files.write_json(self.path(files.RESULT_FILE), result.to_json())
        self.store(files.RESULT_FILE)
        return result

    def reopen(self) -> None:
        """Mark result.json so that the run counts as unfinished."""
        written = files.read_json(self.path(files.RESULT_FILE)) or {}
        files.write_json(self.path(files.RESULT_FILE), {**written, "status": _REOPENED})
        self.store(files.RESULT_FILE)

    @contextmanager
    def only_group(self, patience_s: float) -> Iterator[None]:
        """Keep out the workers of an earlier start.

        Their driver may be dead, and they may not have noticed yet.
        """
        try:
            with locked(self.path(WORKERS_LOCK_FILE), patience_s):
                yield
        except LockedError:
            raise RunError(
                f"{self.folder}: workers of an earlier start are still writing there; end them "
                "first"
            ) from None
