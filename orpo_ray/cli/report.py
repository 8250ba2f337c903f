"""`orpo-ray report`: a page that shows a run, a search or a comparison, at any time."""

from pathlib import Path
from typing import Annotated, Any

import typer

from orpo_ray.cli.options import Json

app = typer.Typer(add_completion=False)

Named = Annotated[
    list[str],
    typer.Argument(
        metavar="RUN...",
        help="A run, a search or a comparison: its YAML, folder or URL. Several runs are shown "
        "side by side.",
    ),
]
Open = Annotated[bool, typer.Option("--open", help="Show the page in a browser.")]
AsText = Annotated[bool, typer.Option("--text", help="Print numbers and plots in the terminal.")]
Png = Annotated[
    Path | None, typer.Option("--png", metavar="DIR", help="Write each plot as a picture.")
]
Out = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Where the page goes: beside what it shows if not given, and for several runs "
        "./report.html.",
    ),
]


@app.command("report")
def report(
    runs: Named,
    open_page: Open = False,
    text: AsText = False,
    png: Png = None,
    out: Out = None,
    json: Json = False,
) -> dict[str, Any]:
    """Write a page that shows a run, a search or a comparison; it may still be going on."""
    from orpo_ray.cli.console import announce
    from orpo_ray.report.pictures import refuse_without_matplotlib, write_pictures
    from orpo_ray.report.write import keep, page_of, write_to
    from orpo_ray.runs.files import REPORT_FILE
    from orpo_ray.runs.shown import named_shown

    if png is not None:
        refuse_without_matplotlib()
    shown = [named_shown(each) for each in runs]
    page = page_of(shown, announce)
    if out is None and len(shown) == 1:
        place, file = keep(page, shown[0]), shown[0].path(REPORT_FILE)
    else:
        file = out or Path(REPORT_FILE)
        write_to(page, file)
        place = str(file)
    found: dict[str, Any] = {"report": place}
    if png is not None:
        found["pictures"] = write_pictures(page, png)
    if text and not json:
        _print(page)
    if not json:
        print("\n".join([f"report: {place}", *found.get("pictures", ())]))
    if open_page:
        _open(file)
    return found


def _print(page: Any) -> None:
    import shutil
    import sys

    from orpo_ray.report.terminal import text

    width = min(100, shutil.get_terminal_size().columns)
    print(text(page, width, colours=sys.stdout.isatty()))


def _open(file: Path) -> None:
    import webbrowser

    from orpo_ray.cli.console import announce

    if not webbrowser.open(file.resolve().as_uri()):
        announce(f"--open: no browser was found here; open {file} in one")
