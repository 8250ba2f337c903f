"""The tables of `orpo-ray compare`."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from orpo_ray.runs.comparison import Comparison, Standing, Verdict

_WIDTH = 120
_JUDGED = ("accuracy", "± seeds", "wins against the base", "broken answers")
_LOG_PROBS = ("margin", "chosen", "rejected", "NLL")
_COSTS = ("budget used", "seconds", "pairs/s", "peak GB", "device-hours")


def print_comparison(found: Comparison) -> None:
    """Print what every method reached, which differences are real, and what that means."""
    console = Console(width=max(_WIDTH, Console().width))
    budget = f"{found.budget['amount']:,.0f} {found.budget['unit']}"
    console.print(
        Text(
            f"{found.name}: {found.status}; {found.train_pairs:,} training pairs, {found.pairs:,} "
            f"held out, a budget of {budget} for each method and seed"
        ),
        soft_wrap=True,
    )
    if found.methods:
        console.print(_standings(found.methods))
        console.print(_log_probs(found.methods))
        console.print(_costs(found.methods))
        for verdict in found.verdicts:
            console.print(Text(f"{_said(verdict)}"), soft_wrap=True)
    for point in found.curve:
        console.print(Text(f"with {point.pairs:,} training pairs:"), soft_wrap=True)
        console.print(_standings(point.methods))
    for line in found.reading:
        console.print(Text(line), soft_wrap=True)
    if found.report is not None:
        console.print(Text(f"page: {found.report}"), soft_wrap=True)


def _standings(methods: tuple[Standing, ...]) -> Table:
    """What methods are judged by."""
    table = _table("held-out pairs, with 95 % intervals", _JUDGED)
    for each in methods:
        if each.accuracy is None:
            table.add_row(each.method, each.state)
            continue
        table.add_row(
            each.method,
            _between(each.accuracy, each.low, each.high),
            _figure(each.spread.get("accuracy"), ".3f"),
            _between(each.win_rate, each.win_low, each.win_high),
            _figure(each.broken, ".0%"),
        )
    return table


def _log_probs(methods: tuple[Standing, ...]) -> Table:
    """What explains it. A method's own scale decides the margin, so nothing is ranked by it."""
    table = _table("log-probs a token, which tell methods apart but rank none", _LOG_PROBS)
    for each in methods:
        if each.accuracy is not None:
            table.add_row(
                each.method,
                _between(each.margin, each.margin_low, each.margin_high),
                _between(each.chosen_log_prob, each.chosen_low, each.chosen_high),
                _between(each.rejected_log_prob, each.rejected_low, each.rejected_high),
                _between(each.nll, each.nll_low, each.nll_high),
            )
    return table


def _table(title: str, columns: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("method", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _costs(methods: tuple[Standing, ...]) -> Table:
    table = _table("what it took, on average over seeds", _COSTS)
    for each in methods:
        if each.accuracy is None:
            continue
        peak = None if each.peak_memory_bytes is None else each.peak_memory_bytes / 1e9
        cells = (
            _figure(each.budget_used, ",.0f"),
            _figure(each.seconds, ",.1f"),
            _figure(each.pairs_per_second, ".1f"),
            _figure(peak, ".2f"),
            _figure(each.device_hours, ".3f"),
        )
        table.add_row(each.method, *cells)
    return table


def _said(verdict: Verdict) -> str:
    of = "" if verdict.verdict == "within noise" else " than"
    joined = f"{verdict.method} is {verdict.verdict}{of} {verdict.other}"
    if not of:
        joined = f"{verdict.method} and {verdict.other}: within noise"
    return f"{joined}: accuracy {verdict.difference:+.3f} [{verdict.low:+.3f}, {verdict.high:+.3f}]"


def _between(value: float | None, low: float | None, high: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if low is None or high is None else f"{value:.3f} [{low:.2f}, {high:.2f}]"


def _figure(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
