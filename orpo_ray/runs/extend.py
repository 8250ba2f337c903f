"""Continues a finished run with more steps."""

from typing import Any

from orpo_ray.config import dump, warmup_steps
from orpo_ray.errors import ConfigError
from orpo_ray.runs.changes import refuse_changed_config
from orpo_ray.runs.files import CONFIG_FILE, RUN_FILE, read_json
from orpo_ray.runs.run import Run

EXTENSIONS = "extensions"
"""The key of run.json that lists extensions.

Each has the step after which it began, and the settings and metrics before it.
"""

_MAY_CHANGE = (
    "training.max_steps",
    "training.epochs",
    "training.learning_rate",
    "training.schedule",
    "training.warmup",
)
"""Settings that define a new schedule over further steps."""


def refuse_unfinished(run: Run) -> None:
    """Raise ConfigError for a run that is not finished and has no extension to resume."""
    if run.result() is None and not run.facts().get(EXTENSIONS):
        raise ConfigError(
            f"--extend: run {run.name} in {run.storage_place} is not finished; "
            "the same command without --extend trains it"
        )


def extend(run: Run, total_steps: int) -> None:
    """Make a finished run an unfinished one of `total_steps`, for `train` to resume.

    An extension that has begun is left as it is. Raises ConfigError if the run has that many steps
    already, or if other settings changed.
    """
    result, facts = run.result(), run.facts()
    if result is None:
        return
    stored = read_json(run.path(CONFIG_FILE))
    assert stored is not None, "a finished run has its settings"
    refuse_changed_config(stored, run.config, (*run.free_keys, *_MAY_CHANGE))
    more = total_steps - result.steps
    if more <= 0:
        raise ConfigError(
            f"--extend: run {run.name} has {result.steps} steps already, and these settings make "
            f"{total_steps}; ask for more, such as training.max_steps={2 * result.steps}"
        )
    if (warmup := warmup_steps(run.config.training.warmup, more)) >= more:
        raise ConfigError(
            f"training.warmup: {warmup} steps, but only {more} steps are added; set it to less"
        )
    begun = {"step": result.steps, "training": stored.get("training"), "metrics": result.metrics}
    earlier = [past for past in facts.get(EXTENSIONS, []) if past["step"] < result.steps]
    run.add_facts({EXTENSIONS: [*earlier, begun]})
    run.store(RUN_FILE)
    run.write_config()
    run.reopen()


def schedule_from(facts: dict[str, Any]) -> int:
    """The step after which the present schedule of a run began."""
    extensions = facts.get(EXTENSIONS)
    return int(extensions[-1]["step"]) if extensions else 0


def described(run: Run) -> str:
    """The line that announces an extension."""
    settings = dump(run.config)["training"]
    return (
        f"run {run.name} continues after step {schedule_from(run.facts())}: "
        f"a {settings['schedule']} schedule from {settings['learning_rate']:g} over the rest"
    )
