"""Rows with one answer and a label: from the file to the figures of held-out ones."""

import json
from io import StringIO
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console as RichConsole

from orpo_ray.cli.tables import print_means
from orpo_ray.config.data import DataConfig
from orpo_ray.data.formats import Reading, read_pairs
from orpo_ray.data.pairs import Refusal, TokenPair
from orpo_ray.data.pipeline import prepare
from orpo_ray.data.refusals import refuse_one_kind
from orpo_ray.data.store import Artifact
from orpo_ray.errors import DataError
from orpo_ray.runs.scores import INTERVAL_METRICS, PairScores, changes, intervals
from orpo_ray.runs.single_answers import share_of_better
from orpo_ray.runs.summary import plain, remarks
from orpo_ray.training.layout import collate
from orpo_ray.training.logprobs import pair_logps
from orpo_ray.training.metrics import summarise
from orpo_ray.training.plan import PACKED, PADDED, SHARED_PREFIX

PAIRS = [{"prompt": f"Q{n}", "chosen": f"yes {n}", "rejected": f"no {n}"} for n in range(20)]
SINGLE = Reading(single_answers=True)
SINGLES = [
    {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
    for row in PAIRS
    for side in ("chosen", "rejected")
]


def prepared(folder: Path, tokenizer: Any, rows: Any, single_answers: bool = True) -> Artifact:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataConfig.model_validate({"train": str(file), "eval_fraction": 0.2})
    said: list[str] = []
    return prepare(
        data, tokenizer, "print", folder / "runs", 1, said.append, single_answers=single_answers
    )


def everything(artifact: Artifact) -> list[TokenPair]:
    return [*artifact.train, *artifact.eval]


def test_the_tokens_are_those_of_the_same_answer_in_a_pair(
    chatml_tokenizer: Any, tmp_path: Path
) -> None:
    pairs = everything(prepared(tmp_path, chatml_tokenizer, PAIRS))
    singles = everything(prepared(tmp_path, chatml_tokenizer, SINGLES))
    expected = set()
    for pair, side in product(pairs, ("chosen", "rejected")):
        expected.add((tuple(pair.prompt), side, tuple(getattr(pair, side))))
    found = set()
    for single in singles:
        assert (len(single.chosen) == 0) != (len(single.rejected) == 0)
        side = "chosen" if len(single.chosen) else "rejected"
        found.add((tuple(single.prompt), side, tuple(getattr(single, side))))
    assert found == expected and len(singles) == len(SINGLES)


def test_they_are_counted_and_have_their_own_artifact(
    chatml_tokenizer: Any, tmp_path: Path
) -> None:
    artifact = prepared(tmp_path, chatml_tokenizer, [*PAIRS[:5], *SINGLES[10:]])
    summary = artifact.summary
    assert (summary.read, summary.good_answers, summary.bad_answers) == (35, 15, 15)
    as_pairs = prepared(tmp_path, chatml_tokenizer, PAIRS, single_answers=False)
    also_pairs = prepared(tmp_path, chatml_tokenizer, PAIRS, single_answers=True)
    assert as_pairs.path != also_pairs.path
    assert as_pairs.summary.good_answers == as_pairs.summary.bad_answers == 0


def test_a_real_file_for_kto_is_read(
    shared_data: Path, chatml_tokenizer: Any, tmp_path: Path
) -> None:
    source = shared_data / "formats" / "llamafactory_kto_en_demo.json"
    data = DataConfig.model_validate({"train": str(source), "max_length": 32768})
    said: list[str] = []
    artifact = prepare(
        data, chatml_tokenizer, "print", tmp_path, 1, said.append, single_answers=True
    )
    labels = [row["label"] for row in json.loads(source.read_text())]
    assert (labels.count(True), labels.count(False)) == (150, 150)
    # One of the bad answers goes on with another model's mark for a user's turn.
    assert artifact.summary.bad == {"template-inside": 1} and artifact.summary.duplicates == 0
    assert "299 of them have one answer: 150 good, 149 bad" in said


@pytest.mark.parametrize("missing", ["good", "bad"])
def test_answers_of_one_kind_are_refused(
    missing: str, chatml_tokenizer: Any, tmp_path: Path
) -> None:
    rows = [row for row in SINGLES if row["label"] is (missing == "bad")]
    artifact = prepared(tmp_path, chatml_tokenizer, rows)
    with pytest.raises(
        DataError, match=f"all answers to train on are .* needs {missing} ones, too"
    ):
        refuse_one_kind(artifact)


# --- in a batch -----------------------------------------------------------------------------------


def token_pair(*sides: list[int]) -> TokenPair:
    return TokenPair.of_answers("a:1", *(np.array(ids, dtype=np.int32) for ids in sides))


@pytest.mark.parametrize("layout", [PADDED, PACKED, SHARED_PREFIX])
def test_a_missing_answer_takes_no_place_and_scores_nothing(layout: Any) -> None:
    pairs = [
        token_pair([1, 2], [3, 4], []),
        token_pair([5], [], [6]),
        token_pair([7], [8], [9, 10]),
    ]
    batch = collate(pairs, layout, 0, score_prompt=False)
    scored = list(
        zip(batch.pair.tolist(), batch.part.tolist(), batch.targets.tolist(), strict=True)
    )
    assert sorted(scored) == [(0, 1, 3), (0, 1, 4), (1, 2, 6), (2, 1, 8), (2, 2, 9), (2, 2, 10)]
    flat = batch.input_ids.flatten()
    before = {3: 2, 4: 3, 6: 5, 8: 7, 10: 9}
    for position, target in zip(batch.positions.tolist(), batch.targets.tolist(), strict=True):
        if target in before:
            assert flat[position] == before[target]
    log_probs = -torch.arange(1.0, len(batch.targets) + 1)
    logps = pair_logps(log_probs, batch)
    assert logps.rejected[0] == 0 and logps.chosen[1] == 0
    assert logps.chosen_tokens.tolist() == [2, 0, 1]


# --- figures --------------------------------------------------------------------------------------


def made_up(good: int, bad: int, seed: int = 0) -> PairScores:
    generator = np.random.default_rng(seed)
    is_good = np.arange(good + bad) < good
    tokens = generator.integers(2, 9, size=good + bad)
    sums = -tokens * generator.exponential(size=good + bad)
    return PairScores(
        np.where(is_good, sums, 0.0),
        np.where(is_good, 0.0, sums),
        np.where(is_good, tokens, 0),
        np.where(is_good, 0, tokens),
    )


def test_the_accuracy_is_the_share_of_good_and_bad_answers_in_the_right_order() -> None:
    generator = np.random.default_rng(1)
    good, bad = generator.integers(0, 6, 9).astype(float), generator.integers(0, 6, 7).astype(float)
    of_good, of_bad = generator.integers(0, 3, 9), generator.integers(0, 3, 7)
    wins = sum(
        of_good[i] * of_bad[j] * ((good[i] > bad[j]) + 0.5 * (good[i] == bad[j]))
        for i, j in product(range(9), range(7))
    )
    expected = wins / (of_good.sum() * of_bad.sum())
    assert share_of_better(good, bad, of_good, of_bad) == pytest.approx(expected)


def test_the_means_by_hand() -> None:
    scores = PairScores(
        np.array([-2.0, -6.0, 0.0, 0.0]),
        np.array([0.0, 0.0, -4.0, -10.0]),
        np.array([2, 2, 0, 0]),
        np.array([0, 0, 2, 2]),
    )
    found = summarise(scores)
    assert found.pop("log_odds_ratio") > 0
    # Per token: good -1 and -3, bad -2 and -5; three of the four comparisons are right.
    assert found == pytest.approx(
        {"accuracy": 0.75, "margin": 1.5, "chosen_logp": -2, "rejected_logp": -3.5, "nll": 2}
    )


def test_intervals_hold_their_means_and_shrink_with_answers() -> None:
    few, many = intervals(made_up(60, 40)), intervals(made_up(960, 640))
    for name in INTERVAL_METRICS:
        assert few[name].low < few[name].value < few[name].high
        widths = [one[name].high - one[name].low for one in (few, many)]
        assert widths[0] / widths[1] == pytest.approx(4, rel=0.4)


def test_a_few_answers_are_never_certain() -> None:
    """Six answers in the right order have no spread in the bootstrap."""
    good, bad = np.array([-1.0, -1.0, -1.0]), np.array([-9.0, -9.0, -9.0])
    tokens, none = np.ones(3, dtype=np.int64), np.zeros(3, dtype=np.int64)
    zero = np.zeros(3)
    wrong, right = (
        PairScores(
            np.append(one, zero),
            np.append(zero, other),
            np.append(tokens, none),
            np.append(none, tokens),
        )
        for one, other in ((bad, good), (good, bad))
    )
    change = changes(wrong, right)["accuracy"]
    assert (change.before.value, change.after.value) == (0.0, 1.0)
    assert (change.before.high, change.after.low) == (1.0, 0.0)
    assert change.difference.low <= 0.0 and change.is_noise


def test_a_change_of_single_answers_has_no_test_of_pairs() -> None:
    before, after = made_up(60, 40), made_up(60, 40)
    after.chosen[:60] *= 0.5
    found = changes(before, after)
    assert found["accuracy"].chance is None and found["margin"].difference.low > 0
    assert not any("show no difference" in line for line in remarks(found, 100))


def test_pairs_alone_are_compared_if_there_are_any() -> None:
    single = made_up(3, 2)
    mixed = PairScores(
        np.append(single.chosen, [-1.0, -4.0]),
        np.append(single.rejected, [-2.0, -3.0]),
        np.append(single.chosen_tokens, [1, 1]),
        np.append(single.rejected_tokens, [1, 1]),
    )
    assert summarise(mixed) == summarise(mixed.rows(np.array([5, 6])))
    assert summarise(mixed)["accuracy"] == 0.5


def test_of_one_kind_alone_only_its_own_means_are_told() -> None:
    assert summarise(made_up(3, 0)).keys() == {"chosen_logp", "nll"}
    assert summarise(made_up(0, 3)).keys() == {"rejected_logp"}


def test_of_one_kind_alone_nothing_is_said_of_accuracy() -> None:
    before, after = made_up(30, 0), made_up(30, 0)
    after.chosen[:] *= 2
    [line] = remarks(changes(before, after), 30)
    assert "The chosen answers became less likely" in line
    console = RichConsole(file=StringIO(), width=100)
    print_means(plain(intervals(before)), 30, console)
    text = console.file.getvalue()
    assert "nan" not in text and f"{-intervals(before)['nll'].value:.3f}".lstrip("-") in text


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        ({"thumbs_up": 1, "thumbs_down": 4}, False),
        ({"thumbs_up": 7, "thumbs_down": "2"}, True),
        ({"thumbs_up": True, "thumbs_down": False}, True),
        ({"thumbs_up": 0, "thumbs_down": 0}, "thumbs_up 0, thumbs_down 0"),
        ({"thumbs_up": "some", "thumbs_down": 1}, "thumbs_up 'some'"),
        ({"label": True, "kto_tag": False}, "label True, but kto_tag False"),
        ({"label": "correct", "kto_tag": True}, True),
        ({"label": "incorrect"}, False),
        ({"label": None}, "label is null"),
        ({"kto_tag": None, "thumbs": None}, "kto_tag is null"),
    ],
)
def test_labels_that_are_read_and_those_that_are_refused(
    labels: dict[str, Any], found: bool | str
) -> None:
    read = read_pairs({"prompt": "Q", "completion": "A", **labels}, SINGLE)
    if isinstance(found, str):
        assert read == Refusal("wrong-label", found)
        return
    assert isinstance(read, list)
    assert [pair.chosen is not None for pair in read] == [found]


@pytest.mark.parametrize(
    ("answer", "refusal"),
    [
        (7, Refusal("wrong-type", "completion holds int, not text or messages")),
        (None, Refusal("wrong-type", "completion is null")),
        (
            [{"role": "user", "content": "A"}],
            Refusal("wrong-roles", "completion ends with a turn of role 'user'"),
        ),
    ],
)
def test_a_refused_answer_is_named_by_its_column(answer: Any, refusal: Refusal) -> None:
    assert read_pairs({"prompt": "Q", "completion": answer, "label": False}, SINGLE) == refusal
