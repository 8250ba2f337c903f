"""How well a model prefers the chosen answers, over all pairs and per source."""

import numpy as np

from orpo_ray.data.store import PairTable
from orpo_ray.runs.scores import PairScores
from orpo_ray.training.metrics import summarise


def by_source(scores: PairScores, table: PairTable) -> dict[str, dict[str, float]]:
    """Preference metrics by source name, `all` first.

    The id of a pair begins with its source, up to the last colon.
    """
    sources = np.array([pair_id.rpartition(":")[0] for pair_id in table.pair_ids])
    result = {"all": _describe(scores, np.ones(len(sources), dtype=bool))}
    for source in dict.fromkeys(sources.tolist()):
        result[source] = _describe(scores, sources == source)
    return result


def _describe(scores: PairScores, rows: np.ndarray) -> dict[str, float]:
    part = scores.rows(rows).comparable
    return {"pairs": len(part), **summarise(part)}
