"""What a run is: its base, its settings, its pairs, what it decided and why."""

from collections.abc import Mapping
from typing import Any

from orpo_ray.config import dump
from orpo_ray.report.content import RunContent
from orpo_ray.report.page import Block, Curve, Facts, LinePlot, Plots, Section, Table
from orpo_ray.report.words import duration, number, plain, size
from orpo_ray.runs.files import PAIRS, PLAN, REASONS

_SHOWN = {
    "training": (
        "learning_rate",
        "pairs_per_step",
        "schedule",
        "warmup",
        "optimizer",
        "weight_decay",
        "max_grad_norm",
        "seed",
    ),
    "adapter": ("kind", "r", "alpha", "dropout", "targets", "init", "init_from"),
}


def what_it_is(run: RunContent) -> Section:
    """The section on base, settings, decisions and versions."""
    facts = run.facts
    decided = [(_name(key), plain(value)) for key, value in facts.get("decisions", {}).items()]
    blocks: list[Block] = [
        Facts(tuple(_settings(run)), "Settings"),
        Facts(tuple(row for row in decided if row[0] != "find budget"), "Decided"),
    ]
    if reasons := facts.get(REASONS):
        blocks.append(Facts(tuple(("", str(line)) for line in reasons), "Why"))
    identity = facts.get("identity", {})
    hashes = [(f"hash of {name}", str(value)[:16]) for name, value in identity.items()]
    versions = [(name, str(value)) for name, value in facts.get("versions", {}).items()]
    blocks.append(Facts((*hashes, *versions, ("folder", run.place)), "Inputs and versions"))
    return Section("What it is", tuple(block for block in blocks if _says(block)))


def _says(block: Block) -> bool:
    return not isinstance(block, Facts) or bool(block.rows)


def _settings(run: RunContent) -> list[tuple[str, str]]:
    tree = dump(run.config)
    model, objective, training = tree["model"], dict(tree["objective"]), tree["training"]
    base = model["base"] + (f" at {model['revision']}" if model.get("revision") else "")
    kind = objective.pop("kind")
    length = training.get("max_steps")
    told = [
        ("base", base),
        ("quantisation", plain(model["quantization"])),
        ("objective", ", ".join([kind, *(f"{_name(k)} {plain(v)}" for k, v in objective.items())])),
        ("length", f"{length} steps" if length else f"{plain(training.get('epochs'))} epochs"),
    ]
    for section, names in _SHOWN.items():
        values = tree[section]
        told += [
            (f"{_name(section)}: {_name(name)}", plain(values[name]))
            for name in names
            if values.get(name) is not None
        ]
    return told


def _name(key: str) -> str:
    return key.replace("_", " ")


def of_pairs(facts: Mapping[str, Any]) -> Section | None:
    """The section on the pairs: counts, drops with reasons, lengths. None if not on record."""
    found = facts.get(PAIRS)
    if not found:
        return None
    counts = (
        ("training pairs", f"{found['train']:,}"),
        ("held-out pairs", f"{found['eval']:,}"),
        ("rows read", f"{found['read']:,}"),
        ("hash", str(found["hash"])[:16]),
    )
    blocks: list[Block] = [Facts(counts, "Counts")]
    if dropped := found.get("dropped"):
        blocks.append(
            Table(
                title="Dropped",
                columns=("why", "rows"),
                rows=tuple((str(why), count) for why, count in dropped),
            )
        )
    sources = tuple(
        (str(each["name"]), str(each["used_for"]), each["read"], each["kept"])
        for each in found.get("sources", ())
    )
    if sources:
        columns = ("source", "used for", "read", "kept")
        blocks.append(Table(title="Sources", columns=columns, rows=sources, names=2))
    if (lengths := found.get("lengths")) and (plot := _histogram(lengths)).curves:
        blocks.append(Plots((plot,)))
    return Section("Pairs", tuple(blocks))


def _histogram(lengths: Mapping[str, Any]) -> LinePlot:
    edges = lengths["edges"]
    curves = tuple(
        Curve(
            name=side,
            points=tuple(zip(map(float, edges), map(float, (*counts, 0)), strict=True)),
            hue=hue,
            whole=len(counts),
        )
        for hue, (side, counts) in zip((0, 2, 3), lengths["sides"].items(), strict=False)
        if any(counts)
    )
    return LinePlot(
        title="Lengths of training pairs",
        x_name="tokens",
        y_name="pairs",
        curves=curves,
        in_stairs=True,
        zooms=False,
    )


def planned(run: RunContent) -> Table | None:
    """What was planned beside what was measured; None if nothing was planned."""
    plan = run.facts.get(PLAN) or {}
    predicted, measured = plan.get("predicted"), plan.get("measured", {})
    if not predicted:
        return None
    rows = [
        _planned_row(name, predicted.get(key), measured.get(key), shown)
        for name, key, shown in (
            ("time", "seconds", duration),
            ("pairs a second", "pairs_per_second", number),
            ("memory of a worker", "peak_bytes", size),
        )
    ]
    rows[0] = (*rows[0][:-1], "")  # the two times do not hold the same things
    return Table(
        title="Planned and measured",
        columns=("", "planned", "from and to", "measured", "difference"),
        rows=tuple(rows),
        note="The planned time holds the start, evaluations and checkpoints, too; the measured one "
        "is that of the steps.",
    )


def _planned_row(name: str, ends: Any, found: float | None, shown: Any) -> tuple[str, ...]:
    if not ends:
        return (name, "", "", shown(found), "")
    low, middle, high = ends
    off = "" if found is None or not middle else f"{100 * (found / middle - 1):+.0f} %"
    return (name, shown(middle), f"{shown(low)} to {shown(high)}", shown(found), off)
