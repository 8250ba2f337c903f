"""The course of a comparison: which run is next, and what follows from its end.

This module does not use Ray.
"""

from collections.abc import Mapping, Sequence

from orpo_ray.config import RunConfig
from orpo_ray.runs.comparison import Comparison, Entry
from orpo_ray.runs.comparison_run import ComparisonRun
from orpo_ray.runs.console import Console
from orpo_ray.runs.search import State


class Tournament:
    """The runs of a comparison, from those on record to the last one."""

    def __init__(
        self,
        run: ComparisonRun,
        comparison: Comparison,
        configs: Mapping[str, RunConfig],
        console: Console,
    ) -> None:
        self._run, self._comparison, self._console = run, comparison, console
        self._configs = configs
        self._left = [entry for entry in comparison.entries if entry.state == "running"]

    @property
    def is_over(self) -> bool:
        """Whether every run has been begun."""
        return not self._left

    def next(self) -> tuple[Entry, RunConfig] | None:
        """The next run and its config, or None."""
        if not self._left:
            return None
        entry = self._left.pop(0)
        return entry, self._configs[entry.run]

    def evaluated(
        self, entry: Entry, step: int, total_steps: int, evaluation: Mapping[str, float]
    ) -> bool:
        """Show an evaluation. No run of a comparison is given up."""
        accuracy = evaluation.get("eval/accuracy")
        shown = "" if accuracy is None else f", accuracy {accuracy:.3f}"
        entry.steps = step
        self._console.announce(
            f"{entry.method}, seed {entry.seed}: step {step} of {total_steps}{shown}"
        )
        return False

    def finished(self, entry: Entry) -> None:
        """Record that a run was trained to its end."""
        self._end(entry, "finished")

    def failed(self, entry: Entry, error: str, may_pass: bool = False) -> None:
        """Record that a run ended with an error. The others continue."""
        entry.error, entry.may_pass = error, may_pass
        self._end(entry, "failed")

    def _end(self, entry: Entry, state: State) -> None:
        entry.state = state
        why = "" if entry.error is None else f": {entry.error}"
        done = sum(each.state != "running" for each in self._comparison.entries)
        self._console.announce(
            f"{entry.method}, seed {entry.seed}: {state}{why} "
            f"[{done} of {len(self._comparison.entries)} runs]"
        )
        self._run.keep(self._comparison)


def entries_of(
    known: Sequence[Entry], methods: Sequence[str], seeds: int, runs: Mapping[tuple[str, int], str]
) -> list[Entry]:
    """A run for each method and seed: those on record, then new ones, seed by seed.

    A failed run is tried again if its error may be temporary.
    """
    found = {(entry.method, entry.seed): entry for entry in known}
    entries: list[Entry] = []
    for seed in range(seeds):
        for method in methods:
            entry = found.get((method, seed))
            if entry is None:
                entry = Entry(number=0, method=method, seed=seed, run=runs[method, seed])
            if entry.state == "failed" and entry.may_pass:
                entry.state, entry.error, entry.may_pass = "running", None, False
            entry.number = len(entries)
            entries.append(entry)
    return entries
