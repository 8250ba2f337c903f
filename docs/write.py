"""Write the generated parts of the documentation: `make docs`.

docs/configuration.md comes from the schema of a config. In docs/methods.md the table of search
ranges is replaced, and in the READMEs of examples what the planner says of them. Tests compare all
of it with what this script would write.
"""

import argparse
import json
import os
import re
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import orpo_ray
from orpo_ray.config import RunConfig
from orpo_ray.config.keys import EXTENDS
from orpo_ray.config.objectives import OBJECTIVES
from orpo_ray.config.schema import EXTENDS_FIELD
from orpo_ray.config.suited import SMALL_BASE, Suited, suited_rates

DOCS = Path(__file__).resolve().parent
CONFIGURATION, METHODS = DOCS / "configuration.md", DOCS / "methods.md"
BEGIN, END = "<!-- ranges: written by make docs -->", "<!-- end of ranges -->"
EXAMPLES = DOCS.parent / "examples"
PLANNED = re.compile(
    r"^(<!-- planned: (.+) -->\n)(?:.*\n)*?(<!-- end of planned -->)$", re.MULTILINE
)
"""A place for what `orpo-ray plan` says, with the words after that command."""

_GIB = 2**30

_HEAD = """# Configuration

A config is a YAML file of sections. Every setting can also be given on the command line as
`section.key=value`, after the file; `orpo-ray config show CONFIG.yaml` prints all of them with
their defaults. A single value stands for a list of one. This page is written from the schema by
`make docs`; `orpo-ray config schema` prints the schema for editors.

## A config that changes another one: `extends`

```yaml
extends: ../bases/mistral-7b.yaml
name: lower-rate
training: {learning_rate: 5.0e-5}
```

`extends`, at the top of a file, names one other config. The run has the settings of that config,
changed by those of this file:

- A setting of a section replaces that setting alone, as an override does. The other settings of the
  section stay.
- A list, and anything else inside a setting (`data.train`, `search.space`, `scale.deepspeed`), is
  replaced as a whole. `null` takes a setting or a section back.
- An `objective` of another `kind` replaces the whole section: `lambda` of orpo does not become a
  setting of dpo. The settings of all other sections stay, `training.learning_rate` too: what suits
  orpo is much too high for dpo, so a base for several objectives names no rate.
- The other config may extend a third one. It needs no `name`, and no other setting either.

The path of `extends` starts in the folder of the file that names it; it may be absolute, or begin
with `~`. Paths in settings, such as those of pairs and of a base, start in the folder where the
command is given, no matter which file holds them. Files in a bucket extend nothing.

`orpo-ray config show` prints what comes out. That is also what a run keeps as `config.json`, and
what `orpo-ray submit` sends: a cluster needs only that. A mistake is told with the file and the
line that has it.
"""
_OBJECTIVE = """## The objective: `objective`

`kind` names it; each has its own keys.
"""
_SECTIONS = {
    "": ("RunConfig", "The run"),
    "model": ("ModelConfig", "The base"),
    "adapter": ("AdapterConfig", "What is trained"),
    "data": ("DataConfig", "The pairs"),
    "data.train, data.eval": ("Source", "One source of pairs"),
    "data.columns": ("Columns", "Columns of a format that is not recognised"),
    "training": ("TrainingConfig", "Optimisation, evaluation, checkpoints"),
    "training.galore": ("GaloreConfig", "GaLore's optimizers"),
    "scale": ("ScaleConfig", "Workers"),
    "scale.deepspeed": ("DeepSpeedConfig", "A ZeRO stage"),
    "search": ("SearchConfig", "A search"),
    "compare": ("CompareConfig", "A comparison of methods"),
    "compare.budget": ("BudgetConfig", "What each method may use"),
    "compare.judge": ("JudgeConfig", "Who judges answers"),
}
_NESTED = ("model", "adapter", "data", "objective", "training", "scale", "search", "compare")


def configuration() -> str:
    """The whole page."""
    schema = RunConfig.model_json_schema(by_alias=True)
    models = {"RunConfig": schema, **schema["$defs"]}
    schema["properties"] = {EXTENDS: EXTENDS_FIELD, **schema["properties"]}
    parts = [_HEAD]
    for section, (model, title) in _SECTIONS.items():
        skipped = _NESTED if not section else ()
        parts.append(_section(title, section, models, models[model], skipped))
        if section == "data.columns":
            parts.append(
                "## The objective: `objective`\n\n`kind` names it; each has its own keys.\n"
            )
            parts += [_objective(kind, models) for kind in sorted(OBJECTIVES)]
    return "\n".join(parts)


def _objective(kind: str, models: dict[str, Any]) -> str:
    model = models[OBJECTIVES[kind].__name__]
    return _section(f"`kind: {kind}`", "", models, model, ("kind",), level=3)


def _section(
    title: str,
    section: str,
    models: dict[str, Any],
    model: dict[str, Any],
    skipped: tuple[str, ...],
    *,
    level: int = 2,
) -> str:
    heading = f"{'#' * level} {title}" + (f": `{section}`" if section else "")
    rows = [
        f"| `{name}` | {_default(name, field, model)} | {_values(field, models)} | "
        f"{_cell(field.get('description', ''))} |"
        for name, field in model["properties"].items()
        if name not in skipped
    ]
    table = ["| key | default | values | what it is |", "|---|---|---|---|", *rows] if rows else []
    about = " ".join(str(model.get("description", "")).split())
    return "\n".join([heading, "", textwrap.fill(about, 100), "", *table, ""])


def _default(name: str, field: dict[str, Any], model: dict[str, Any]) -> str:
    if name in model.get("required", ()):
        return "required"
    return f"`{json.dumps(field.get('default'))}`" if "default" in field else "empty"


def _values(field: dict[str, Any], models: dict[str, Any]) -> str:
    """What a field may hold, in words."""
    return _cell(" or ".join(dict.fromkeys(_kinds(field, models))))


def _kinds(field: dict[str, Any], models: dict[str, Any]) -> Iterator[str]:
    if "anyOf" in field:
        for option in field["anyOf"]:
            yield from _kinds(option, models)
    elif "$ref" in field:
        yield "a section"
    elif "enum" in field:
        yield " or ".join(f"`{json.dumps(value)}`" for value in field["enum"])
    elif "const" in field:
        yield f"`{json.dumps(field['const'])}`"
    elif field.get("type") == "array":
        items = field.get("items", {})
        yield f"a list of {_values(items, models)}" if "enum" in items else "a list"
    else:
        yield _plain(field)


def _plain(field: dict[str, Any]) -> str:
    names = {
        "integer": "a whole number",
        "number": "a number",
        "string": "text",
        "boolean": "`true` or `false`",
        "object": "a section",
        "null": "`null`",
    }
    limits = {
        "exclusiveMinimum": "above",
        "minimum": "at least",
        "exclusiveMaximum": "below",
        "maximum": "at most",
    }
    kind = names.get(str(field.get("type")), "anything")
    said = [f"{word} {field[key]:.16g}" for key, word in limits.items() if key in field]
    return f"{kind} {', '.join(said)}" if said else kind


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def methods(page: str) -> str:
    """The page with its table of ranges as they are now."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{_ranges()}\n\n{END}{after}"


def _ranges() -> str:
    rows = []
    for kind, settings in sorted(OBJECTIVES.items()):
        spaces = [("", settings.search_space)] + [
            (f" with `{name}: {value}`", space)
            for (name, value), space in settings.special_spaces.items()
        ]
        rows += [
            _row(f"`{field}` of {kind}{when}", suited)
            for when, space in spaces
            for field, suited in space.items()
        ]
    for adapter, name in (("lora", "LoRA"), ("none", "all weights")):
        for likelihood in (True, False):
            for size, count in (("1B and more", SMALL_BASE), ("below 1B", SMALL_BASE - 1)):
                term = "with" if likelihood else "without"
                what = f"`training.learning_rate`, {name}, loss {term} a likelihood term, {size}"
                rows.append(_row(what, suited_rates(adapter, likelihood, count)))
    return "\n".join(["| what | range | source |", "|---|---|---|", *rows])


def _row(what: str, suited: Suited) -> str:
    ((kind, (low, high)),) = suited.range.items()
    drawn = ", on a log scale" if kind == "loguniform" else ""
    return f"| {what} | {low:g} to {high:g}{drawn} | {_cell(suited.source)} |"


def example(page: str) -> str:
    """The page of an example, with what the planner says of its configs now."""
    return PLANNED.sub(lambda found: found[1] + _planned(found[2].split()) + found[3], page)


def _planned(words: list[str]) -> str:
    """One sentence on the run that these words of `orpo-ray plan` name, wrapped."""
    parser = argparse.ArgumentParser()
    parser.add_argument("config")
    parser.add_argument("--gpu")
    parser.add_argument("--count", type=int)
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--network", default="1gbit")
    options = vars(parser.parse_args(words))
    path = DOCS.parent / options.pop("config")
    # Neither prepared pairs nor calibrations of this machine may tell.
    with tempfile.TemporaryDirectory() as empty, patch.dict(os.environ, XDG_CONFIG_HOME=empty):
        config = orpo_ray.load_config(path, [f"storage={empty}"])
        found = orpo_ray.estimate(config, console=orpo_ray.Console(), **options)
    return (
        textwrap.fill(_sentence(found), 100, break_on_hyphens=False, break_long_words=False) + "\n"
    )


def _sentence(found: orpo_ray.Estimate) -> str:
    (plan,), lengths, place = found.gpus, found.paper.lengths, found.paper.place
    title = plan.gpu.title.removeprefix("NVIDIA ").removeprefix("GeForce ")
    if not plan.fits:
        missing = plan.worst.fit.missing / _GIB
        return f"**Planned:** it does not fit into {title}: {missing:.1f} GiB are missing."
    hours, tokens, peak = plan.search or plan.hours, plan.worst.fit.tokens, plan.worst.fit.peak
    assert hours is not None and tokens is not None
    training = found.paper.config.training
    rows = "rows" if found.paper.config.objective.reads_single_answers else "pairs"
    amount = f"{lengths.pairs:,} {rows}"
    if training.max_steps is not None:
        amount = f"{training.max_steps} steps of {training.pairs_per_step} {rows}"
    where = f"{place.workers} x {title}" if place.workers > 1 else f"one {title}"
    if place.nodes > 1:
        where += f" in {place.nodes} servers over {place.network.name}"
    what = "the whole search takes" if plan.search else "the run takes"
    each = "a trial has " if plan.search else ""
    kinds = "assumed lengths" if lengths.is_assumed else "known lengths"
    return (
        f"**Planned, not measured:** on {where} {what} {_time(hours.low, hours.high)} ({each}"
        f"{amount} of {kinds}). A GPU needs {peak.low / _GIB:.1f} to {peak.high / _GIB:.1f} of its "
        f"{plan.gpu.memory / _GIB:.1f} GiB, with up to {tokens:,} tokens in a micro-batch "
        "([docs/planning.md](../../docs/planning.md))."
    )


def _time(low: float, high: float) -> str:
    """Hours, or minutes where these read better."""
    if high < 2:
        return f"{60 * low:.0f} to {60 * high:.0f} minutes"
    return f"{low:.1f} to {high:.1f} hours"


def main() -> None:
    """Write the pages, and what is generated in others."""
    CONFIGURATION.write_text(configuration(), encoding="utf-8")
    METHODS.write_text(methods(METHODS.read_text(encoding="utf-8")), encoding="utf-8")
    for page in EXAMPLES.rglob("README.md"):
        page.write_text(example(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
