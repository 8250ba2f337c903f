"""Compares a base with the model that a run trained: scores of held-out pairs, and answers."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from orpo_ray.config import RunConfig
from orpo_ray.data.held import Pairs
from orpo_ray.data.store import PairTable
from orpo_ray.evaluation.preference import by_source
from orpo_ray.models.adapter import load_adapter
from orpo_ray.models.base import count_quantized, load_base
from orpo_ray.models.tokenizer import padding_id
from orpo_ray.models.trained import fetch_trained, trained_folder
from orpo_ray.runs.console import Console
from orpo_ray.runs.results import Evaluation, Sample
from orpo_ray.runs.scores import PairScores, are_few, intervals, too_few
from orpo_ray.runs.summary import compared, plain, remarks
from orpo_ray.training.decisions import Decisions
from orpo_ray.training.generate import Answer, answers_of
from orpo_ray.training.load import autocast_dtype
from orpo_ray.training.metrics import score_pairs
from orpo_ray.training.pair_model import PairModel
from orpo_ray.training.plan import PADDED
from orpo_ray.training.sampling import Sampling
from orpo_ray.training.self_check import settle_layout


@dataclass(frozen=True)
class Judged:
    """The scores of one model, by source and pair by pair, and its answers."""

    metrics: dict[str, dict[str, float]]
    scores: PairScores
    answers: list[Answer]
    quantized_modules: int


@dataclass(frozen=True)
class Questions:
    """Prompts as token ids, and the most tokens that an answer may have."""

    prompts: Sequence[Sequence[int]]
    max_new_tokens: int


def judge_model(
    config: RunConfig,
    decisions: Decisions,
    tokenizer: PreTrainedTokenizerBase,
    table: PairTable,
    questions: Questions,
    *,
    trained: str | None,
    console: Console,
) -> Judged:
    """Score one model, and let it answer: the one in folder `trained`, or the base if None."""
    model = load_trained(config, decisions, trained)
    scores = score_table(model, decisions, table, padding_id(tokenizer), console)
    sampling = Sampling(max_new_tokens=questions.max_new_tokens)
    answers = answers_of(model, tokenizer, questions.prompts, sampling)
    return Judged(by_source(scores, table), scores, answers, count_quantized(model))


def score_table(
    model: PairModel, decisions: Decisions, table: Pairs, pad_id: int, console: Console
) -> PairScores:
    """The scores of all pairs, computed in the layout of the run, as its own evaluations are.

    Raises ConfigError if the base cannot read a pair. The model takes padded rows afterwards.
    """
    model.check_reads(table)
    settle_layout(model, decisions, table, pad_id, console.announce)
    budget = decisions.tokens_per_microbatch
    scores = score_pairs(model, table, pad_id, budget, console.stop_requested)
    model.use_layout(PADDED)
    return scores


def evaluation_of(
    name: str, trained: str | None, prompts: Sequence[str], judged: Sequence[Judged], limit: int
) -> Evaluation:
    """The result of `evaluate`. `judged` has the base, then the trained model, if any."""
    base, tuned = judged[0], judged[-1]
    found = compared(base.scores, tuned.scores) if trained is not None else {}
    pairs = len(base.scores.comparable)
    of_pairs = base.scores.single_answers is None
    few = [too_few(pairs)] if trained is None and of_pairs and are_few(pairs) else []
    lines = [*remarks(found, pairs), *few, *_on_answers(judged, limit)]
    who = ("base",) if trained is None else ("base", "trained")
    return Evaluation(
        name=name,
        adapter=trained,
        metrics={one: model.metrics for one, model in zip(who, judged, strict=True)},
        changes=plain(found),
        base=plain(intervals(base.scores)) if trained is None else {},
        remarks=tuple(lines),
        quantized_modules=tuned.quantized_modules,
        samples=tuple(
            Sample(
                prompt=prompt.strip(),
                base=base.answers[index].text,
                base_is_cut=base.answers[index].is_cut,
                trained=None if trained is None else tuned.answers[index].text,
                trained_is_cut=trained is not None and tuned.answers[index].is_cut,
            )
            for index, prompt in enumerate(prompts)
        ),
    )


def _on_answers(judged: Sequence[Judged], limit: int) -> list[str]:
    cut = sum(answer.is_cut for answer in judged[-1].answers)
    if not cut:
        return []
    return [
        f"{cut} of {len(judged[-1].answers)} answers were cut, because they did not end within "
        f"{limit} tokens or the context of the base: raise --max-new-tokens, or check that the "
        "answers of the pairs end."
    ]


def load_trained(config: RunConfig, decisions: Decisions, trained: str | None) -> PairModel:
    """The base with the adapter in folder `trained`; the base alone without such a folder.

    For full training the folder holds the whole model.
    """
    source, adapted = config.model, False
    if trained is not None:
        fetch_trained(trained)
        adapted = config.adapter.kind != "none"
        if not adapted:
            folder = str(trained_folder(trained))
            source = source.model_copy(update={"base": folder, "revision": None})
    base = load_base(
        source, decisions.device, decisions.dtype, decisions.attention, trainable=False
    )
    model = (
        load_adapter(base, trained, trainable=False) if trained is not None and adapted else base
    )
    return PairModel(model, autocast_dtype(decisions))
