"""Continues a finished run with more steps."""

from typing import Any

from orpo_ray.config import warmup_steps
from orpo_ray.errors import ConfigError
from orpo_ray.runs.changes import EXTENSION_KEYS, EXTENSIONS, refuse_changed_config
from orpo_ray.runs.files import CONFIG_FILE, RUN_FILE, read_json
from orpo_ray.runs.run import Run


def refuse_unfinished(run: Run) -> None:
    """Raise ConfigError for a run that is not finished and has no extension to resume."""
    if run.result() is None and not run.facts().get(EXTENSIONS):
        raise ConfigError(
            f"--extend: run {run.name} in {run.storage_place} is not finished; "
            "the same command without --extend trains it"
        )


def extend(run: Run, total_steps: int) -> None:
    """Reopen a finished run, so that `train` resumes it up to `total_steps`.

    An extension that has begun is left as it is. Raises ConfigError if the run has that many steps
    already, or if other settings changed.
    """
    result, facts = run.result(), run.facts()
    if result is None:
        return
    stored = read_json(run.path(CONFIG_FILE))
    assert stored is not None, "a finished run has its settings"
    refuse_changed_config(stored, run.config, (*run.free_keys, *EXTENSION_KEYS))
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
    earlier = facts.get(EXTENSIONS, [])
    # A process that died in the lines below has left the first settings on record. The stored ones
    # may be the new ones already.
    if not earlier or earlier[-1]["step"] < result.steps:
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
    training = run.config.training
    return (
        f"run {run.name} continues after step {schedule_from(run.facts())}: "
        f"a {training.schedule} schedule with a peak rate of {training.learning_rate:g} covers "
        "the new steps"
    )
