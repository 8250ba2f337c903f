"""A comparison's record is read as it was written, and its runs are taken up where they were."""

import json
from pathlib import Path
from typing import Any

import pytest
from support import Listener, run_config

from orpo_ray.errors import ConfigError
from orpo_ray.runs.comparison import Comparison, Entry, Point, Standing, Verdict, comparison_of
from orpo_ray.runs.comparison_run import ComparisonRun, comparison_for, find_comparison
from orpo_ray.search.reading import reading
from orpo_ray.search.tournament import Tournament, entries_of
from orpo_ray.storage import Storage

VERDICT = Verdict(method="a", other="b", verdict="better", difference=0.1, low=0.02, high=0.2)


def standing(method: str, accuracy: float | None = 0.8, **figures: Any) -> Standing:
    state = "failed" if accuracy is None else "finished"
    return Standing(method=method, state=state, accuracy=accuracy, **figures)


def comparison(**changes: Any) -> Comparison:
    own: dict[str, Any] = {
        "name": "p/compare",
        "settings": {"methods": ["a", "b"]},
        "budget": {"unit": "pairs", "amount": 100.0},
        "pairs": 400,
        "train_pairs": 100,
        **changes,
    }
    return Comparison(**own)


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    run = comparison_for(run_config(tmp_path))
    assert run.comparison() is None
    methods = (standing("a", spread={"accuracy": 0.1}, runs=("x",)), standing("b", None))
    written = comparison(
        entries=[Entry(number=0, method="a", seed=0, run="x", state="finished")],
        methods=methods,
        verdicts=(VERDICT,),
        curve=(Point(pairs=10, methods=methods, verdicts=(VERDICT,)),),
        reading=("said",),
        status="finished",
    )
    run.folder.mkdir(parents=True)
    run.keep(written)
    assert run.comparison() == written
    assert find_comparison(str(run.folder.parent)) == find_comparison(str(run.folder)) == written


def test_a_comparison_whose_process_is_gone_is_interrupted(tmp_path: Path) -> None:
    run = comparison_for(run_config(tmp_path))
    run.folder.mkdir(parents=True)
    run.keep(comparison())
    assert find_comparison(str(run.folder)).status == "interrupted"


def test_no_comparison_and_a_damaged_one_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no comparison\.json here"):
        find_comparison(str(tmp_path))
    (tmp_path / "comparison.json").write_text('{"entries": 3}', encoding="utf-8")
    with pytest.raises(ConfigError, match="not as a comparison wrote it"):
        find_comparison(str(tmp_path))


def test_another_version_may_have_written_more() -> None:
    tree = json.loads(json.dumps(comparison(methods=(standing("a"),)).to_json()))
    tree["later"] = tree["methods"][0]["later"] = 1
    assert comparison_of(tree).methods == (standing("a"),)


def test_broken_answers_are_told_beside_those_of_the_base() -> None:
    lines = reading(comparison(methods=(standing("a", broken=0.22, broken_before=0.27),)))
    assert any(line.startswith("a: 22% of its greedy answers are broken (27% of") for line in lines)
    known = reading(comparison(methods=(standing("a", broken=0.22),)))
    assert any(line.startswith("a: 22% of its greedy answers are broken, what") for line in known)


def test_a_judge_is_named_where_it_gave_wins() -> None:
    judge = {"judge": {"endpoint": "http://x/v1", "model": "m", "key_file": None}}
    line = "Wins against the base are verdicts of m."
    won = comparison(methods=(standing("a", win_rate=0.5),), settings=judge)
    assert line in reading(won)
    for other in (comparison(methods=won.methods), comparison(methods=(standing("a"),))):
        assert line not in reading(other)


# --- changed settings -----------------------------------------------------------------------------


def begun(tmp_path: Path, compare: dict[str, Any] | None) -> None:
    """Leave what a comparison leaves that has begun."""
    run = compared_with(tmp_path, compare)
    run.folder.mkdir(parents=True)
    run.write_config()
    run.keep(comparison())


def compared_with(tmp_path: Path, compare: dict[str, Any] | None) -> ComparisonRun:
    return comparison_for(run_config(tmp_path, **({"compare": compare} if compare else {})))


def test_a_new_method_may_bring_settings_and_one_that_goes_takes_its_own(tmp_path: Path) -> None:
    own = {"methods": ["orpo", "sft>dpo"], "settings": {"dpo": {"objective": {"beta": 0.2}}}}
    begun(tmp_path, own)
    more = {
        "methods": ["orpo", "sft>apo"],
        "settings": {**own["settings"], "apo": {"objective": {"kind": "dpo"}}},
    }
    compared_with(tmp_path, more).refuse_changes()
    compared_with(tmp_path, {"methods": ["orpo"]}).refuse_changes()
    other = {**own, "settings": {**own["settings"], "dpo": {"objective": {"beta": 0.3}}}}
    with pytest.raises(ConfigError, match=r"compare\.settings\.dpo\.objective\.beta: 0\.3 here"):
        compared_with(tmp_path, other).refuse_changes()
    with pytest.raises(ConfigError, match=r"compare\.settings\.orpo\.objective"):
        changed = {"orpo": {"objective": {"lambda": 2.0}}}
        compared_with(
            tmp_path, {**own, "settings": {**own["settings"], **changed}}
        ).refuse_changes()


def test_a_section_may_be_added_that_says_what_was_the_default(tmp_path: Path) -> None:
    begun(tmp_path, None)
    compared_with(tmp_path, {"seeds": 5}).refuse_changes()
    with pytest.raises(ConfigError, match=r"compare\.search: 2 here"):
        compared_with(tmp_path, {"search": 2}).refuse_changes()


# --- the course -----------------------------------------------------------------------------------

RUNS = {(method, seed): f"{method}-{seed}" for method in "ab" for seed in range(2)}


def test_runs_go_seed_by_seed_and_those_on_record_stay() -> None:
    known = [
        Entry(number=0, method="b", seed=1, run="b-1", state="finished", steps=9),
        Entry(number=1, method="a", seed=0, run="a-0", state="failed", error="x"),
        Entry(number=2, method="a", seed=1, run="a-1", state="failed", error="y", may_pass=True),
        Entry(number=3, method="gone", seed=0, run="g", state="finished"),
    ]
    found = entries_of(known, ["a", "b"], 2, RUNS)
    assert [(each.number, each.run, each.state) for each in found] == [
        (0, "a-0", "failed"),
        (1, "b-0", "running"),
        (2, "a-1", "running"),
        (3, "b-1", "finished"),
    ]
    assert found[2].error is None and found[3].steps == 9


def test_each_run_is_given_once_and_its_end_is_kept(tmp_path: Path) -> None:
    run, console = comparison_for(run_config(tmp_path)), Listener()
    run.folder.mkdir(parents=True)
    record = comparison(entries=entries_of([], ["a", "b"], 1, RUNS))
    configs = {name: run_config(tmp_path) for name in RUNS.values()}
    course = Tournament(run, record, configs, console)
    first, second = course.next(), course.next()
    assert first is not None and second is not None and course.next() is None and course.is_over
    assert not course.evaluated(first[0], 5, 10, {"eval/accuracy": 0.5})
    course.failed(first[0], "no memory", may_pass=True)
    course.finished(second[0])
    kept = run.comparison()
    assert kept is not None
    assert [(each.state, each.error, each.steps) for each in kept.entries] == [
        ("failed", "no memory", 5),
        ("finished", None, 0),
    ]
    assert console.said == [
        "a, seed 0: step 5 of 10, accuracy 0.500",
        "a, seed 0: failed: no memory [1 of 2 runs]",
        "b, seed 0: finished [2 of 2 runs]",
    ]
    again = Tournament(run, kept, configs, console)
    assert again.is_over


# --- words ----------------------------------------------------------------------------------------


def noise(method: str, other: str) -> Verdict:
    return Verdict(
        method=method, other=other, verdict="within noise", difference=0.0, low=-0.1, high=0.1
    )


def test_a_leader_is_named_with_those_that_it_does_not_beat() -> None:
    methods = (standing("a", 0.9), standing("b", 0.8), standing("c", 0.89))
    said = reading(comparison(methods=methods, verdicts=(VERDICT, noise("c", "a"))))
    assert said == [
        "a prefers the chosen answer most often, for 90.0% of 400 held-out pairs; within the noise "
        "of it: c."
    ]
    all_noise = comparison(methods=methods[:2], verdicts=(noise("a", "b"),))
    assert reading(all_noise)[0].endswith("but no method differs from it by more than noise.")
    assert "more than any other" in reading(comparison(methods=methods[:2], verdicts=(VERDICT,)))[0]


def test_accuracy_does_not_hide_what_is_broken_or_lost() -> None:
    worst = standing("a", 1.0, broken=0.5, chosen_log_prob=-3.0, chosen_before=-1.0)
    said = reading(comparison(methods=(worst, standing("b", None, error="no memory"))))
    assert "a: 50% of its greedy answers are broken" in said[0]
    assert "less likely than the base has them, -3.00 after -1.00" in said[1]
    assert said[2] == "b failed: no memory"


def test_a_seed_that_failed_is_told_beside_the_figures_of_the_others() -> None:
    entries = entries_of([], ["a", "b"], 3, {(m, s): "" for m in "ab" for s in range(3)})
    for entry in entries:
        entry.state = "finished"
    entries[2].state, entries[2].error = "failed", "no memory"
    methods = (standing("a", error="no memory", seeds=2), standing("b", seeds=3))
    said = reading(comparison(methods=methods, entries=entries, verdicts=(VERDICT,)))
    assert said[1:] == ["a: 1 of 3 runs failed: no memory"]


def test_a_budget_in_seconds_that_the_clock_did_not_keep_is_told() -> None:
    methods = (standing("a", budget_used=130.0), standing("b", budget_used=95.0))
    found = comparison(methods=methods, budget={"unit": "seconds", "amount": 100.0})
    (said,) = [line for line in reading(found) if "clock" in line]
    assert said.startswith("a: the clock showed 130.0 of 100.0 seconds")


def test_the_words_of_a_curve_follow_those_of_the_comparison() -> None:
    methods = (standing("a", 0.9), standing("b", 0.8))
    points = (
        Point(pairs=10, methods=methods, verdicts=(noise("a", "b"),)),
        Point(pairs=1000, methods=methods, verdicts=(VERDICT,)),
        Point(pairs=2000, methods=methods[:1], verdicts=()),
    )
    assert reading(comparison(curve=points)) == [
        "With 10 pairs a leads (90.0%), no better than noise.",
        "With 1,000 pairs a leads (90.0%), better than b.",
    ]


def test_few_pairs_are_told() -> None:
    assert "8 held-out pairs show no difference" in reading(comparison(pairs=8))[-1]


# --- another server -------------------------------------------------------------------------------


class Bucket(Storage):
    """A storage elsewhere that remembers what was fetched from it."""

    is_remote = True

    def __init__(self) -> None:
        self.fetched: list[str] = []

    def fetch(self, path: Path) -> bool:
        """Remember the file."""
        self.fetched.append(path.name)
        return False

    def fetch_folders(self, *args: Any, **options: Any) -> None:
        """Have none."""

    def holds(self, path: Path) -> bool:
        """Hold nothing."""
        return False


def test_its_record_is_fetched_before_it_is_taken_up(tmp_path: Path) -> None:
    run, bucket = comparison_for(run_config(tmp_path)), Bucket()
    run.storage = bucket
    run.refresh()
    assert {"comparison.json", "config.json"} <= set(bucket.fetched)
