"""Pairs as tensors: each token is in its place, and only those that a loss needs are scored."""

from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
import torch
import transformers

from orpo_ray.config.objectives.orpo import OrpoConfig
from orpo_ray.data.pairs import TokenPair, Trained, ranges_of
from orpo_ray.objectives import build_objective
from orpo_ray.training.layout import CHOSEN, PROMPT, REJECTED, PairBatch, collate
from orpo_ray.training.logprobs import pair_logps
from orpo_ray.training.memory import CpuMemory
from orpo_ray.training.pair_model import PairModel
from orpo_ray.training.plan import PACKED, PADDED, SHARED_PREFIX, Layout, pack_costs
from orpo_ray.training.steps import step_of_one_pack

PAD = 0
LAYOUTS = (PADDED, PACKED, SHARED_PREFIX)


def pair(prompt: list[int], chosen: list[int], rejected: list[int]) -> TokenPair:
    return TokenPair.of_answers(
        "pairs:1", *(np.array(ids, dtype=np.int32) for ids in (prompt, chosen, rejected))
    )


def turns(one: TokenPair, *ranges: list[tuple[int, int]]) -> TokenPair:
    """The same pair with other trained ranges of prompt, chosen and rejected."""
    return replace(one, trained=Trained(*(ranges_of(*each) for each in ranges)))


TWO = [pair([11, 12, 13], [21, 22], [31]), pair([14], [23], [32, 33, 34])]


def random_pairs(seed: int, count: int, begin: list[int]) -> list[TokenPair]:
    """Pairs whose prompts begin with `begin` and go on with different tokens."""
    rng = np.random.default_rng(seed)
    made = []
    for number in range(count):
        prompt, chosen, rejected = (
            rng.integers(1, 50, rng.integers(1, 9)).tolist() for _ in range(3)
        )
        made.append(pair([*begin, 100 + number, *prompt], chosen, rejected))
    return made


def test_two_pairs_written_by_hand() -> None:
    """Rows: both chosen sides, then both rejected ones; the longest row has five tokens."""
    batch = collate(TWO, PADDED, PAD, score_prompt=False)
    assert batch.input_ids.tolist() == [
        [11, 12, 13, 21, 22],
        [14, 23, 0, 0, 0],
        [11, 12, 13, 31, 0],
        [14, 32, 33, 34, 0],
    ]
    assert batch.attention_mask.tolist() == [
        [1, 1, 1, 1, 1],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 1, 1, 0],
    ]
    assert batch.targets.tolist() == [21, 22, 23, 31, 32, 33, 34]
    assert batch.positions.tolist() == [2, 3, 5, 12, 15, 16, 17]
    assert batch.pair.tolist() == [0, 0, 1, 0, 1, 1, 1]
    assert batch.part.tolist() == [CHOSEN] * 3 + [REJECTED] * 4
    assert batch.chosen_tokens.tolist() == [2, 1]
    assert batch.rejected_tokens.tolist() == [1, 3]


def test_the_prompt_is_scored_once_and_from_its_second_token_on() -> None:
    batch = collate(TWO, PADDED, PAD, score_prompt=True)
    assert batch.targets.tolist() == [12, 13, 21, 22, 23, 31, 32, 33, 34]
    assert batch.positions.tolist() == [0, 1, 2, 3, 5, 12, 15, 16, 17]
    assert batch.part.tolist() == [PROMPT, PROMPT, CHOSEN, CHOSEN, CHOSEN] + [REJECTED] * 4


def test_without_the_rejected_side_there_are_half_the_rows() -> None:
    batch = collate(TWO, PADDED, PAD, score_prompt=False, with_rejected=False)
    assert batch.input_ids.tolist() == [[11, 12, 13, 21, 22], [14, 23, 0, 0, 0]]
    assert batch.targets.tolist() == [21, 22, 23]
    assert set(batch.part.tolist()) == {CHOSEN}


def test_two_pairs_in_one_row_written_by_hand() -> None:
    """The chosen and the rejected side of each pair follow one another."""
    batch = collate(TWO, PACKED, PAD, score_prompt=True)
    assert batch.input_ids.tolist() == [
        [11, 12, 13, 21, 22, 11, 12, 13, 31, 14, 23, 14, 32, 33, 34]
    ]
    assert (
        batch.position_ids is not None and batch.runs is not None and batch.attention_mask is None
    )
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 0, 1, 2, 3]]
    assert (batch.runs.lengths, batch.runs.shared) == ((5, 4, 2, 4), (0, 0, 0, 0))
    assert batch.targets.tolist() == [12, 13, 21, 22, 31, 23, 32, 33, 34]
    assert batch.positions.tolist() == [0, 1, 2, 3, 7, 9, 11, 12, 13]
    assert batch.pair.tolist() == [0] * 5 + [1] * 4
    assert batch.part.tolist() == [
        PROMPT,
        PROMPT,
        CHOSEN,
        CHOSEN,
        REJECTED,
        CHOSEN,
        REJECTED,
        REJECTED,
        REJECTED,
    ]


def test_two_pairs_that_share_their_prompts_written_by_hand() -> None:
    """The first token of both answers is predicted at the prompt's last token.

    The positions of the rejected answer start after the prompt.
    """
    batch = collate(TWO, SHARED_PREFIX, PAD, score_prompt=True)
    assert batch.input_ids.tolist() == [[11, 12, 13, 21, 22, 31, 14, 23, 32, 33, 34]]
    assert (
        batch.position_ids is not None and batch.runs is not None and batch.attention_mask is None
    )
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 0, 1, 1, 2, 3]]
    assert (batch.runs.lengths, batch.runs.shared) == ((5, 1, 2, 3), (0, 3, 0, 1))
    assert batch.runs.query_ends.tolist() == [0, 5, 6, 8, 11]
    assert batch.runs.key_ends.tolist() == [0, 5, 9, 11, 15]
    assert batch.targets.tolist() == [12, 13, 21, 22, 31, 23, 32, 33, 34]
    assert batch.positions.tolist() == [0, 1, 2, 3, 2, 6, 6, 8, 9]


def test_what_all_prompts_begin_with_is_computed_once_written_by_hand() -> None:
    """The row begins with 11 and 12. The second prompt is nothing else.

    Tokens 12 (of both prompts) and 21 (the first of both answers of the second pair) are each
    predicted once.
    """
    pairs = [pair([11, 12, 13], [21, 22], [31]), pair([11, 12], [21], [21, 33])]
    batch = collate(pairs, SHARED_PREFIX, PAD, score_prompt=True)
    assert batch.input_ids.tolist() == [[11, 12, 13, 21, 22, 31, 21, 21, 33]]
    assert batch.position_ids is not None and batch.runs is not None
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 2, 2, 3]]
    assert (batch.runs.lengths, batch.runs.shared) == ((2, 3, 1, 1, 2), (0, 2, 3, 2, 2))
    assert batch.runs.key_ends.tolist() == [0, 2, 7, 11, 14, 18]
    seen = [row.tolist() for row in batch.runs.keys(batch.input_ids, 1)]
    assert seen == [
        [[11, 12]],
        [[11, 12, 13, 21, 22]],
        [[11, 12, 13, 31]],
        [[11, 12, 21]],
        [[11, 12, 21, 33]],
    ]
    assert batch.positions.tolist() == [0, 1, 1, 2, 2, 3, 7]
    assert batch.targets.tolist() == [12, 13, 21, 21, 31, 22, 33]
    assert batch.computed is not None
    assert batch.targets[batch.computed].tolist() == [12, 13, 21, 22, 31, 12, 21, 21, 33]
    assert batch.computed.tolist() == [0, 1, 3, 5, 4, 0, 2, 2, 6]


def test_a_beginning_that_saves_little_is_not_shared() -> None:
    """One token of two pairs: 8 % of 2 * 6 tokens, and a tenth of 2 * 5."""
    for answer, common in (([21] * 3, 0), ([21] * 2, 1)):
        pairs = [pair([11, other], answer, [31]) for other in (12, 13)]
        batch = collate(pairs, SHARED_PREFIX, PAD, score_prompt=False)
        assert batch.runs is not None and batch.runs.common == common
        assert (batch.computed is None) == (common == 0)
        alone = collate(pairs[:1], SHARED_PREFIX, PAD, score_prompt=False).runs
        assert alone is not None and alone.common == 0, "one pair has nothing in common with others"


@pytest.mark.parametrize(
    ("begin", "prompt", "answer"), [(60, 250, 200), (100, 1, 320), (60, 1, 300)]
)
def test_a_row_with_a_beginning_takes_no_more_memory_than_was_tried(
    begin: int, prompt: int, answer: int
) -> None:
    """Beginnings of less, as much and more than what saves a tenth."""
    rng = np.random.default_rng(0)
    start, *others = (rng.integers(3, 64, size).tolist() for size in (begin, *[prompt] * 4))
    ends = rng.integers(3, 64, answer).tolist()
    pairs = [pair([*start, 3 + i, *other], ends, ends) for i, other in enumerate(others)]
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
    )
    model = PairModel(transformers.LlamaForCausalLM(config))
    model.use_layout(SHARED_PREFIX)

    def peak(joins: bool) -> int:
        batch = collate(pairs, SHARED_PREFIX, PAD, score_prompt=False, joins_beginnings=joins)
        taken = CpuMemory().peak_of(lambda: model(batch).sum().backward())
        assert taken is not None
        return taken

    peak(False)  # gradients are there from now on
    assert peak(True) <= 1.02 * peak(False)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("score_prompt", [False, True])
@pytest.mark.parametrize("with_rejected", [False, True])
@pytest.mark.parametrize("common", [0, 12])
def test_every_target_is_predicted_by_its_own_past(
    layout: Layout, score_prompt: bool, with_rejected: bool, common: int
) -> None:
    for seed in range(50):
        pairs = random_pairs(seed, 1 + seed % 7, list(range(50, 50 + common)))
        batch = collate(pairs, layout, PAD, score_prompt=score_prompt, with_rejected=with_rejected)
        flat = batch.input_ids.flatten()
        for index, one in enumerate(pairs):
            sides = {CHOSEN: [*one.prompt, *one.chosen], REJECTED: [*one.prompt, *one.rejected]}
            assert scored(batch, index, CHOSEN) == one.chosen.tolist()
            assert scored(batch, index, REJECTED) == (
                one.rejected.tolist() if with_rejected else []
            )
            assert scored(batch, index, PROMPT) == (one.prompt[1:].tolist() if score_prompt else [])
            for part in (CHOSEN, REJECTED)[: 1 + with_rejected]:
                places = of_all(batch, batch.positions)[
                    (batch.pair == index) & (batch.part == part)
                ]
                assert flat[places].tolist() == sides[part][len(one.prompt) - 1 : -1], (
                    "the token before each target"
                )
        cost = pack_costs(lengths(pairs), layout, with_rejected=with_rejected)
        runs = batch.runs
        saved = runs.common * (len(pairs) - 1) if runs else 0
        assert flat.numel() + saved == cost.of(np.arange(len(pairs)))
        assert (saved > 0) == (bool(common) and layout is SHARED_PREFIX and len(pairs) > 1)


def lengths(pairs: list[TokenPair]) -> np.ndarray:
    return np.array([[len(one.prompt), len(one.chosen), len(one.rejected)] for one in pairs])


def scored(batch: PairBatch, index: int, part: int) -> list[int]:
    """Targets of one part of one pair, in order."""
    return of_all(batch, batch.targets)[(batch.pair == index) & (batch.part == part)].tolist()


def of_all(batch: PairBatch, values: torch.Tensor) -> torch.Tensor:
    """What each scored token of each pair has, from what the computed ones have."""
    return values if batch.computed is None else values[batch.computed]


def test_the_mask_comes_from_lengths_and_not_from_the_padding_id() -> None:
    """A token of a pair may have the id of the padding, as the end token of many models does."""
    ends_with_padding = [pair([5], [6, PAD], [PAD]), pair([5, 5, 5], [7], [8])]
    batch = collate(ends_with_padding, PADDED, PAD, score_prompt=False)
    assert batch.attention_mask is not None
    assert batch.attention_mask.sum().item() == 3 + 4 + 2 + 4
    assert scored(batch, 0, CHOSEN) == [6, PAD]
    assert scored(batch, 0, REJECTED) == [PAD]


def test_sums_of_pairs_are_those_of_their_tokens() -> None:
    """Token i has log-prob -(i + 1); the batch above says which pair it belongs to."""
    batch = collate(TWO, PADDED, PAD, score_prompt=True)
    logps = pair_logps(-torch.arange(1.0, 10.0), batch)
    assert logps.chosen.tolist() == [-(3 + 4), -5]
    assert logps.rejected.tolist() == [-6, -(7 + 8 + 9)]
    assert logps.nll_sum.tolist() == [1 + 2 + 3 + 4, 5]
    assert logps.chosen_mean.tolist() == [-3.5, -5]
    assert logps.rejected_mean.tolist() == [-6, -8]


SEVERAL = turns(
    pair([11, 12, 13, 14], [21, 22, 23, 24], [31, 32, 33]),
    [(1, 3)],
    [(0, 1), (3, 4)],
    [(2, 3)],
)
"""A turn in the prompt, two turns in the chosen answer, and one later turn in the rejected one."""


@pytest.mark.parametrize(
    ("layout", "positions"),
    [
        (PADDED, [0, 1, 3, 6, 13]),
        (PACKED, [0, 1, 3, 6, 13]),
        (SHARED_PREFIX, [0, 1, 3, 6, 9]),
    ],
)
def test_only_trained_tokens_are_scored(layout: str, positions: list[int]) -> None:
    batch = collate([SEVERAL], layout, PAD, score_prompt=False)
    assert batch.targets.tolist() == [12, 13, 21, 24, 33]
    assert batch.positions.tolist() == positions
    assert batch.part.tolist() == [PROMPT, PROMPT, CHOSEN, CHOSEN, REJECTED]
    assert (batch.chosen_tokens.tolist(), batch.rejected_tokens.tolist()) == ([2], [1])
    logps = pair_logps(-torch.arange(1.0, 6.0), batch)
    assert (logps.chosen.tolist(), logps.rejected.tolist()) == ([-(3 + 4)], [-5])
    assert logps.nll_sum.tolist() == [1 + 2 + 3 + 4]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_untrained_tokens_are_computed_all_the_same(layout: str) -> None:
    with_all = pair(*(ids.tolist() for ids in (SEVERAL.prompt, SEVERAL.chosen, SEVERAL.rejected)))
    some, all_ = (collate([one], layout, PAD, score_prompt=False) for one in (SEVERAL, with_all))
    assert torch.equal(some.input_ids, all_.input_ids)


@pytest.mark.parametrize(
    ("nll_on", "tokens"), [("response", (2 + 2) + 2 + 1), ("full", (3 + 2) + (2 + 2) + 1)]
)
def test_the_likelihood_is_a_mean_over_the_tokens_that_it_covers(
    nll_on: Literal["response", "full"], tokens: int
) -> None:
    objective = build_objective(OrpoConfig(nll_on=nll_on))
    assert step_of_one_pack([SEVERAL, *TWO], PACKED, PAD, objective).token_count == tokens
