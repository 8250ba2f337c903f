"""`export --adapter-only`: the adapter alone, for servers that load it beside its base."""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from orpo_ray.data.endings import end_texts
from orpo_ray.errors import ConfigError
from orpo_ray.evaluation.export_place import built
from orpo_ray.evaluation.exporting import (
    Comparison,
    Trained,
    Written,
    ask_trained,
    finish,
    write_beside,
    write_serve_page,
)
from orpo_ray.evaluation.likeness import Questions
from orpo_ray.models.base import fetch_base
from orpo_ray.models.hardware import DTYPES
from orpo_ray.models.identity import hub_name, hub_revision
from orpo_ray.models.serve_page import Served, served_name
from orpo_ray.models.trained import ADAPTER_CONFIG, fetch_trained, find_adapter
from orpo_ray.models.vllm import max_rank, refuse_unservable
from orpo_ray.runs.console import Announce
from orpo_ray.runs.results import NO_MERGE, Exported

_WEIGHTS = "adapter_model.safetensors"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


@dataclass(frozen=True)
class Base:
    """The base as every machine finds it: by its name on the hub, and its commit if known."""

    name: str
    revision: str | None


def base_on_hub(trained: Trained, given: str | None) -> Base:
    """The base's name on the hub. Raises ConfigError for a folder, unless a name is given."""
    model = trained.config.model
    known = hub_name(model.base)
    if given is not None and not _HUB_NAME.fullmatch(given):
        raise ConfigError(f"--base-name: must be OWNER/NAME, as on the hub, not {given}")
    if given is not None and known is not None and given != known:
        raise ConfigError(f"--base-name: {given} here, but the run's base is {known}")
    if known is not None:
        return Base(known, hub_revision(model))
    if given is None:
        raise ConfigError(
            f"an adapter names its base, but {model.base} is a folder of this machine, which means "
            "nothing on another one; name it as the hub does with --base-name OWNER/NAME"
        )
    return Base(given, None)


def export_adapter(
    trained: Trained, questions: Questions, folder: Path, base: Base, announce: Announce
) -> Exported:
    """Write an adapter that vLLM and PEFT load, and compare it with what was trained.

    Raises ConfigError for an adapter that vLLM does not serve, and RunError as `export_model`.
    """
    if trained.makes_up_for_rounding:
        raise ConfigError(
            "--adapter-only: the adapter makes up for the rounding of its 4-bit base "
            "(adapter.init: loftq), so it fits no other form of the base; export the merged model"
        )
    fetch_trained(trained.place)
    source = find_adapter(trained.place)
    settings: dict[str, Any] = json.loads((source / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    with safe_open(source / _WEIGHTS, framework="pt") as opened:
        refuse_unservable(settings, list(opened.keys()))
    with built(folder) as building:
        made = building / NO_MERGE
        made.mkdir()
        announce("writing the adapter")
        shutil.copyfile(source / _WEIGHTS, made / _WEIGHTS)
        named = {"base_model_name_or_path": base.name, "revision": base.revision}
        text = json.dumps({**settings, **named}, indent=2) + "\n"
        (made / ADAPTER_CONFIG).write_text(text, encoding="utf-8")
        announce("asking the model as it was trained, and with the adapter as it loads again")
        known = ask_trained(trained.config, trained.place, trained, questions)
        again = ask_trained(trained.config, str(made), trained, questions)
        write_beside(trained, made, known, fetch_base(trained.config.model))
        served = Served(
            name=served_name(trained.name),
            stops=end_texts(trained.tokenizer, known.ends),
            dtype="auto",
            positions=trained.positions,
            base=base.name,
            revision=base.revision,
            rank=max_rank(settings["r"]),
        )
        write_serve_page(made, served)
        computed = DTYPES[questions.decisions.dtype]
        written = Written(
            folder=made, merge=NO_MERGE, dtype=computed, again=again.sheet, explained_by=known
        )
        return finish(trained, written, Comparison(questions, known, {}), folder, base.name)
