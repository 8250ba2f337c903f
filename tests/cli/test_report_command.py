"""`orpo-ray report`: the page of whatever a user names, at any time."""

import json
import shutil
import sys
import webbrowser
from pathlib import Path

import pytest
from run_folders import HOSTILE, keep_scores, lines_of, scores_of, write_run, write_search
from terminal import LACKING, WRONG, Command, Finished, one_line

from orpo_ray.runs.files import EVALUATION_FILE, REPORT_FILE


def test_a_finished_run_has_a_page_and_names_it(finished: Finished) -> None:
    page = finished.run_dir / REPORT_FILE
    assert finished.done.result["report"] == str(page)
    assert json.loads((finished.run_dir / "result.json").read_text("utf-8"))["report"] == str(page)
    text = page.read_text(encoding="utf-8")
    for says in ("held-out accuracy", "Planned and measured", "Lengths of training pairs", "Why"):
        assert says in text
    assert len(text.encode()) < 1_500_000


def test_a_run_is_named_by_its_config_or_by_its_folder_wherever_that_is(
    command: Command, finished: Finished, tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(finished.run_dir, moved)
    (moved / REPORT_FILE).unlink()
    done = command("report", moved, "--json")
    assert (done.code, done.result) == (0, {"report": str(moved / REPORT_FILE)}), done.err
    by_config = command("report", finished.config)
    assert by_config.out == f"report: {finished.run_dir / REPORT_FILE}\n"


def test_several_runs_go_on_one_page(command: Command, finished: Finished, tmp_path: Path) -> None:
    other = write_run(tmp_path, "other", lines=lines_of(4, 2)).folder
    page = tmp_path / "both.html"
    done = command("report", finished.run_dir, other, "--out", page, "--json")
    assert (done.code, done.result) == (0, {"report": str(page)}), done.err
    assert "2 runs side by side" in page.read_text(encoding="utf-8")


def test_a_search_has_a_page(command: Command, tmp_path: Path) -> None:
    folder, _ = write_search(tmp_path)
    done = command("report", folder.parent, "--json")
    assert done.result == {"report": str(folder / REPORT_FILE)}, done.err


def test_text_shows_numbers_and_plots_and_gives_the_terminal_no_orders(
    command: Command, tmp_path: Path
) -> None:
    facts = {"pairs": None, "versions": {"x": HOSTILE}}
    run = write_run(tmp_path, "run", lines=lines_of(40, 10), facts=facts)
    keep_scores(run, 0, scores_of(32))
    keep_scores(run, 40, scores_of(48))
    done = command("report", run.folder, "--text")
    assert done.code == 0, done.err
    assert "held-out accuracy: 0.750  (0.500 before; 95 % " in done.out
    assert "Loss and its parts" in done.out and "accuracy, held out" in done.out
    assert "\x1b" not in done.out and "┤" in done.out
    folder, _ = write_search(tmp_path / "search")
    shown = command("report", folder, "--text").out
    assert "Importance of each setting" in shown and "lambda by learning rate" in shown


def test_png_writes_each_plot(command: Command, tmp_path: Path) -> None:
    run = write_run(tmp_path, "run", lines=lines_of(40, 10))
    pictures = tmp_path / "pictures"
    done = command("report", run.folder, "--png", pictures, "--json")
    assert done.code == 0, done.err
    names = [Path(path).name for path in done.result["pictures"]]
    assert names[:2] == ["01-preference-accuracy.png", "02-loss-and-its-parts.png"]
    assert sorted(names) == sorted(path.name for path in pictures.iterdir()) and len(names) == 10
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures.iterdir())
    folder, _ = write_search(tmp_path / "search")
    assert command("report", folder, "--png", tmp_path / "more").code == 0


def test_png_without_matplotlib_is_refused_before_anything_is_read(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    one_line(
        command("report", tmp_path / "nowhere", "--png", tmp_path / "p"),
        LACKING,
        "--png draws with matplotlib, which is not installed; pip install 'orpo-ray[report]'",
    )


def test_open_shows_the_page_or_says_where_it_is(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, opened = write_run(tmp_path, "run", lines=lines_of(4, 2)), []
    monkeypatch.setattr(webbrowser, "open", lambda url: opened.append(url) or False)
    done = command("report", run.folder, "--open")
    assert opened == [run.path(REPORT_FILE).as_uri()]
    assert done.code == 0
    assert done.said == [f"--open: no browser was found here; open {run.path(REPORT_FILE)} in one"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("nowhere",), "nowhere: no run is there; name a run's folder or URL, or its YAML"),
        ((".",), "no config.json in it; name the folder of a run, or its YAML"),
        ((), "Missing argument 'RUN...'"),
    ],
)
def test_what_is_no_run_is_refused_in_one_line(
    command: Command,
    arguments: tuple[str, ...],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    one_line(command("report", *arguments), WRONG, says)
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_has_not_begun_and_a_place_that_cannot_be_written_are_refused(
    command: Command, config: Path, tmp_path: Path
) -> None:
    one_line(command("report", config), WRONG, "no run is there yet; `orpo-ray train` begins it")
    run = write_run(tmp_path, "run", lines=lines_of(4, 2))
    nowhere = tmp_path / "no" / "page.html"
    one_line(command("report", run.folder, "--out", nowhere), WRONG, "cannot be written: No such")
    folder = tmp_path / "folder"
    folder.mkdir()
    one_line(command("report", run.folder, "--out", folder), WRONG, "cannot be written: Is a dir")
    assert not list(tmp_path.glob(".*")), "no half of a page is left behind"


def test_evaluate_puts_its_answers_on_the_page(
    command: Command, finished: Finished, tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(finished.run_dir, moved)
    (moved / EVALUATION_FILE).unlink(missing_ok=True)  # another test may have evaluated the run
    assert command("report", moved).code == 0
    assert "after training" not in (moved / REPORT_FILE).read_text(encoding="utf-8")
    done = command("evaluate", moved, "--samples", "1", "--max-new-tokens", "4")
    assert done.code == 0, done.err
    assert "after training" in (moved / REPORT_FILE).read_text(encoding="utf-8")
