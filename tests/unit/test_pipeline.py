"""From files to an artifact: exact counts on the real files, the user's policies, and the cache."""

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from text_pairs import text_pair

from orpo_ray import ray_runtime
from orpo_ray.config.data import DataConfig
from orpo_ray.data import parallel, pipeline
from orpo_ray.data.pairs import TokenPair
from orpo_ray.data.pipeline import prepare
from orpo_ray.data.store import Artifact
from orpo_ray.data.summary import describe
from orpo_ray.data.tokenise import PairTokeniser
from orpo_ray.errors import DataError, ResourceError
from orpo_ray.models.templates import TEMPLATES

Prepare = Callable[..., tuple[Artifact, list[str]]]

RECOGNISED = {
    # file: (kept, duplicates, bad)
    "finetuninglab_preference_pairs.jsonl": (113, 0, 0),
    "formats/colossalai_test_dpo_data.jsonl": (1, 0, 0),
    "formats/conversationalglm_preferences.jsonl": (1, 0, 0),
    "formats/minillm_dpo_pairs.jsonl": (3, 0, 0),
    "formats/nemo_aligner_dummy_dpo.jsonl": (4, 96, 0),
    "formats/rwkv_dpo_withreject.csv": (31, 0, 0),
    "formats/torchtune_hh_rlhf_tiny.json": (1, 0, 0),
    "hh_harmless_test.jsonl.gz": (197, 0, 0),
    "hh_harmless_train.jsonl.gz": (1184, 0, 5),
    "llamafactory_dpo_en_demo.json": (295, 5, 0),
    "llmbar_adv_gptinst.json": (92, 0, 0),
    "llmbar_adv_neighbor.json": (134, 0, 0),
    "llmbar_natural.json": (100, 0, 0),
    # Both duplicates are Orca pairs that LLaMA-Factory's mix has, too.
    "msfoundry_orca_dpo_a.jsonl": (168, 2, 0),
    "mxandre_dpo_train_zh.jsonl": (242, 0, 0),
    "rasbt_instruction_preference.json": (793, 0, 5),
}
EVALS = {
    "prompt": "question",
    "chosen": "answer_matching_behavior",
    "rejected": "answer_not_matching_behavior",
}
NEEDS_COLUMNS = {
    "halueval_qa_a.jsonl": (
        300,
        {"prompt": "question", "chosen": "right_answer", "rejected": "hallucinated_answer"},
    ),
    "anthropic_evals_extraversion.jsonl": (1000, EVALS),
    "anthropic_evals_interest-in-science.jsonl": (1000, EVALS),
    "anthropic_evals_risk-averse.jsonl": (1000, EVALS),
}
NO_PAIRS = {
    "formats/llamafactory_kto_en_demo.json": "the rows are unpaired",
    "formats/oumi_vision_language_dpo_format.jsonl": "the row carries images",
    "formats/rlhf_eval_lab_prefs.jsonl": "the prompt is kept in another file",
    "formats/rlhf_eval_lab_prompts.jsonl": "prompts but no answers",
}


@pytest.fixture
def run(tmp_path: Path, chatml_tokenizer: Any, ray_session: None) -> Prepare:
    """Prepares `train` files with settings, into this test's own storage."""

    def run(
        *train: str | Path | dict[str, Any], seed: int = 1, **settings: Any
    ) -> tuple[Artifact, list[str]]:
        listed = [file if isinstance(file, dict) else {"source": str(file)} for file in train]
        config = DataConfig.model_validate(
            {"train": listed, "max_length": 8192, "max_prompt_length": 6000, **settings}
        )
        said: list[str] = []
        return prepare(
            config, chatml_tokenizer, "fingerprint", tmp_path / "storage", seed, said.append
        ), said

    return run


@pytest.fixture
def rows(tmp_path: Path) -> Callable[..., Path]:
    """Writes rows to a JSONL file of the given name."""

    def write(name: str, *rows: dict[str, Any] | str) -> Path:
        path = tmp_path / name
        path.write_text(
            "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
        )
        return path

    return write


TOO_LONG = "the prompt and the longer of its two answers have more tokens than "


def pair(n: int, prompt: str | None = None) -> dict[str, str]:
    return {"prompt": prompt or f"question {n}", "chosen": f"good {n}", "rejected": f"bad {n}"}


def refused(run: Prepare, *train: Any, **settings: Any) -> str:
    with pytest.raises(DataError) as caught:
        run(*train, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- the real files -------------------------------------------------------------------------------


def test_all_24_files_are_covered(shared_data: Path) -> None:
    """The files whose rows the manifest counts; it describes the other files in words."""
    manifest = (shared_data / "MANIFEST.md").read_text(encoding="utf-8")
    files = re.findall(r"^\| `(\S+)` \| \d+ \|", manifest, re.MULTILINE)
    assert sorted(files) == sorted([*RECOGNISED, *NEEDS_COLUMNS, *NO_PAIRS])
    assert all((shared_data / file).is_file() for file in files)
    assert len(files) == 24


@pytest.mark.ray
def test_recognised_files_have_exactly_the_counts_of_the_manifest(
    shared_data: Path, run: Prepare
) -> None:
    artifact, said = run(*(shared_data / file for file in RECOGNISED))
    found = {
        str(Path(source["source"]).relative_to(shared_data)): (
            source["kept"],
            source["duplicates"],
            source["bad"],
        )
        for source in artifact.summary.sources
    }
    assert found == RECOGNISED
    assert artifact.summary.bad == {"identical": 5, "different-prompts": 3, "empty-chosen": 2}
    assert artifact.summary.read == 3472
    # Both HH files, LLaMA-Factory, ColossalAI.
    assert artifact.summary.multi_turn == 853 + 142 + 103 + 1
    assert (
        f"{853 + 142 + 103 + 1} pairs with earlier assistant turns: only the last answer is trained"
        in said
    )
    quarantine = [json.loads(line) for line in (artifact.path / "quarantine.jsonl").open()]
    hh = [
        (row["line"], row["reason"])
        for row in quarantine
        if row["file"].endswith("hh_harmless_train.jsonl.gz")
    ]
    # the manifest counts from 0, files from line 1
    assert hh == [
        (45, "empty-chosen"),
        (258, "empty-chosen"),
        (872, "different-prompts"),
        (1008, "different-prompts"),
        (1052, "different-prompts"),
    ]
    assert all(row["split"] == "train" for row in quarantine)
    order = [Path(file).name for file in RECOGNISED]
    places = [
        (order.index(name), int(line))
        for name, _, line in (i.rpartition(":") for i in artifact.train.pair_ids)
    ]
    assert places == sorted(places)


@pytest.mark.parametrize("file", NEEDS_COLUMNS)
def test_files_that_load_with_columns(shared_data: Path, run: Prepare, file: str) -> None:
    kept, columns = NEEDS_COLUMNS[file]
    message = refused(run, shared_data / file)
    assert "the columns are not recognised" in message and columns["chosen"] in message
    artifact, _ = run(shared_data / file, columns=columns)
    assert (artifact.summary.sources[0]["kept"], artifact.summary.bad) == (kept, {})


@pytest.mark.parametrize("file", NO_PAIRS)
def test_files_without_pairs_are_refused_for_their_true_reason(
    shared_data: Path, run: Prepare, file: str, tmp_path: Path
) -> None:
    message = refused(run, shared_data / file)
    assert str(shared_data / file) in message
    assert NO_PAIRS[file] in message
    assert not (tmp_path / "storage").exists()


def test_tokens_are_those_of_the_pair_and_stand_in_the_files_order(
    shared_data: Path, run: Prepare, chatml_tokenizer: Any
) -> None:
    path = shared_data / "rasbt_instruction_preference.json"
    artifact, _ = run(path)
    rows = json.loads(path.read_text())
    numbers = [int(pair_id.rpartition(":")[2]) for pair_id in artifact.train.pair_ids]
    assert numbers == sorted(numbers)
    for index in (0, 400, len(numbers) - 1):
        row = rows[numbers[index] - 1]
        question = row["instruction"] + ("\n\n" + row["input"] if row["input"] else "")
        wanted = text_pair([{"role": "user", "content": question}], row["chosen"], row["rejected"])
        [tokens] = PairTokeniser(chatml_tokenizer).pairs([wanted], ["x"])
        assert isinstance(tokens, TokenPair)
        assert artifact.train[index].chosen.tolist() == tokens.chosen.tolist()
        assert artifact.train[index].prompt.tolist() == tokens.prompt.tolist()


# --- policies -------------------------------------------------------------------------------------


def test_too_many_bad_rows_name_the_reasons_with_an_example(
    run: Prepare, rows: Any, tmp_path: Path
) -> None:
    same = {"prompt": "Q", "chosen": "a", "rejected": "a"}
    file = rows("a.jsonl", *map(pair, range(7)), same, same, "{broken")
    message = refused(run, file, max_bad_fraction=0.2)
    assert message.startswith(
        "3 of 10 rows are bad, more than data.max_bad_fraction (0.2) allows: 2 x identical"
    )
    assert f"first {file}:8: chosen and rejected are the same" in message
    assert f"1 x not-json, first {file}:10: the row is not valid JSON" in message
    assert not (tmp_path / "storage").exists()
    artifact, said = run(file, max_bad_fraction=0.3)
    assert artifact.summary.bad == {"identical": 2, "not-json": 1}
    assert "2 bad rows in quarantine.jsonl: chosen and rejected are the same" in said


def test_bad_rows_fail_stops_at_the_first(run: Prepare, rows: Any) -> None:
    file = rows("a.jsonl", pair(1), {"prompt": "Q", "chosen": "", "rejected": "a"}, "{broken")
    assert (
        refused(run, file, bad_rows="fail")
        == f"{file}:2: the chosen answer is empty (data.bad_rows is fail)"
    )


def test_duplicates_are_dropped_and_are_not_bad(run: Prepare, rows: Any) -> None:
    artifact, said = run(rows("a.jsonl", *map(pair, [1, 2, 1, 3, 1])), max_bad_fraction=0)
    assert artifact.summary.duplicates == 2
    assert sorted([*artifact.train.pair_ids, *artifact.eval.pair_ids]) == [
        "a.jsonl:1",
        "a.jsonl:2",
        "a.jsonl:4",
    ]
    assert "2 exact duplicates dropped" in said


def test_what_is_trained_of_several_turns_is_said(
    run: Prepare, rows: Any, chatml_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chatml_tokenizer, "chat_template", TEMPLATES["chatml"].text)
    talk = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "2 + 2?"},
    ]
    file = rows("a.jsonl", pair(1), pair(2), {"prompt": talk, "chosen": "4", "rejected": "5"})
    last, said = run(file, eval_fraction=0.4)
    assert "1 pair with earlier assistant turns: only the last answer is trained" in said
    assert last.train.trained[:, 0].max() == 0
    turns, said = run(file, eval_fraction=0.4, train_on="all-assistant")
    assert (
        "1 pair with earlier assistant turns: all are trained, those of the prompt by the "
        "likelihood term alone"
    ) in said
    both = [*turns.train, *turns.eval]
    shown = [
        chatml_tokenizer.decode(pair.prompt[start:stop])
        for pair in both
        for start, stop in pair.trained.prompt
    ]
    assert shown == ["Hello.<|im_end|>"]
    assert turns.train.lengths.tolist() == last.train.lengths.tolist()


def test_overlong_pairs_by_policy(run: Prepare, rows: Any) -> None:
    file = rows("a.jsonl", *map(pair, range(4)), pair(4, prompt="word " * 300))
    limits: dict[str, Any] = {"max_length": 100, "max_prompt_length": 50, "max_bad_fraction": 0}
    dropped, said = run(file, **limits)
    assert (dropped.summary.overlong, dropped.summary.bad) == (1, {})
    assert f"1 pair dropped: {TOO_LONG}data.max_length=100" in said
    cut, said = run(file, overlong="truncate-prompt-left", **limits)
    assert (cut.summary.overlong, cut.summary.truncated) == (0, 1)
    assert max(cut.train.lengths[:, 0].max(), cut.eval.lengths[:, 0].max()) == 50
    message = refused(run, file, overlong="error", **limits)
    assert message.startswith(
        f"{file}:5: the prompt and the longer of its two answers have more tokens than max_length"
    )


def test_the_limit_that_drops_a_pair_is_named(run: Prepare, rows: Any) -> None:
    prompts = pair(1, prompt="word " * 70)
    answers = pair(2) | {"chosen": "word " * 300}
    file = rows("a.jsonl", *map(pair, range(4)), prompts, prompts | {"chosen": "x"}, answers)
    found, said = run(file, max_length=100, max_prompt_length=50)
    assert (found.summary.overlong, found.summary.overlong_prompts) == (3, 2)
    assert [line for line in said if "dropped" in line] == [
        f"1 pair dropped: {TOO_LONG}data.max_length=100",
        "2 pairs dropped: the prompt has more tokens than data.max_prompt_length=50 (half of "
        "max_length, unless set)",
    ]
    older = replace(found.summary, overlong_prompts=None)
    assert [line for line in describe(older) if "dropped" in line] == [
        "3 pairs dropped: they have more tokens than data.max_length=100, or their prompts more "
        "than data.max_prompt_length=50"
    ]


def test_scored_answers_become_the_pairs_that_the_settings_ask_for(run: Prepare, rows: Any) -> None:
    answers = [["four", 4], ["one", 1], ["also four", 4], ["two", 2]]
    completions = [{"response": text, "score": score} for text, score in answers]
    close = [{"response": "a", "score": 3}, {"response": "b", "score": 2.5}]
    file = rows(
        "a.jsonl",
        {"prompt": "Q1", "completions": completions},
        {"prompt": "Q2", "completions": close},
        {"prompt": "Q3", "completions": close[:1]},
    )
    limits = {"max_bad_fraction": 0.4, "eval": [{"source": str(rows("b.jsonl", pair(1)))}]}

    def prepared(**settings: Any) -> tuple[Artifact, list[str]]:
        return run(file, **limits, **settings)

    best, said = prepared()
    assert best.train.pair_ids == ["a.jsonl:1", "a.jsonl:2"]
    every, _ = prepared(pairs="all")
    assert every.train.pair_ids == [*(f"a.jsonl:1.{n}" for n in range(1, 6)), "a.jsonl:2"]
    adjacent, _ = prepared(pairs="adjacent")
    assert adjacent.train.pair_ids == ["a.jsonl:1.1", "a.jsonl:1.2", "a.jsonl:2"]
    wide, said = prepared(pairs="all", min_margin=2)
    assert wide.train.pair_ids == [f"a.jsonl:1.{n}" for n in range(1, 5)]
    assert "1 row dropped: no two of their scored answers differ by data.min_margin=2" in said
    for artifact in (best, every, adjacent, wide):
        assert artifact.summary.read == 4
        assert artifact.summary.bad == {"too-few-scores": 1}
        assert artifact.summary.sources[0]["bad"] == 1
    assert wide.summary.small_margin == 1


def test_unused_columns_are_announced_every_time_and_once_a_file(run: Prepare, rows: Any) -> None:
    file = rows("a.jsonl", *({**pair(n), "rating": n} for n in range(4)))
    line = f"{file}: columns that are not used: rating"
    for _ in range(2):
        _, said = run(file, eval=[{"source": str(file)}])
        assert said.count(line) == 1


def test_unused_columns_of_later_rows_are_announced_with_their_counts(
    run: Prepare, rows: Any
) -> None:
    plain = [pair(n) | {"rating": 1, "tools": ""} for n in range(30)]
    late = [pair(n) | {"history": [["x", "y"]], "note": n} for n in range(30, 36)]
    empty = [pair(n) | {"history": [], "image_path": None} for n in range(36, 40)]
    file = rows("a.jsonl", *plain, *late, *empty, {"odd": 1}, pair(41) | {"last": False})
    first = f"{file}: columns that are not used: rating, tools"
    line = f"{file}: columns of later rows that are not used: "
    for _ in range(2):
        _, said = run(file, eval=[{"source": str(file)}], max_bad_fraction=0.1)
        assert first in said
        assert [each for each in said if each.startswith(line)] == [
            line + "history (6 rows), note (6 rows), last (1 row)"
        ]


def test_many_unused_columns_are_counted(run: Prepare, rows: Any) -> None:
    more = {f"score_{n}": n for n in range(15)}
    file = rows("a.jsonl", *(pair(n) | more for n in range(4)))
    _, said = run(file)
    assert any(line.endswith("score_10, score_11 and 3 more") for line in said)


def test_nothing_usable_is_left(run: Prepare, rows: Any) -> None:
    long_ = rows("a.jsonl", pair(1, prompt="word " * 300))
    message = refused(run, long_, max_length=100, max_prompt_length=50)
    assert message == (
        "data.train: no usable pair is left of 1 rows; 1 are longer than data.max_length=100 or "
        "max_prompt_length=50"
    )
    good = rows("b.jsonl", pair(1))
    assert "data.eval: no usable pair" in refused(
        run, good, eval=[{"source": str(long_)}], max_length=100, max_prompt_length=50
    )
    assert refused(run, rows("c.jsonl")).endswith("c.jsonl: no rows in it")


def test_a_file_whose_rows_are_all_refused_by_the_template(
    run: Prepare, rows: Any, chatml_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = "{{ raise_exception('System role not supported') if messages[0].role == 'system' }}x"
    monkeypatch.setattr(chatml_tokenizer, "chat_template", template)
    row = {"system": "Be kind.", **pair(1)}
    message = refused(run, rows("a.jsonl", row))
    assert "the chat template refuses the conversation: System role not supported" in message


def test_named_columns_that_no_source_has_are_refused(
    run: Prepare, rows: Any, tmp_path: Path
) -> None:
    file = rows("a.jsonl", *map(pair, range(4)))
    message = refused(
        run, file, columns={"prompt": "promt", "chosen": "chosn", "rejected": "rejeted"}
    )
    assert message == (
        f"data.columns: {file}: promt, chosn, rejeted not among columns prompt, chosen, rejected; "
        "did you mean prompt, chosen, rejected?"
    )
    message = refused(run, file, columns={"prompt": "q", "chosen": "yes", "rejected": "no"})
    assert message.endswith("q, yes, no not among columns prompt, chosen, rejected")
    assert not (tmp_path / "storage").exists()


def test_a_source_read_without_the_named_columns_is_announced(run: Prepare, rows: Any) -> None:
    odd = rows("a.jsonl", *({"q": f"Q{n}", "yes": "good", "no": "bad"} for n in range(4)))
    plain = rows("b.jsonl", *map(pair, range(2)))
    columns = {"prompt": "q", "chosen": "yes", "rejected": "no"}
    wanted = (
        f"data.columns do not apply to {plain} (q, yes, no not among columns prompt, chosen, "
        "rejected); its shape is recognised"
    )
    for _ in ("prepared", "found"):
        artifact, said = run(odd, eval=[{"source": str(plain)}], columns=columns)
        assert (len(artifact.train), len(artifact.eval)) == (4, 2)
        assert [line for line in said if line.startswith("data.columns")] == [wanted]


# --- split, overlap, weights ----------------------------------------------------------------------


def test_without_eval_whole_prompts_are_held_out(run: Prepare, rows: Any) -> None:
    file = rows("a.jsonl", *(pair(n, prompt=f"question {n // 2}") for n in range(100)))
    artifact, said = run(file, eval_fraction=0.1)
    assert (len(artifact.train), len(artifact.eval), artifact.summary.held_out) == (90, 10, True)
    assert (
        "no data.eval: 10 training pairs held out for evaluation (drawn by the seed; pairs of one "
        "prompt stay together)" in said
    )
    questions = [
        {(int(pair_id.rpartition(":")[2]) - 1) // 2 for pair_id in ids}
        for ids in (artifact.train.pair_ids, artifact.eval.pair_ids)
    ]
    assert questions[0].isdisjoint(questions[1])
    other, _ = run(file, eval_fraction=0.1, seed=2)
    assert other.path != artifact.path
    assert other.eval.pair_ids != artifact.eval.pair_ids


def test_pairs_in_both_train_and_eval_are_announced(run: Prepare, rows: Any) -> None:
    train, evaluation = (
        rows("a.jsonl", *map(pair, range(5))),
        rows("b.jsonl", *map(pair, range(3, 9))),
    )
    artifact, said = run(train, eval=[{"source": str(evaluation)}])
    assert (len(artifact.train), len(artifact.eval), artifact.summary.overlap) == (5, 6, 2)
    assert (
        "warning: 2 pairs in both train and eval, so evaluation will look better than it is" in said
    )
    again, _ = run(train, eval=[{"source": str(evaluation)}], seed=9)
    assert again.path == artifact.path  # nothing was drawn, so another seed changes nothing


def test_training_pairs_near_evaluation_pairs_are_counted_and_dropped_if_asked(
    run: Prepare, rows: Any
) -> None:
    text = "The quick brown fox jumps over the lazy dog and runs through the green forest at night"
    words = text.split()

    def long(prompt: str, chosen: str = text) -> dict[str, str]:
        return {"prompt": prompt, "chosen": chosen, "rejected": "bad"}

    train = rows(
        "a.jsonl",
        {"system": "Be kind. " * 9, **long("Tell me a story, please")},  # the same, in a system
        long("Tell me  a STORY, please", text + " again"),
        long("Tell me a story, please", " ".join(words[8:] + words[:8])),
        long("Name the days of the week", "Monday, Tuesday, Wednesday and so on"),
        long("hi", "yes"),
    )
    evaluation = rows("b.jsonl", long("Tell me a story, please"), long("hi", "no"))
    settings = {"eval": [{"source": str(evaluation)}]}
    counted, said = run(train, **settings)
    assert (len(counted.train), counted.summary.near) == (5, 2)
    assert (
        "2 training pairs nearly equal to an evaluation pair: evaluation will look better than it "
        "is; data.dedup=near drops them" in said
    )
    dropped, said = run(train, dedup="near", **settings)
    assert dropped.train.pair_ids == ["a.jsonl:3", "a.jsonl:4", "a.jsonl:5"]
    assert "2 training pairs dropped: equal or nearly equal to an evaluation pair" in said
    assert len(dropped.eval) == 2


def test_weights(run: Prepare, rows: Any) -> None:
    heavy, light = rows("a.jsonl", *map(pair, range(4))), rows("b.jsonl", *map(pair, range(10, 20)))
    artifact, _ = run(
        {"source": str(heavy), "weight": 2},
        {"source": str(light), "weight": 0.5},
        eval=[{"source": str(heavy)}],
    )
    ids = artifact.train.pair_ids
    assert ids[:8] == [f"a.jsonl:{n}" for n in (1, 1, 2, 2, 3, 3, 4, 4)]
    assert len(ids) == 13 and len(set(ids[8:])) == 5


def test_a_weight_that_leaves_no_pair_is_named(run: Prepare, rows: Any) -> None:
    file = rows("a.jsonl", *map(pair, range(6)))
    message = refused(run, {"source": str(file), "weight": 0.05}, eval=[{"source": str(file)}])
    assert (
        message
        == f"data.train: {file} has weight 0.05 and 6 usable pairs, which makes no training pair; "
        "raise the weight"
    )


def test_a_weight_on_evaluation_pairs_is_refused() -> None:
    with pytest.raises(ValueError, match="every evaluation pair counts once"):
        DataConfig.model_validate(
            {"train": [{"source": "a"}], "eval": [{"source": "b", "weight": 2}]}
        )


def test_files_of_one_name_stay_apart(run: Prepare, tmp_path: Path) -> None:
    for n, folder in enumerate(("x", "y")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.jsonl").write_text(json.dumps(pair(n)))
    artifact, _ = run(
        tmp_path / "x/a.jsonl",
        tmp_path / "y/a.jsonl",
        eval=[{"source": str(tmp_path / "x/a.jsonl")}],
    )
    assert artifact.train.pair_ids == ["x/a.jsonl:1", "y/a.jsonl:1"]


# --- the cache ------------------------------------------------------------------------------------


def test_the_same_data_is_prepared_once(
    run: Prepare, rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = rows("a.jsonl", *map(pair, range(20)))
    first, _ = run(file)
    monkeypatch.setattr(
        pipeline, "make_shards", lambda *_, **__: pytest.fail("it was prepared again")
    )
    again, said = run(file)
    assert again.path == first.path
    assert said[0] == f"prepared data found in {first.path}"
    assert any("held out" in line for line in said)


@pytest.mark.parametrize(
    "change",
    [
        {"max_length": 4000, "max_prompt_length": 100},
        {"overlong": "truncate-prompt-left"},
        {"eval_fraction": 0.2},
        {"max_bad_fraction": 0.5},
        {"train_on": "all-assistant"},
        {"seed": 2},
    ],
)
def test_whatever_shapes_the_tokens_changes_the_hash(
    run: Prepare, rows: Any, change: dict[str, Any]
) -> None:
    file = rows("a.jsonl", *map(pair, range(4)))
    assert run(file)[0].path != run(file, **change)[0].path


def test_changed_rows_or_template_change_the_hash(
    run: Prepare, rows: Any, chatml_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = {run(rows("a.jsonl", *map(pair, range(4))))[0].path}
    paths.add(run(rows("a.jsonl", *map(pair, range(1, 5))))[0].path)
    monkeypatch.setattr(
        chatml_tokenizer, "chat_template", "{# new #}" + chatml_tokenizer.chat_template
    )
    paths.add(run(rows("a.jsonl", *map(pair, range(4))))[0].path)
    assert len(paths) == 3


@pytest.mark.parametrize("package", ["transformers", "tokenizers", "jinja2"])
def test_another_version_of_what_renders_changes_the_hash(
    run: Prepare, rows: Any, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    file = rows("a.jsonl", *map(pair, range(4)))
    first, _ = run(file)
    monkeypatch.setattr(
        pipeline, "version", lambda name: "0.0" if name == package else version(name)
    )
    assert run(file)[0].path != first.path


def test_a_template_that_asks_for_the_date_says_which_it_gets(
    run: Prepare, rows: Any, chatml_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = "{{ strftime_now('%d %b %Y') }}" + chatml_tokenizer.chat_template
    monkeypatch.setattr(chatml_tokenizer, "chat_template", template)
    artifact, said = run(rows("a.jsonl", *map(pair, range(4))))
    assert (
        said[0] == "the chat template asks for today's date: it always gets 2024-07-26, "
        "so that tokens stay the same"
    )
    assert artifact.summary.settings["date"] == "2024-07-26"
    assert chatml_tokenizer.decode(artifact.train[0].prompt).startswith("26 Jul 2024")


def test_a_damaged_artifact_is_prepared_again(run: Prepare, rows: Any) -> None:
    file = rows("a.jsonl", *map(pair, range(4)))
    first, _ = run(file)
    # Deleted first: shortening a file that is memory-mapped would kill this process.
    (first.path / "train.arrow").unlink()
    (first.path / "train.arrow").write_bytes(b"")
    again, said = run(file)
    assert "is damaged (train.arrow has another size than recorded); it is built again" in said[0]
    assert again.train.pair_ids == first.train.pair_ids


def test_a_cluster_that_cannot_be_reached_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def unreachable(**_: object) -> None:
        raise ConnectionError("Could not find any running Ray instance.")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", unreachable)
    with socket.create_server(("127.0.0.1", 0)) as somebody:
        address = "{}:{}".format(*somebody.getsockname())
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(ResourceError, match=rf"RAY_ADDRESS \({address}\) cannot be joined"):
            ray_runtime.start_ray(1000)


def test_a_cluster_that_is_not_there_is_refused_before_ray_tries_for_minutes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray tries to connect"))
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(
        ResourceError, match=r"^RAY_ADDRESS: no Ray cluster answers at 127\.0\.0\.1:1 \("
    ):
        ray_runtime.start_ray(1000)


def test_the_address_of_a_dashboard_is_no_clusters() -> None:
    with pytest.raises(ResourceError, match="is a dashboard's address, to which jobs are submit"):
        ray_runtime.refuse_unreachable("http://10.0.0.1:8265")


@pytest.mark.ray
def test_a_folder_whose_name_is_too_long_for_rays_sockets(tmp_path: Path) -> None:
    script = """
from orpo_ray.ray_runtime import start_ray
try:
    start_ray()
except Exception as error:
    print(type(error).__name__, error)
"""
    folder = tmp_path / ("long" * 25)
    folder.mkdir()
    [said] = python(script, TMPDIR=str(folder)).stdout.splitlines()
    assert said.startswith("SetupError Ray's sockets do not fit into the folder")
    assert said.endswith("set RAY_TMPDIR to a shorter one, such as /tmp")


@pytest.mark.ray
def test_sigterm_reaches_the_programs_own_handler_while_ray_runs() -> None:
    script = """
import os
import signal
from orpo_ray.ray_runtime import start_ray
signal.signal(signal.SIGTERM, signal.default_int_handler)
start_ray()
try:
    os.kill(os.getpid(), signal.SIGTERM)
    print("not answered")
except KeyboardInterrupt:
    print(f"seconds until an abort: {signal.alarm(0)}")
"""
    done = python(script)
    assert (done.stdout.strip(), done.stderr) == ("seconds until an abort: 0", "")


@pytest.mark.ray
def test_many_rows_go_to_ray_and_give_what_few_rows_give_here(
    rows: Any,
    chatml_tokenizer: Any,
    tmp_path: Path,
    ray_session: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = rows("a.jsonl", *map(pair, range(700)), {"prompt": "no answers"}, pair(3))
    config = DataConfig.model_validate(
        {"train": [{"source": str(file)}], "max_length": 100, "max_prompt_length": 50}
    )
    few = prepare(config, chatml_tokenizer, "fingerprint", tmp_path / "few", 1, print)
    monkeypatch.setattr(parallel, "_ALONE_BYTES", 0)
    many = prepare(config, chatml_tokenizer, "fingerprint", tmp_path / "many", 1, print)
    assert few.summary == many.summary
    for here, there in ((few.train, many.train), (few.eval, many.eval)):
        assert here.pair_ids == there.pair_ids
        assert all((a.chosen == b.chosen).all() for a, b in zip(here, there, strict=True))


@pytest.mark.ray
def test_a_ray_of_our_own_runs_no_process_that_nobody_asks() -> None:
    """A small Ray starts no dashboard server, no autoscaler and no log reader.

    The functions that start them are private to Ray.
    """
    script = """
import psutil
from orpo_ray.ray_runtime import start_ray
start_ray()
lines = [" ".join(process.cmdline()) for process in psutil.Process().children(recursive=True)]
names = ("gcs_server", "raylet", "dashboard.py", "monitor.py")
print([name for name in names if any(name in line.split(" --")[0] for line in lines)])
"""
    assert python(script).stdout.strip() == "['gcs_server', 'raylet']"


@pytest.mark.ray
@pytest.mark.parametrize(
    ("started", "for_itself"),
    [
        ("", True),
        ("ray.init(address='local', include_dashboard=False, log_to_driver=False)", False),
    ],
)
def test_a_ray_that_a_notebook_started_may_have_other_work(started: str, for_itself: bool) -> None:
    script = f"""
import ray
from orpo_ray.ray_runtime import has_ray_for_itself, owns_ray, start_ray
print(has_ray_for_itself())
{started}
start_ray()
print(owns_ray(), has_ray_for_itself())
"""
    assert python(script).stdout.split() == ["False", "True", str(for_itself)]


def test_few_rows_are_prepared_without_ray(rows: Any, shared_data: Path, tmp_path: Path) -> None:
    file = rows("a.jsonl", *map(pair, range(4)))
    script = preparing(file, shared_data, tmp_path)
    *_, loaded = python(script).stdout.splitlines()
    assert loaded == "False"


def test_finding_prepared_data_needs_no_ray(
    run: Prepare, rows: Any, shared_data: Path, tmp_path: Path
) -> None:
    file = rows("a.jsonl", *map(pair, range(4)))
    run(file)
    script = preparing(file, shared_data, tmp_path)
    found, *_, loaded = python(script).stdout.splitlines()
    assert found.startswith("prepared data found in")
    assert loaded == "False"


def preparing(file: Path, shared_data: Path, tmp_path: Path) -> str:
    """A script that prepares a file as `run` does, and prints whether it has loaded Ray."""
    return f"""
import sys
from pathlib import Path
from transformers import AutoTokenizer
from orpo_ray import ray_runtime
from orpo_ray.config.data import DataConfig
from orpo_ray.data.pipeline import prepare
tokenizer = AutoTokenizer.from_pretrained({str(shared_data / "tokenizers/minimind_chatml_6400")!r})
config = DataConfig(train=[{{"source": {str(file)!r}}}], max_length=8192, max_prompt_length=6000)
prepare(config, tokenizer, "fingerprint", Path({str(tmp_path / "storage")!r}), 1, print)
print("ray" in sys.modules)
"""


def python(script: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """The outcome of a script in an interpreter of its own, which can import the project."""
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), **variables}
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True
    )
