"""Pairs as tensors: every token stands where it should, and just the tokens a loss needs are scored."""

import numpy as np
import pytest
import torch

from orpo_ray.data.pairs import TokenPair
from orpo_ray.training.layout import CHOSEN, PROMPT, REJECTED, PairBatch, collate_padded, longer_side
from orpo_ray.training.logprobs import pair_logps

PAD = 0


def pair(prompt: list[int], chosen: list[int], rejected: list[int]) -> TokenPair:
    return TokenPair("pairs:1", *(np.array(ids, dtype=np.int32) for ids in (prompt, chosen, rejected)))


TWO = [pair([11, 12, 13], [21, 22], [31]), pair([14], [23], [32, 33, 34])]


def random_pairs(seed: int, count: int) -> list[TokenPair]:
    rng = np.random.default_rng(seed)
    return [pair(*(rng.integers(1, 50, rng.integers(1, 9)).tolist() for _ in range(3))) for _ in range(count)]


def test_two_pairs_written_by_hand() -> None:
    """Rows: chosen of both pairs, then rejected of both; the longest row has five tokens."""
    batch = collate_padded(TWO, PAD, score_prompt=False)
    assert batch.input_ids.tolist() == [
        [11, 12, 13, 21, 22],
        [14, 23, 0, 0, 0],
        [11, 12, 13, 31, 0],
        [14, 32, 33, 34, 0],
    ]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 0]]
    assert batch.targets.tolist() == [21, 22, 23, 31, 32, 33, 34]
    assert batch.positions.tolist() == [2, 3, 5, 12, 15, 16, 17]
    assert batch.pair.tolist() == [0, 0, 1, 0, 1, 1, 1]
    assert batch.part.tolist() == [CHOSEN] * 3 + [REJECTED] * 4
    assert batch.chosen_tokens.tolist() == [2, 1]
    assert batch.rejected_tokens.tolist() == [1, 3]


def test_the_prompt_is_scored_once_and_from_its_second_token_on() -> None:
    batch = collate_padded(TWO, PAD, score_prompt=True)
    assert batch.targets.tolist() == [12, 13, 21, 22, 23, 31, 32, 33, 34]
    assert batch.positions.tolist() == [0, 1, 2, 3, 5, 12, 15, 16, 17]
    assert batch.part.tolist() == [PROMPT, PROMPT, CHOSEN, CHOSEN, CHOSEN] + [REJECTED] * 4


def test_without_the_rejected_side_there_are_half_the_rows() -> None:
    batch = collate_padded(TWO, PAD, score_prompt=False, with_rejected=False)
    assert batch.input_ids.tolist() == [[11, 12, 13, 21, 22], [14, 23, 0, 0, 0]]
    assert batch.targets.tolist() == [21, 22, 23]
    assert set(batch.part.tolist()) == {CHOSEN}


@pytest.mark.parametrize("score_prompt", [False, True])
@pytest.mark.parametrize("with_rejected", [False, True])
def test_every_target_follows_the_position_that_predicts_it(score_prompt: bool, with_rejected: bool) -> None:
    for seed in range(50):
        pairs = random_pairs(seed, count=1 + seed % 7)
        batch = collate_padded(pairs, PAD, score_prompt=score_prompt, with_rejected=with_rejected)
        flat, mask = batch.input_ids.flatten(), batch.attention_mask.flatten()
        assert torch.equal(flat[batch.positions + 1], batch.targets)
        assert mask[batch.positions + 1].all(), "padding is never scored"
        assert len(set(batch.positions.tolist())) == len(batch.positions), "no token is scored twice"
        for index, one in enumerate(pairs):
            assert scored(batch, index, CHOSEN) == one.chosen.tolist()
            assert scored(batch, index, REJECTED) == (one.rejected.tolist() if with_rejected else [])
            assert scored(batch, index, PROMPT) == (one.prompt[1:].tolist() if score_prompt else [])


def scored(batch: PairBatch, index: int, part: int) -> list[int]:
    """Targets of one part of one pair, in order."""
    return batch.targets[(batch.pair == index) & (batch.part == part)].tolist()


def test_the_mask_comes_from_lengths_and_not_from_the_padding_id() -> None:
    """A real token may have the padding's id, as the end token of many models does."""
    ends_with_padding = [pair([5], [6, PAD], [PAD]), pair([5, 5, 5], [7], [8])]
    batch = collate_padded(ends_with_padding, PAD, score_prompt=False)
    assert batch.attention_mask.sum().item() == 3 + 4 + 2 + 4
    assert scored(batch, 0, CHOSEN) == [6, PAD]
    assert scored(batch, 0, REJECTED) == [PAD]


def test_sums_of_pairs_are_those_of_their_tokens() -> None:
    """Token i has log-prob -(i + 1): see the batch above for which token is whose."""
    batch = collate_padded(TWO, PAD, score_prompt=True)
    logps = pair_logps(-torch.arange(1.0, 10.0), batch)
    assert logps.chosen.tolist() == [-(3 + 4), -5]
    assert logps.rejected.tolist() == [-6, -(7 + 8 + 9)]
    assert logps.nll_sum.tolist() == [1 + 2 + 3 + 4, 5]
    assert logps.chosen_mean.tolist() == [-3.5, -5]
    assert logps.rejected_mean.tolist() == [-6, -8]


def test_the_longer_side_is_prompt_and_longer_answer() -> None:
    lengths = np.array([[3, 2, 1], [1, 1, 3], [5, 4, 4]])
    assert longer_side(lengths).tolist() == [5, 4, 9]
