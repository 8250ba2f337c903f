"""Answers prompts with Ray Data actors, one in each worker's share of the cluster.

What they load and answer with is handed to them: this module only spreads the work.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from orpo_ray import errors
from orpo_ray.distributed.preflight import Placement
from orpo_ray.distributed.references import as_they_come
from orpo_ray.errors import OrpoRayError, ResourceError, RunError
from orpo_ray.ray_runtime import ROOM_S, quiet_context
from orpo_ray.runs.console import Console

_logger = logging.getLogger(__name__)

Answer = Callable[[str], str]
"""Takes a batch as JSON, and returns its answers as JSON."""
Load = Callable[[], Answer]
"""Loads a model. It travels to each actor, which calls it once."""


class AnswerActor:
    """Loads a model, then answers batches."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._answer: Answer | None = None

    def __call__(self, row: dict[str, str]) -> dict[str, str]:
        """A row with a batch to a row with its answers.

        An error is returned as a row: Ray Data would wrap it and drop what it says.
        """
        try:
            self._answer = self._answer or self._load()
            return {"answers": self._answer(row["batch"]), "error": "", "message": ""}
        except OrpoRayError as error:
            return {"answers": "", "error": type(error).__name__, "message": str(error)}
        except Exception as error:
            _logger.exception("an actor that answers failed")
            told = f"an actor that answers failed: {error!r}"
            return {"answers": "", "error": RunError.__name__, "message": told}


def answers_by_actors(
    placement: Placement, load: Load, batches: Sequence[str], console: Console, if_stopped: str
) -> Iterator[str]:
    """The answers to each batch, as the actors finish them.

    Raises the error of an actor. Raises RunError if an actor is lost, and StoppedError with the
    text `if_stopped` if the console asks to stop; the answers before it were yielded.
    """
    actors = f"{placement.workers} actors" if placement.workers > 1 else "one actor"
    try:
        for row in as_they_come(_rows(load, batches, placement), console, if_stopped):
            if row["error"]:
                raise getattr(errors, row["error"])(row["message"])
            yield row["answers"]
    except RayTaskError as error:
        raise RunError(f"an actor that answers failed: {error.cause!r}") from error
    except GetTimeoutError as error:
        raise ResourceError(
            f"no room for {actors} that answer within {ROOM_S} s; is the cluster busy?"
        ) from error
    except RayError as error:
        raise RunError(
            "an actor that answers was lost; the same command goes on where it was"
        ) from error


def _rows(load: Load, batches: Sequence[str], placement: Placement) -> Iterator[Any]:
    import ray
    import ray.data

    with quiet_context():
        # By default Ray Data waits for ever.
        ray.data.DataContext.get_current().wait_for_min_actors_s = ROOM_S
        rows = ray.data.from_items(
            [{"batch": batch} for batch in batches], override_num_blocks=len(batches)
        )
        answered = rows.map(
            AnswerActor,  # type: ignore[arg-type]  # a class becomes an actor
            fn_constructor_args=(load,),
            compute=ray.data.ActorPoolStrategy(size=placement.workers),
            num_cpus=placement.cpus,
            num_gpus=placement.gpus or None,
            max_restarts=0,  # Ray Data's default has no limit
            max_task_retries=0,
        )
        yield from answered.iter_rows()
