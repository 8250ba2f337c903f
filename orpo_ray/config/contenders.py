"""The run that a method of a comparison makes of a config: its stages, its settings, its seed."""

from typing import Any

from orpo_ray.config.build import build, dump
from orpo_ray.config.compare import THEN, CompareConfig, folder_name
from orpo_ray.config.merge import merged
from orpo_ray.config.run import RunConfig
from orpo_ray.config.stages import stage_configs

FOLDER = "compare"
"""The folder of a comparison inside its run."""
PILOT_STEPS = 16
"""Steps of the short run by which a budget in seconds learns a method's speed."""
_PILOT = {"warmup": 0.0, "eval_every": 1.0, "samples": 0}
"""Its training: evaluations and answers tell nothing, and a warm-up may be longer than the run."""


def settings_of(config: RunConfig) -> CompareConfig:
    """The section of a config that a comparison reads, or its defaults."""
    return config.compare or CompareConfig()


def folder_of(config: RunConfig, method: str) -> str:
    """The name of what belongs to a method, as a run's name."""
    return f"{config.name}/{FOLDER}/{folder_name(method)}"


def contender(config: RunConfig, method: str) -> RunConfig:
    """The run of a method: the config with the sections that the method changes.

    What the config itself says of an objective counts for that objective. Every other one has its
    usual settings and its usual learning rate. Raises ConfigError for settings that make no run.
    """
    settings, tree = settings_of(config), _common(config)
    own = {each.objective.kind: dump(each) for each in stage_configs(config) or [config]}
    parts = [_sections(settings, part, own) for part in method.split(THEN)]
    if len(parts) == 1:
        tree = merged(tree, parts[0])
    else:
        tree["stages"] = parts
    tree["name"] = folder_of(config, method)
    return build(RunConfig, tree, {(): f"compare.methods: {method}"})


def _common(config: RunConfig) -> dict[str, Any]:
    """What all methods share: no objective, no rate of one, and no stage."""
    tree = dump(config) | {"search": None, "compare": None, "stages": []}
    tree["objective"] = {"kind": "orpo"}
    tree["training"] = {**tree["training"], "learning_rate": None}
    # Without Ray, one worker would train in the trial's own process, which reserves no resources.
    tree["scale"] = {**tree["scale"], "ray": True}
    return tree


def _sections(
    settings: CompareConfig, part: str, own: dict[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """The sections that one part of a method changes."""
    changes = settings.changes(part)
    kind = changes.get("objective", {}).get("kind", "orpo")
    given = own.get(kind)
    if given is None or part != kind:
        return changes
    rate = {"learning_rate": given["training"]["learning_rate"]}
    return {
        **changes,
        "objective": {**given["objective"], **changes.get("objective", {})},
        "training": {**rate, **changes.get("training", {})},
    }


def seeded(run: RunConfig, number: int) -> RunConfig:
    """The same run with another seed, in a folder of its own."""
    training = run.training.model_copy(update={"seed": run.training.seed + number})
    return run.model_copy(update={"name": f"{run.name}/seed-{number}", "training": training})


def with_steps(run: RunConfig, steps: list[int]) -> RunConfig:
    """The run with so many steps in each of its stages."""
    if not run.stages:
        training = run.training.model_copy(update={"max_steps": steps[0], "epochs": None})
        return run.model_copy(update={"training": training})
    stages = tuple(
        {**stage, "training": {**stage.get("training", {}), "max_steps": count, "epochs": None}}
        for stage, count in zip(run.stages, steps, strict=True)
    )
    return run.model_copy(update={"stages": stages})


def pilot(run: RunConfig) -> RunConfig:
    """The short run that tells the speed of each stage of a method.

    It is alone, but takes no more cores than a run that is compared, which has others beside it.
    """
    training = run.training.model_copy(update=_PILOT)
    stages = tuple(
        {**stage, "training": {**stage.get("training", {}), **_PILOT}} for stage in run.stages
    )
    scale = run.scale.model_copy(update={"cpus_per_worker": run.scale.least_cpus})
    changes = {
        "name": f"{run.name}/pilot",
        "training": training,
        "stages": stages,
        "scale": scale,
    }
    return with_steps(run.model_copy(update=changes), [PILOT_STEPS] * max(1, len(stages)))
