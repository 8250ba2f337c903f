"""Checkpoints are whole or not there, checked before use, kept by a policy, and free of pickles."""

import errno
import json
import os
import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
from safetensors import safe_open
from support import make_artifact, run_config, train_locally

import orpo_ray
from orpo_ray.training import checkpoint as checkpoints
from orpo_ray.training.checkpoint import (
    MANIFEST,
    Position,
    Saved,
    find_damage,
    newest_whole,
    prune,
    read_position,
    save,
    steps_to_keep,
)

CONTENT = {
    "state.safetensors": b"tensors" * 100,
    "adapter/adapter_model.safetensors": b"weights",
    "adapter/a.json": b"{}",
}


def position(step: int, **metrics: float) -> Position:
    named = {f"eval/{name}": value for name, value in metrics.items()}
    states = [{"torch": "abc"}, {"torch": "def"}]
    return Position(
        step=step, total_steps=100, scheduler_steps=step, random_states=states, metrics=named
    )


def fill(folder: Path) -> None:
    for name, content in CONTENT.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def whole(parent: Path) -> tuple[str | None, list[str]]:
    """The newest whole checkpoint's name, and what was announced."""
    said: list[str] = []
    found = newest_whole(parent, said.append)
    return found.name if found else None, said


# --- writing --------------------------------------------------------------------------------------


def test_a_checkpoint_holds_what_was_written_and_where_it_was(tmp_path: Path) -> None:
    folder = save(tmp_path, position(7, accuracy=0.5, margin=0.1), fill)
    assert folder == tmp_path / "step-000007"
    assert find_damage(folder) is None
    assert read_position(folder) == position(7, accuracy=0.5, margin=0.1)
    assert {name: (folder / name).read_bytes() for name in CONTENT} == CONTENT
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    assert set(manifest) == {*CONTENT, "position.json"}
    assert manifest["state.safetensors"]["size"] == len(CONTENT["state.safetensors"])


def test_the_manifest_is_written_last_and_the_folder_appears_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file is on the disk before the manifest, and the manifest before the folder's name."""
    order: list[str] = []
    sync = checkpoints._sync

    def spy(path: Path) -> None:
        order.append(path.name)
        assert (path.parent / MANIFEST).exists() == (path.name == MANIFEST)
        assert not list(tmp_path.glob("step-*"))
        sync(path)

    monkeypatch.setattr(checkpoints, "_sync", spy)
    save(tmp_path, position(1), fill)
    assert sorted(order[:-1]) == sorted([*(Path(name).name for name in CONTENT), "position.json"])
    assert order[-1] == MANIFEST


def test_the_names_are_on_the_disk_before_an_older_checkpoint_may_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    opened = Path("/proc/self/fd")
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: synced.append((opened / str(descriptor)).readlink())
    )
    folder = save(tmp_path, position(1), fill)
    assert synced[-3:] == [folder / "adapter", folder, tmp_path]


@pytest.mark.parametrize(
    ("number", "is_forgiven"), [(errno.EINVAL, True), (errno.ENOTSUP, True), (errno.EIO, False)]
)
def test_a_file_system_that_cannot_sync_folders(
    number: int, is_forgiven: bool, tmp_path: Path
) -> None:
    """A failure of the disk is raised. A network file system without folder syncs may be used."""

    def fails(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    with (
        pytest.MonkeyPatch.context() as patch,
        nullcontext() if is_forgiven else pytest.raises(OSError),
    ):
        patch.setattr(os, "fsync", fails)
        checkpoints._sync_folders(tmp_path)


@pytest.mark.parametrize("where", ["write", "manifest", "rename"])
def test_a_failed_save_leaves_what_was_there(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, position(1), fill)

    def fails(*args: object) -> None:
        raise OSError("disk full")

    if where == "manifest":
        monkeypatch.setattr(checkpoints, "file_sha256", fails)
    if where == "rename":
        monkeypatch.setattr(Path, "replace", fails)
    with pytest.raises(OSError, match="disk full"):
        save(tmp_path, position(2), fails if where == "write" else fill)
    monkeypatch.undo()
    assert names(tmp_path) == ["step-000001"]
    assert whole(tmp_path) == ("step-000001", [])


def test_a_step_saved_again_replaces_the_former(tmp_path: Path) -> None:
    """A run does so that is resumed from an earlier checkpoint."""
    save(tmp_path, position(3, accuracy=0.1, margin=0.0), fill)
    save(tmp_path, position(3, accuracy=0.9, margin=0.0), fill)
    assert names(tmp_path) == ["step-000003"]
    assert read_position(tmp_path / "step-000003").metrics["eval/accuracy"] == 0.9


# --- finding --------------------------------------------------------------------------------------

DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a byte changed": (
        lambda folder: (folder / "state.safetensors").write_bytes(b"Tensors" + b"tensors" * 99),
        "state.safetensors is not as it was written",
    ),
    "cut short": (
        lambda folder: (folder / "state.safetensors").write_bytes(b"tensors"),
        "state.safetensors is not as it was written",
    ),
    "a file missing": (
        lambda folder: (folder / "adapter" / "adapter_model.safetensors").unlink(),
        "adapter_model.safetensors cannot be read",
    ),
    "position missing": (
        lambda folder: (folder / "position.json").unlink(),
        "position.json cannot be read",
    ),
    "no manifest": (lambda folder: (folder / MANIFEST).unlink(), f"{MANIFEST} cannot be read"),
    "half a manifest": (
        lambda folder: (folder / MANIFEST).write_bytes((folder / MANIFEST).read_bytes()[:40]),
        f"{MANIFEST} cannot be understood",
    ),
    "another manifest": (
        lambda folder: (folder / MANIFEST).write_text("[]"),
        f"{MANIFEST} cannot be understood",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_checkpoint_is_announced_and_the_one_before_it_is_used(
    damage: str, tmp_path: Path
) -> None:
    for step in (2, 4, 6):
        save(tmp_path, position(step), fill)
    harm, complaint = DAMAGES[damage]
    harm(tmp_path / "step-000006")
    line = f"checkpoint step-000006 is damaged ({complaint}); trying the one before it"
    assert whole(tmp_path) == ("step-000004", [line])
    assert names(tmp_path) == ["damaged-step-000006", "step-000002", "step-000004"]
    assert whole(tmp_path) == ("step-000004", []), "said once"


def test_if_all_are_damaged_none_is_found(tmp_path: Path) -> None:
    for step in (2, 4):
        save(tmp_path, position(step), fill)
        (tmp_path / f"step-{step:06d}" / MANIFEST).unlink()
    found, said = whole(tmp_path)
    assert found is None
    assert [line.split()[1] for line in said] == ["step-000004", "step-000002"]


def test_a_damaged_one_does_not_push_out_those_that_are_whole(tmp_path: Path) -> None:
    """The run resumes from step 4 and stops at 5. Step 6 must not count as the newest one."""
    for step in (4, 6):
        save(tmp_path, position(step), fill)
    (tmp_path / "step-000006" / "position.json").write_bytes(b"{")
    assert whole(tmp_path)[0] == "step-000004"
    save(tmp_path, position(5), fill)
    prune(tmp_path, keep=1)
    assert whole(tmp_path) == ("step-000005", [])


def test_steps_are_compared_as_numbers(tmp_path: Path) -> None:
    for step in (999_999, 1_000_000, 20):
        save(tmp_path, position(step), fill)
    assert whole(tmp_path)[0] == "step-1000000"


def test_remains_of_killed_runs_are_deleted(tmp_path: Path) -> None:
    save(tmp_path, position(2), fill)
    for left in (".building-0123abcd", ".deleting-4567cdef"):
        fill_left = tmp_path / left
        fill_left.mkdir()
        fill(fill_left)
    (tmp_path / "notes").mkdir()
    assert whole(tmp_path) == ("step-000002", [])
    assert names(tmp_path) == ["notes", "step-000002"], "other files stay"


def test_a_run_without_checkpoints_has_none(tmp_path: Path) -> None:
    assert whole(tmp_path / "checkpoints") == (None, [])


# --- keeping --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("saved", "keep", "kept"),
    [
        ([], 2, set()),
        ([(2, None)], 2, {2}),
        ([(2, None), (4, None), (6, None)], 2, {4, 6}),
        ([(2, None), (4, None), (6, None)], 1, {6}),
        ([(2, (0.9, 0.1)), (4, (0.8, 0.5)), (6, (0.7, 0.9))], 2, {2, 6}),
        ([(2, (0.9, 0.1)), (4, (0.8, 0.5)), (6, (0.7, 0.9))], 1, {6}),
        ([(2, (0.9, 0.1)), (4, (0.8, 0.5)), (6, (0.7, 0.9))], 3, {2, 4, 6}),
        ([(2, (0.9, 0.1)), (4, (0.9, 0.2)), (6, (0.7, 0.9))], 2, {4, 6}),
        ([(2, (0.9, 0.2)), (4, (0.9, 0.2)), (6, (0.7, 0.9))], 2, {4, 6}),
        ([(2, (0.7, 0.2)), (4, None), (6, (0.9, 0.9))], 2, {4, 6}),
        ([(2, (0.7, 0.2)), (4, None), (6, None)], 2, {2, 6}),
        ([(2, (0.1, 0.0)), (4, (0.9, 0.0)), (6, None), (8, None)], 3, {4, 6, 8}),
    ],
)
def test_the_newest_is_kept_then_the_best_then_the_next_newest(
    saved: list[tuple[int, tuple[float, float] | None]], keep: int, kept: set[int]
) -> None:
    """`saved` has (step, (accuracy, margin)), or None for a step that was not evaluated.

    Between equal accuracies the margin decides, then the later step.
    """
    checkpoints = [Saved(step, *(scores or (None, None))) for step, scores in saved]
    assert steps_to_keep(checkpoints, keep) == kept


def test_pruning_deletes_the_others_and_nothing_else(tmp_path: Path) -> None:
    for step, accuracy in ((2, 0.9), (4, 0.5), (6, 0.6)):
        save(tmp_path, position(step, accuracy=accuracy, margin=0.0), fill)
    (tmp_path / "notes").mkdir()
    prune(tmp_path, keep=2)
    assert names(tmp_path) == ["notes", "step-000002", "step-000006"]


def test_pruning_survives_a_checkpoint_that_was_damaged_later(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        save(tmp_path, position(step, accuracy=1 / step, margin=0.0), fill)
    (tmp_path / "step-000002" / "position.json").unlink()
    (tmp_path / "step-000004" / "position.json").write_bytes(b"\xff{")
    prune(tmp_path, keep=1)
    assert names(tmp_path) == ["step-000006"]


# --- no pickle ------------------------------------------------------------------------------------


def test_a_real_checkpoint_holds_tensors_and_text_alone(tmp_path: Path) -> None:
    artifact = make_artifact(tmp_path, train=4, evaluation=2)
    trained = train_locally(
        run_config(tmp_path, training={"max_steps": 1, "pairs_per_step": 4, "warmup": 0}), artifact
    )
    (folder,) = (trained.run_dir / "checkpoints").iterdir()
    files = [
        path
        for path in [*folder.rglob("*"), *(trained.run_dir / "adapter").rglob("*")]
        if path.is_file()
    ]
    assert {path.suffix for path in files} == {".safetensors", ".json", ".jinja", ".md"}
    for path in files:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as tensors:
                assert len(list(tensors.keys())) > 0
        else:
            path.read_text(encoding="utf-8")


def test_no_source_of_ours_reads_or_writes_pickles() -> None:
    pattern = re.compile(
        r"\bimport (c?pickle|dill|cloudpickle|joblib)\b|\btorch\.(load|save)\(|allow_pickle"
    )
    sources = list(Path(orpo_ray.__file__).parent.rglob("*.py"))
    assert len(sources) > 50
    assert [path.name for path in sources if pattern.search(path.read_text(encoding="utf-8"))] == []
