"""The JSON Schema of a config's file, by which editors complete and check it."""

from typing import Any

from orpo_ray.config.keys import EXTENDS
from orpo_ray.config.run import RunConfig

EXTENDS_FIELD = {
    "type": "string",
    "minLength": 1,
    "description": "YAML file whose settings this file changes; its path starts where this file is",
}
"""`extends` as the schema describes it."""


def schema() -> dict[str, Any]:
    """The schema of a run's settings, and of `extends`.

    A file that extends another one may inherit what every run needs, so only the others must have
    it: draft 2020-12, `if` and `then`.
    """
    described = RunConfig.model_json_schema(by_alias=True)
    needed: dict[str, Any] = {"required": described.pop("required"), "properties": {}}
    for name, field in described["properties"].items():
        section = described["$defs"].get(field.get("$ref", "").rpartition("/")[2], {})
        if "required" in section:
            needed["properties"][name] = {"required": section.pop("required")}
    described["properties"] = {EXTENDS: EXTENDS_FIELD, **described["properties"]}
    return {**described, "if": {"not": {"required": [EXTENDS]}}, "then": needed}
