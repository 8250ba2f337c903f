"""A run in stages, such as SFT and then DPO, as a chain of ordinary runs."""

from collections.abc import Mapping
from typing import Any

from orpo_ray.config.build import build, dump
from orpo_ray.config.merge import merged
from orpo_ray.config.plain_yaml import Key
from orpo_ray.config.run import RunConfig
from orpo_ray.config.storage import inside
from orpo_ray.errors import ConfigError

_SHAPE = ("kind", "r", "alpha", "targets", "dora", "rslora")


def stage_configs(config: RunConfig, places: Mapping[Key, str] | None = None) -> list[RunConfig]:
    """The config of each stage: the run's own settings, changed by those of the stage.

    Its folder lies in the run's folder. A stage starts from the result of the one before, unless
    it names another adapter. That result is its reference, too. `places` says where each key was
    written. Raises ConfigError for any stage that is not valid, before the first one runs.
    """
    common = dump(config.model_copy(update={"stages": (), "search": None, "compare": None}))
    stages: list[RunConfig] = []
    for number, changes in enumerate(config.stages):
        tree = merged(common, changes)
        tree["name"] = f"{config.name}/{number + 1}-{tree['objective'].get('kind', 'orpo')}"
        _refuse_other_base(number, common["model"], tree["model"])
        if stages and not changes.get("adapter", {}).get("init_from"):
            _start_from(tree, stages[-1], changes.get("adapter", {}))
        stage = build(
            RunConfig, tree, _places_of(number, changes, {(): config.name, **(places or {})})
        )
        if stages:
            _refuse_other_shape(number, stages[-1], stage)
        stages.append(stage)
    return stages


def _places_of(
    number: int, changes: Mapping[str, Any], places: Mapping[Key, str]
) -> dict[Key, str]:
    """Where each key of a stage was written.

    For a section whose place is not known, the place of the stage.
    """
    written = next(places[key] for key in (("stages", number), ("stages",), ()) if key in places)
    common = {key: place for key, place in places.items() if not key or key[0] not in changes}
    own = {
        key[2:]: place
        for key, place in places.items()
        if key[:2] == ("stages", number) and len(key) > 2
    }
    return {**common, **{(section,): written for section in changes}, **own}


def _refuse_other_base(number: int, common: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    """Raise ConfigError for a stage on another base: each stage continues the one before."""
    for key in ("base", "revision"):
        if model[key] != common[key]:
            raise ConfigError(
                f"stages.{number}.model.{key}: all stages train the run's base; set model.{key} "
                "instead"
            )


def _start_from(tree: dict[str, Any], former: RunConfig, own: Mapping[str, Any]) -> None:
    """Name the result of the stage before. Only the first stage makes a new adapter."""
    if tree["adapter"]["kind"] == "none":
        tree["model"] = {**tree["model"], "base": inside(former.place, "adapter"), "revision": None}
    else:
        start = {"init": "default", **own, "init_from": former.place}
        tree["adapter"] = {**tree["adapter"], **start}


def _refuse_other_shape(number: int, former: RunConfig, stage: RunConfig) -> None:
    """Raise ConfigError for an adapter that cannot start from the adapter of the stage before.

    Without this check the stage would fail only after hours of training.
    """
    if stage.adapter.init_from not in (None, former.place):
        return
    saved = former.adapter.saved_shape
    for key in _SHAPE:
        before, here = saved.get(key, getattr(former.adapter, key)), getattr(stage.adapter, key)
        if before != here:
            why = ""
            if key in saved and before != getattr(former.adapter, key):
                why = f" (init: {former.adapter.init} doubles the rank at the same scale)"
            raise ConfigError(
                f"stages.{number}.adapter.{key}: {here}, but the stage before it saves an adapter "
                f"with {before}{why}; use the same value"
            )
