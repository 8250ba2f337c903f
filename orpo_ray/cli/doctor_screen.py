"""The screen of `orpo-ray doctor`: servers side by side, then findings with their fixes."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

_STYLES = {"stops": "bold red", "warning": "yellow", "note": "cyan", "ok": "green"}
_SIDE_BY_SIDE = 4
"""How many servers fit beside one another on a screen."""


def print_checkup(result: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the JSON object of a checkup."""
    console = console or Console()
    servers = result["servers"]
    several = len(servers) > 1
    if several:
        for first in range(0, len(servers), _SIDE_BY_SIDE):
            console.print(_side_by_side(servers[first : first + _SIDE_BY_SIDE]))
    console.print(_table(list(_together(result)), len(servers)))
    console.print(Text(_summary(result, several)), soft_wrap=True)


def _together(result: Mapping[str, Any]) -> Iterator[tuple[dict[str, str], list[str]]]:
    """Each finding once, with the servers that have it; none for one about the whole cluster."""
    found: list[tuple[dict[str, str], list[str]]] = [
        (finding, []) for finding in result["findings"]
    ]
    for server in result["servers"]:
        for finding in server["findings"]:
            same = next((names for other, names in found if other == finding), None)
            if same is None:
                found.append((finding, [server["name"]]))
            else:
                same.append(server["name"])
    yield from sorted(found, key=lambda pair: list(_STYLES).index(pair[0]["level"]))


def _table(found: Sequence[tuple[dict[str, str], list[str]]], servers: int) -> Table:
    """Findings by severity. What is well is left out where servers stand side by side."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding, names in found:
        level = finding["level"]
        if level == "ok" and names and servers > 1:
            continue
        what = Text()
        if names and servers > 1:
            who = "every server" if len(names) == servers else ", ".join(names)
            what.append(f"{who}: ")
        what.append(finding["what"])
        if finding["fix"]:
            what.append(f"\nfix: {finding['fix']}", style="bold")
        table.add_row(Text(level, style=_STYLES[level]), Text(finding["subject"]), what)
    return table


def _side_by_side(servers: Sequence[Mapping[str, Any]]) -> Table:
    """A column for each server: what is well in words, and how bad the rest is."""
    table = Table(box=None, pad_edge=False)
    table.add_column()
    for server in servers:
        table.add_column(server["name"], overflow="fold", ratio=1)
    subjects = dict.fromkeys(
        finding["subject"] for server in servers for finding in server["findings"]
    )
    for subject in subjects:
        table.add_row(subject, *(_cell(server["findings"], subject) for server in servers))
    return table


def _cell(findings: Sequence[Mapping[str, str]], subject: str) -> Text:
    """The worst finding about a subject, which comes first."""
    worst = next((each for each in findings if each["subject"] == subject), None)
    if worst is None:
        return Text("")
    if worst["level"] == "ok":
        return Text(worst["what"])
    return Text(worst["level"], style=_STYLES[worst["level"]])


def _summary(result: Mapping[str, Any], several: bool) -> str:
    where = f"{len(result['servers'])} servers" if several else "this machine"
    stops = result["stops"]
    if not stops:
        return f"nothing that was looked at stops a run on {where}"
    return f"{stops} finding{'s' if stops > 1 else ''} would stop a run on {where}"
