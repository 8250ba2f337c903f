"""What the Python functions share: they refuse early, place workers and prepare pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from orpo_ray.config import RunConfig, ScaleConfig, dump, stage_configs
from orpo_ray.config.storage import is_url
from orpo_ray.errors import ConfigError, SetupError
from orpo_ray.lean_imports import without_collections
from orpo_ray.runs.console import Console, Printing
from orpo_ray.runs.files import CONFIG_FILE, read_json
from orpo_ray.runs.run import Run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from orpo_ray.data.store import Artifact
    from orpo_ray.distributed.preflight import Placement
    from orpo_ray.models.hardware import Hardware

ONLOOKER_S = 1.0
"""How long to wait for a lock.

A process that only checks whether a run is at work holds its lock for an instant.
"""
PRINTING = Printing()


def refuse_others(config: object, console: object) -> None:
    """Raise ConfigError for a wrong type of config or console, before anything begins."""
    if not isinstance(config, RunConfig):
        raise ConfigError(f"config: must be what load_config returns, not {type(config).__name__}")
    refuse_other_console(console)


def refuse_other_console(console: object) -> None:
    """Raise ConfigError for a wrong type of console."""
    if not isinstance(console, Console):
        raise ConfigError(f"console: must be an orpo_ray.Console, not {_kind(console)}")


def _kind(value: object) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


def tokenizer_of(config: RunConfig, console: Console) -> PreTrainedTokenizerBase:
    """The tokenizer of a run, with its chat template; a GGUF base is converted first."""
    from orpo_ray.models.tokenizer import load_tokenizer, make_local

    make_local(config.model, console.announce)
    return load_tokenizer(config.model, console.announce)


def prepare_run(run: Run, console: Console) -> Artifact:
    """Prepare the pairs of a run, or find them prepared."""
    with without_collections():
        from orpo_ray.data.pipeline import prepare as prepare_pairs
        from orpo_ray.models.tokenizer import tokenizer_fingerprint

    config = run.config
    tokenizer = tokenizer_of(config, console)
    return prepare_pairs(
        config.data,
        tokenizer,
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        storage=run.root,
        seed=config.training.seed,
        announce=console.announce,
        kept_in=run.storage,
        single_answers=config.objective.reads_single_answers,
        queue_timeout=config.scale.queue_timeout,
    )


def prepare_training(run: Run, console: Console) -> Artifact:
    """Prepare the pairs. Refuses those of one kind, and an adapter that does not fit the base."""
    from orpo_ray.data.refusals import refuse_one_kind

    artifact = prepare_run(run, console)
    refuse_one_kind(artifact)
    if run.config.adapter.kind != "none" and run.config.adapter.targets != "all-linear":
        from orpo_ray.models.size import refuse_unknown_targets

        refuse_unknown_targets(run.config)
    return artifact


def judged_pairs(run: Run, console: Console) -> Artifact:
    """The pairs of a trained run, of which the held-out ones are those that it has not trained.

    Without data.eval the seed draws them. Runs of a comparison have seeds of their own, but all of
    them share the pairs of the first one: what another seed would hold out, they have trained.
    """
    artifact = prepare_run(run, console)
    trained = _trained_pairs(run)
    if trained in (None, artifact.summary.hash):
        return artifact
    from orpo_ray.data.store import MANIFEST, artifact_path, find_artifact

    run.storage.fetch_folder(artifact_path(run.root, trained), MANIFEST)
    found = find_artifact(run.root, trained, console.announce)
    if found is None:
        console.announce(
            "these are not the pairs that the run was made with, which are gone: it may have "
            "trained some of those that are held out here; name others in data.eval"
        )
        return artifact
    console.announce(f"the held-out pairs are those of the run itself, in {found.path}")
    return found


def _trained_pairs(run: Run) -> str | None:
    """The hash of the pairs that a run was trained with, if its settings still name them alone."""
    stored = read_json(run.path(CONFIG_FILE)) or {}
    if run.config.data.eval or stored.get("data") != dump(run.config)["data"]:
        return None
    digest: str | None = run.facts().get("identity", {}).get("data")
    return digest


def before_training(config: RunConfig, stage: RunConfig) -> RunConfig:
    """The stage in a form that can be planned before earlier stages are trained.

    In full training its base is the result of the stage before, which does not exist yet. The run's
    own base takes its place: it has the same tokenizer and size.
    """
    if stage.adapter.kind != "none":
        return stage
    first = {"base": config.model.base, "revision": config.model.revision}
    return stage.model_copy(update={"model": stage.model.model_copy(update=first)})


def refuse_missing_inputs(config: RunConfig) -> None:
    """Raise a user error for a template, file or base that is missing, before Ray starts."""
    from orpo_ray.data.sources import refuse_missing

    refuse_missing_template(config)
    for source in (*config.data.train, *config.data.eval):
        refuse_missing(source)
    refuse_missing_base(config)


def refuse_missing_template(config: RunConfig) -> None:
    """Raise ConfigError for a chat template that cannot be read."""
    from orpo_ray.models.templates import template_text

    if config.model.chat_template is not None:
        template_text(config.model.chat_template)


def refuse_missing_base(config: RunConfig) -> None:
    """Raise ConfigError for a base that is not where the config says."""
    from orpo_ray.models.trained import missing_base

    if missing := missing_base(config.model.base):
        raise ConfigError(missing)


def refuse_missing_before_training(config: RunConfig) -> None:
    """Refuse what is missing for a run, or for any of its stages before the first is trained."""
    from orpo_ray.models.trained import find_adapter

    for run in stage_configs(config) or [config]:
        first = run.adapter.init_from
        is_of_a_stage = first is not None and first.startswith(f"{config.place}/")
        if first is not None and not is_url(first) and not is_of_a_stage:
            find_adapter(first)
        refuse_missing_inputs(before_training(config, run))


def place_workers(
    scale: ScaleConfig, console: Console, verbose: bool = False, beside_others: bool = False
) -> Placement:
    """Where the workers go. Raises ResourceError if there is no room for them.

    `beside_others` says that the command has other runs at the same time.
    """
    from orpo_ray.distributed.preflight import place

    return place(scale, console.announce, verbose, beside_others)


def check_cluster(run: Run, console: Console) -> None:
    """Check that every server of a cluster is ready for the run."""
    from orpo_ray.ray_runtime import joins_cluster

    if joins_cluster():
        from orpo_ray.distributed.servers import check_servers

        check_servers(run, console.announce)


def wait_for_free_room(scale: ScaleConfig, placement: Placement, console: Console) -> None:
    """Wait until a cluster that is busy has room for the workers."""
    from orpo_ray.distributed.preflight import free_nodes, wait_for_room
    from orpo_ray.ray_runtime import joins_cluster

    if joins_cluster():
        wait_for_room(placement, scale.queue_timeout, console.announce, free_nodes)


def hardware_of(scale: ScaleConfig, placement: Placement) -> Hardware:
    """The hardware of each worker."""
    from orpo_ray.models.hardware import CPU, probe_hardware

    if not placement.gpus:
        return CPU
    if placement.uses_ray:
        from orpo_ray.distributed.launch import probe_worker

        found = probe_worker(placement)
    else:
        found = probe_hardware()
    if found.device == "cpu" and (placement.uses_ray or scale.gpus_per_worker != "auto"):
        where = (
            "the cluster has one, but torch finds none there"
            if placement.uses_ray
            else "torch finds none here"
        )
        raise SetupError(
            f"scale.gpus_per_worker: a GPU is wanted, and {where}; set scale.gpus_per_worker=0 for "
            "CPUs"
        )
    return found
