"""Builds the page of what a user names, and writes it beside what it shows."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from orpo_ray.errors import ConfigError
from orpo_ray.report.comparison_page import page_of_comparison
from orpo_ray.report.content import RunContent, read_run
from orpo_ray.report.html import html
from orpo_ray.report.page import Page
from orpo_ray.report.run_page import page_of_run, page_of_runs
from orpo_ray.report.search_page import page_of_search
from orpo_ray.runs.console import Announce
from orpo_ray.runs.files import REPORT_FILE, written_whole
from orpo_ray.runs.run import Run
from orpo_ray.runs.search_run import SearchRun, find_search
from orpo_ray.runs.shown import ComparisonFolder, Shown


class Folder(Protocol):
    """What has a folder that a page can lie in."""

    def path(self, name: str) -> Path:
        """The path of one of its files on this server."""

    def place_of(self, name: str) -> str:
        """Where a reader on another server finds one of its files."""

    def store(self, *names: str) -> None:
        """Store those of its files that exist."""


def write_report(shown: Shown, announce: Announce) -> str:
    """Write the page of a run, a search or a comparison into its folder. Returns where it is."""
    return keep(page_of([shown], announce), shown)


def try_to_report(shown: Shown, announce: Announce) -> str | None:
    """Write the page at the end of a run. A page that fails is announced, and fails no run."""
    try:
        return write_report(shown, announce)
    except Exception as error:  # noqa: BLE001 - whatever it is, the run itself went well
        kind = "" if isinstance(error, ConfigError) else f"{type(error).__name__}: "
        announce(f"{REPORT_FILE} could not be written: {kind}{error}; the run itself is whole")
        return None


def page_of(shown: Sequence[Shown], announce: Announce) -> Page:
    """The page of one thing, or of several runs side by side.

    Raises ConfigError if there is nothing to show, or if one of several is not a run.
    """
    made = f"Made {datetime.now(UTC):%Y-%m-%d %H:%M} UTC by orpo_ray {version('orpo-ray')}."
    if len(shown) == 1:
        return replace(_page_of_one(shown[0], announce), made=made)
    runs = []
    for each in shown:
        if not isinstance(each, Run):
            raise ConfigError(f"{each.place}: it is no run, and only runs go side by side")
        runs.append(read_run(each, announce))
    return replace(page_of_runs(_told_apart(runs)), made=made)


def _told_apart(runs: Sequence[RunContent]) -> list[RunContent]:
    """The runs under names that differ: of runs with one name each has its place."""
    names = [run.name for run in runs]
    return [replace(run, name=run.place) if names.count(run.name) > 1 else run for run in runs]


def _page_of_one(shown: Shown, announce: Announce) -> Page:
    match shown:
        case Run():
            return page_of_run(read_run(shown, announce))
        case SearchRun():
            return page_of_search(find_search(shown.place), shown.place)
        case ComparisonFolder():
            record = shown.record()
            return page_of_comparison(record, shown.place, _chains(shown, record, announce))


def _chains(
    folder: ComparisonFolder, record: Mapping[str, Any], announce: Announce
) -> dict[str, list[RunContent]]:
    """The run of the first seed of each method, by its stages; what is not there is left out."""
    found: dict[str, list[RunContent]] = {}
    for method in record.get("methods") or ():
        runs = method.get("runs") or ()
        if not runs:
            continue
        within = str(runs[0]).removeprefix(f"{record.get('name')}/")  # the folder may have moved
        try:
            run = read_run(folder.run(within), announce)
        except ConfigError as error:
            announce(f"left out of the page: {error}")
            continue
        found[str(method["method"])] = list(run.stages) or [run]
    return found


def keep(page: Page, folder: Folder) -> str:
    """Write a page into a folder, and store it. Returns its place."""
    write_to(page, folder.path(REPORT_FILE))
    folder.store(REPORT_FILE)
    return folder.place_of(REPORT_FILE)


def write_to(page: Page, path: Path) -> None:
    """Write a page as one file. Raises ConfigError if it cannot be written there."""
    try:
        with written_whole(path) as file:
            file.write(html(page))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from error
