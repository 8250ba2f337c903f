"""The actor that computes reference log-probs.

The driver imports this module to name the actor, so heavy imports stand inside its methods.
"""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orpo_ray.distributed.task import Task
from orpo_ray.errors import OrpoRayError, RunError
from orpo_ray.runs.console import SILENT
from orpo_ray.training.strategy import Strategy

_logger = logging.getLogger(__name__)

Score = Callable[[NDArray[np.int64]], NDArray[np.float64]]
"""Summed log-probs [n, 2] of the pairs of one pack."""


class Scorer:
    """Loads the model as it is at the start of training, then scores packs."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._score: Score | None = None

    def __call__(self, rows: Any) -> dict[str, Any]:
        """Log-probs of the pairs of some packs.

        An error is returned as a row: Ray Data would wrap it and drop what it says.
        """
        try:
            self._score = self._score or self._load()
            packs = [np.asarray(pack, dtype=np.int64) for pack in rows["pack"]]
            scores = np.concatenate([self._score(pack) for pack in packs])
        except OrpoRayError as error:
            return _failed(type(error).__name__, str(error))
        except Exception as error:
            _logger.exception("an actor that computes reference log-probs failed")
            told = f"an actor that computes reference log-probs failed: {error!r}"
            return _failed(RunError.__name__, told)
        return _row(np.concatenate(packs), scores[:, 0], scores[:, 1], "", "")

    def _load(self) -> Score:
        from orpo_ray.models.tokenizer import load_tokenizer, padding_id
        from orpo_ray.training.load import load_pair_model
        from orpo_ray.training.metrics import score_pack
        from orpo_ray.training.self_check import settle_layout
        from orpo_ray.training.setup import fetch_inputs

        config = self._task.enter().config
        fetch_inputs(config)
        # An actor is a single process, whatever strategy training uses.
        decisions = replace(self._task.setup.decisions, strategy=Strategy.SINGLE)
        model = load_pair_model(config, decisions, SILENT.announce)
        model.eval()
        table = self._task.pairs().train
        model.check_reads(table)
        pad_id = padding_id(load_tokenizer(config.model, SILENT.announce))
        settle_layout(model, decisions, table, pad_id, SILENT.announce)
        return lambda pack: score_pack(model, table, pack, pad_id)


def _failed(error: str, message: str) -> dict[str, Any]:
    nothing = np.array([np.nan])
    return _row([0], nothing, nothing, error, message)


def _row(pairs: Any, chosen: Any, rejected: Any, error: str, message: str) -> dict[str, Any]:
    count = len(chosen)
    return {
        "pair": np.asarray(pairs, dtype=np.int64),
        "chosen": chosen,
        "rejected": rejected,
        "error": np.array([error] * count),
        "message": np.array([message] * count),
    }
