"""A base and what a run made of it, side by side on evaluation pairs and in their own words."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from orpo_ray.config import RunConfig
from orpo_ray.config.storage import local_path
from orpo_ray.data.store import PairTable
from orpo_ray.evaluation.generate import greedy_answers
from orpo_ray.evaluation.preference import evaluate_pairs
from orpo_ray.models.adapter import load_adapter
from orpo_ray.models.base import count_quantized, load_base
from orpo_ray.models.tokenizer import padding_id
from orpo_ray.models.trained import fetch_trained
from orpo_ray.training.decisions import Decisions
from orpo_ray.training.load import autocast_dtype
from orpo_ray.training.pair_model import PairModel


@dataclass(frozen=True)
class Judged:
    """What one model scored, by source of the pairs, and what it said."""

    metrics: dict[str, dict[str, float]]
    answers: list[str]
    quantized_modules: int


def judge_model(
    config: RunConfig,
    decisions: Decisions,
    tokenizer: PreTrainedTokenizerBase,
    table: PairTable,
    trained: str | None,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
) -> Judged:
    """Score the base (`trained` None) or the result of a run, and let it answer `prompts` (token
    ids) greedily.
    """
    model = load_trained(config, decisions, trained)
    model.check_reads(table)
    metrics = evaluate_pairs(model, table, padding_id(tokenizer), decisions.tokens_per_microbatch)
    answers = greedy_answers(model, tokenizer, prompts, max_new_tokens)
    return Judged(metrics, answers, count_quantized(model))


def load_trained(config: RunConfig, decisions: Decisions, trained: str | None) -> PairModel:
    """The base, with the adapter in folder `trained` on it, or, for full training, the model in
    that folder.
    """
    source, adapted = config.model, False
    if trained is not None:
        fetch_trained(trained)
        adapted = config.adapter.kind != "none"
        if not adapted:
            inside_run = local_path(trained) / "adapter"
            folder = inside_run if inside_run.is_dir() else local_path(trained)
            source = source.model_copy(update={"base": str(folder), "revision": None})
    base = load_base(
        source, decisions.device, decisions.dtype, decisions.attention, trainable=False
    )
    model = (
        load_adapter(base, trained, trainable=False) if trained is not None and adapted else base
    )
    return PairModel(model, autocast_dtype(decisions))
