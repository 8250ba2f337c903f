"""Computes reference log-probs with Ray Data actors before training starts.

Each worker's share of the cluster holds one actor.
"""

import queue
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from orpo_ray import errors
from orpo_ray.distributed.driver import Driver
from orpo_ray.distributed.preflight import Placement
from orpo_ray.distributed.ray_thread import RayThread
from orpo_ray.distributed.scorer import Scorer
from orpo_ray.distributed.task import Task
from orpo_ray.errors import ResourceError, RunError, StoppedError
from orpo_ray.objectives import build_objective
from orpo_ray.ray_runtime import ROOM_S, quiet_context
from orpo_ray.runs.console import SILENT, Console
from orpo_ray.training.plan import cut_packs, pack_costs
from orpo_ray.training.reference import reference_cache

_BLOCKS_PER_ACTOR = 8
_POLL_S = 1.0


def prepare_references(driver: Driver) -> None:
    """Fill the cache of the training pairs' reference log-probs, if the objective needs them.

    Quantisation, dtype and layout are those of training. CPUs and GPUs are free again when this
    returns. After the loss of an actor the computation starts again on what is left of the cluster,
    `scale.max_failures` times.
    """
    config, table, announce = driver.run.config, driver.artifact.train, driver.console.announce
    if not build_objective(config.objective).needs_reference:
        return
    cache = reference_cache(driver.run, driver.setup)
    if cache.read(len(table), SILENT.announce) is not None:
        return  # the workers read the cache again and announce it
    _, distinct, copies = np.unique(table.pair_ids, return_index=True, return_inverse=True)
    task, decisions = driver.task, driver.setup.decisions
    packs = cut_packs(
        distinct, pack_costs(table.lengths, decisions.layout), decisions.tokens_per_microbatch
    )
    retries_left = config.scale.max_failures
    while True:
        workers = driver.placement.workers
        actors = f"{workers} actors" if workers > 1 else "one actor"
        announce(f"reference log-probs: computing them once for {len(distinct)} pairs, by {actors}")
        try:
            scored = _compute(task, packs, len(table), driver.placement, driver.console)
            log_probs = scored[distinct][copies]
            break
        except RayTaskError as error:
            raise RunError(
                f"an actor that computes reference log-probs failed: {error.cause!r}"
            ) from error
        except GetTimeoutError as error:
            raise ResourceError(
                f"no room for {actors} that compute reference log-probs within {ROOM_S} s; is the "
                "cluster busy?"
            ) from error
        except RayError as error:
            if not retries_left:
                raise RunError(
                    "actors that compute reference log-probs were lost, and no retry is left "
                    "(scale.max_failures); the same command starts again"
                ) from error
            retries_left -= 1
            announce(f"an actor was lost; starting again ({retries_left} retries left)")
            driver.place_again()
    if not np.isfinite(log_probs).all():
        raise RunError(
            "a reference log-prob is not finite; there are bad numbers among the base's weights"
        )
    cache.write(log_probs)


def _compute(
    task: Task, packs: list[NDArray[np.int64]], rows: int, placement: Placement, console: Console
) -> NDArray[np.float64]:
    """Log-probs [rows, 2] of the pairs in `packs`; the other rows are NaN."""
    scored = np.full((rows, 2), np.nan)
    stopped = "stopped before the first step; the same command starts again"
    for batch in as_they_come(_score(task, packs, placement), console, stopped):
        for name, message in zip(batch["error"], batch["message"], strict=True):
            if name:
                raise getattr(errors, name)(message)
        scored[batch["pair"]] = np.stack([batch["chosen"], batch["rejected"]], axis=1)
    return scored


def as_they_come(batches: Iterator[Any], console: Console, if_stopped: str) -> Iterator[Any]:
    """The same batches, fetched by another thread.

    So this thread can answer a request to stop while the actors still wait for room. Then it raises
    StoppedError with the text `if_stopped`.
    """
    fetched: queue.SimpleQueue[Any] = queue.SimpleQueue()
    done = object()

    def fetch() -> None:
        try:
            for batch in batches:
                fetched.put(batch)
        finally:
            fetched.put(done)

    thread = RayThread(fetch)
    thread.start()
    try:
        batch = None
        while batch is not done:
            if console.stop_requested():
                raise StoppedError(if_stopped)
            try:
                batch = fetched.get(timeout=_POLL_S)
            except queue.Empty:
                continue
            if batch is not done:
                yield batch
        thread.join()
    finally:
        thread.leave()
    if thread.error is not None:
        raise thread.error


def _score(task: Task, packs: list[NDArray[np.int64]], placement: Placement) -> Any:
    """Batches of scored pairs, as the actors finish them."""
    import ray
    import ray.data

    blocks = min(len(packs), placement.workers * _BLOCKS_PER_ACTOR)
    with quiet_context():
        # By default Ray Data waits for ever.
        ray.data.DataContext.get_current().wait_for_min_actors_s = ROOM_S
        rows = ray.data.from_items(
            [{"pack": pack.tolist()} for pack in packs], override_num_blocks=blocks
        )
        scored = rows.map_batches(
            Scorer,
            fn_constructor_args=(task,),
            batch_size=None,
            batch_format="pandas",
            compute=ray.data.ActorPoolStrategy(size=placement.workers),
            num_cpus=placement.cpus,
            num_gpus=placement.gpus or None,
            max_restarts=0,  # Ray Data's default has no limit
            max_task_retries=0,
        )
        yield from scored.iter_batches(batch_size=None, batch_format="numpy")
