"""The page of a run, a search or a comparison: what it says, and that no text in it does harm."""

import base64
import hashlib
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from run_folders import (
    HELD_OUT,
    HOSTILE,
    LONG_WORD,
    fill,
    keep_scores,
    lines_of,
    scores_of,
    write_run,
    write_search,
)
from support import settings

from orpo_ray.config import RunConfig, build, stage_configs
from orpo_ray.errors import ConfigError
from orpo_ray.report import write
from orpo_ray.report.alarms import Signs, alarms
from orpo_ray.report.answers import broken_share, is_broken, over_steps
from orpo_ray.report.comparison_page import page_of_comparison
from orpo_ray.report.content import read_run
from orpo_ray.report.curves import wilson
from orpo_ray.report.html import html
from orpo_ray.report.importance import importances
from orpo_ray.report.page import (
    Figures,
    LinePlot,
    Page,
    ParallelPlot,
    Remarks,
    plots_of,
)
from orpo_ray.report.pictures import write_pictures
from orpo_ray.report.run_page import page_of_run
from orpo_ray.report.search_page import page_of_search
from orpo_ray.report.thin import MOST, means, spaced, thinned
from orpo_ray.report.told import planned
from orpo_ray.report.words import number
from orpo_ray.report.write import page_of, try_to_report, write_report
from orpo_ray.runs.changes import EXTENSIONS
from orpo_ray.runs.console import SILENT
from orpo_ray.runs.files import COMPARISON_FILE, PLAN, REPORT_FILE, RESUMED
from orpo_ray.runs.results import TrainResult
from orpo_ray.runs.run import Run
from orpo_ray.runs.scores import changes
from orpo_ray.runs.shown import ComparisonFolder, named_shown

QUIET = SILENT.announce


class Parts(HTMLParser):
    """The elements of a page, its scripts and its visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._in: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self._in.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        if self._in and self._in[-1] == tag:
            self._in.pop()

    def handle_data(self, data: str) -> None:
        if self._in == ["script"]:
            self.scripts[-1] += data
        elif not self._in:
            self.text += data

    @property
    def plots(self) -> list[dict[str, Any]]:
        """The plots, as the page's script reads them."""
        found: list[dict[str, Any]] = json.loads(self.scripts[0])
        return found


def plot_named(page: Page, title: str) -> LinePlot:
    (found,) = [plot for _, plot in plots_of(page) if plot.title == title]
    assert isinstance(found, LinePlot)
    return found


# --- curves ---------------------------------------------------------------------------------------


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=600), st.integers(10, 60))
def test_a_thinned_curve_keeps_its_ends_its_peak_and_its_dip(ys: list[float], most: int) -> None:
    points = list(enumerate(ys))
    found = thinned(points, most)
    assert len(found) <= max(most, 1) or len(points) <= most
    assert found[0] == points[0] and found[-1] == points[-1]
    assert {max(ys), min(ys)} <= {y for _, y in found}
    assert list(found) == sorted(found) and set(found) <= set(points)


def test_a_short_curve_stays_whole_and_a_long_one_shows_its_course() -> None:
    points = [(float(x), float(x % 7)) for x in range(MOST)]
    assert thinned(points) == tuple(points)
    long = [(float(x), float(x % 2)) for x in range(1000)]
    assert means(long, 10) == tuple((99.5 / 2 - 0.25 + 100 * k, 0.5) for k in range(10))
    assert means(points[:300]) == ()


def test_wilsons_interval_is_that_of_the_formula() -> None:
    assert wilson(0.8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(1.0, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert wilson(0.0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)


@pytest.mark.parametrize("truth", [0.5, 0.7, 0.95])
@pytest.mark.parametrize("count", [20, 200])
def test_wilsons_interval_holds_the_truth_in_19_of_20_draws(truth: float, count: int) -> None:
    drawn = np.random.default_rng(3).binomial(count, truth, size=4000) / count
    held = [low <= truth <= high for low, high in (wilson(share, count) for share in drawn)]
    assert 0.92 <= np.mean(held) <= 0.98


def test_train_and_held_out_are_in_one_plot_with_an_interval(tmp_path: Path) -> None:
    run = write_run(tmp_path, lines=lines_of(20, 10))
    for step, correct in ((0, 32), (10, 40), (20, 48)):
        keep_scores(run, step, scores_of(correct))
    page = page_of_run(read_run(run, QUIET))
    train, held = plot_named(page, "Preference accuracy").curves
    assert (len(train.points), len(held.points), held.held_out) == (20, 3, True)
    assert held.band[2] == wilson(0.75, HELD_OUT)
    margin = plot_named(page, "Log-prob margin").curves[1]
    assert all(
        low < y < high for (_, y), (low, high) in zip(margin.points, margin.band, strict=True)
    )


def test_marks_say_where_a_run_was_resumed_and_extended(tmp_path: Path) -> None:
    facts = {RESUMED: [{"step": 10, "again": 3}], EXTENSIONS: [{"step": 15}]}
    page = page_of_run(read_run(write_run(tmp_path, lines=lines_of(20, 10), facts=facts), QUIET))
    marks = [(mark.x, mark.text) for mark in plot_named(page, "Gradient norm").marks]
    assert marks == [(10, "resumed"), (15, "extended")]
    assert "Resumed at step 10, 3 steps were computed again." in Parts(html(page)).text


def test_a_number_that_is_not_finite_is_no_point(tmp_path: Path) -> None:
    lines = [*lines_of(4, 2), {"step": 5, "train/grad_norm": math.inf, "train/loss": math.nan}]
    page = page_of_run(read_run(write_run(tmp_path, lines=lines), QUIET))
    for title in ("Gradient norm", "Loss and its parts"):
        assert [x for x, _ in plot_named(page, title).curves[0].points] == [1, 2, 3, 4]


def test_many_long_runs_share_the_points_of_a_page(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / str(n), f"run-{n}", lines=lines_of(2000, 500)) for n in range(8)]
    page = page_of(runs, QUIET)
    curves = [curve for _, plot in plots_of(page) for curve in getattr(plot, "curves", ())]
    assert max(len(curve.points) for curve in curves if not curve.held_out) == 186
    assert "show 186 of 2,000 points" in Parts(html(page)).text


def test_a_long_run_is_thinned_and_says_so(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path, lines=lines_of(10_000, 100)), QUIET)
    page = page_of_run(run)
    loss = plot_named(page, "Loss and its parts").curves[0]
    assert (len(loss.points), loss.whole) == (1000, 10_000)
    assert len(plot_named(page, "Preference accuracy").curves[1].points) == 101
    text = html(page)
    assert "1,000 of 10,000 points" in Parts(text).text
    assert len(text.encode()) < 1_500_000


def test_many_evaluations_and_answers_are_thinned_and_their_intervals_stay(
    tmp_path: Path,
) -> None:
    written = write_run(tmp_path, lines=lines_of(3000, 1))
    keep_scores(written, 0, scores_of(32))
    run = read_run(written, QUIET)
    samples = [
        {"step": step, "id": "a", "prompt": "Why?", "answer": f"So {step}.", "ended": True}
        for step in range(100)
    ]
    page = page_of_run(replace(run, samples=tuple(samples)))
    held_out = plot_named(page, "Preference accuracy").curves[1]
    assert len(held_out.points) == len(held_out.band) == 1000 and held_out.whole > 3000
    assert held_out.points[-1][0] == 3000
    parts = Parts(html(page))
    assert "evaluations are left out here" in parts.text
    assert "12 of 100 evaluations are shown; samples.jsonl has all." in parts.text
    assert "So 0." in parts.text and "So 99." in parts.text and "So 1." not in parts.text


@pytest.mark.parametrize("most", [2, 3, 7, 50])
def test_spaced_items_keep_their_ends_and_their_order(most: int) -> None:
    for count in (1, 2, most, most + 1, 200):
        found = spaced(range(count), most)
        assert len(found) == min(count, most) == len(set(found))
        assert (found[0], found[-1]) == (0, count - 1) and sorted(found) == list(found)


def test_a_run_that_ended_early_says_why(tmp_path: Path) -> None:
    facts = {"ended_by": f"the loss is not finite {HOSTILE}"}
    run = write_run(tmp_path, lines=lines_of(20, 10), facts=facts)
    first = page_of_run(read_run(run, QUIET)).tabs[0].sections[0].blocks[1]
    assert isinstance(first, Remarks)
    assert first.remarks[0].text == f"It ended before its last step: {facts['ended_by']}"
    assert first.remarks[0].level == "alarm"


def of_adapter(page: Page) -> dict[str, tuple[str, str]]:
    """The held-out numbers at the top of a page, with what is said of each."""
    found = page.tabs[0].sections[0].blocks[0]
    assert isinstance(found, Figures)
    return {each.name: (each.value, each.note) for each in found.figures}


def test_the_numbers_at_the_top_are_those_of_the_adapter(tmp_path: Path) -> None:
    run = write_run(tmp_path, lines=lines_of(20, 10))
    assert of_adapter(page_of_run(read_run(run, QUIET)))["held-out accuracy"] == (
        "0.750",
        "0.500 before",
    )
    result = TrainResult.from_json(
        {
            **{"name": "run", "adapter": "adapter", "steps": 20, "adapter_step": 10},
            **{"strategy": "single-process", "workers": [1], "versions": {}},
            **{"pairs_per_second": 1.0, "metrics": {"eval/accuracy": 0.625, "eval/nll": 0.9}},
        }
    )
    found = of_adapter(page_of_run(replace(read_run(run, QUIET), result=result)))
    assert found["held-out accuracy"][0] == "0.625" and found["held-out NLL"][0] == "0.900"


def test_a_run_in_stages_is_compared_with_its_start_and_warns_of_its_end(tmp_path: Path) -> None:
    kinds = [{"objective": {"kind": kind}} for kind in ("sft", "dpo")]
    config = build(RunConfig, {**settings(tmp_path, "run"), "stages": kinds}, {(): "tests"})
    first, last = (Run(stage, is_stage=True) for stage in stage_configs(config))
    fill(first, lines=lines_of(10, 10))
    begun = read_run(Run(config), QUIET)
    assert begun.state == "not finished" and "in 1 of 2 stages" in html(page_of_run(begun))
    cut = {"step": 10, "prompt": "p", "answer": "and on", "ended": False}
    fill(last, lines=lines_of(10, 10)[1:], samples=[cut])
    page = page_of_run(read_run(Run(config), QUIET))
    assert of_adapter(page)["held-out accuracy"] == ("0.750", "0.500 before")
    told_of = page.tabs[0].sections[0].blocks[1]
    assert isinstance(told_of, Remarks) and told_of.remarks[0].level == "alarm"
    assert told_of.remarks[0].text.startswith("100 % of the sample answers do not end")


def test_planned_time_is_not_measured_against_the_time_of_steps(tmp_path: Path) -> None:
    ends = [1.0, 2.0, 3.0]
    plan = {
        "predicted": {"seconds": ends, "pairs_per_second": ends, "peak_bytes": ends},
        "measured": {"seconds": 1.0, "pairs_per_second": 3.0, "peak_bytes": 1.0},
    }
    found = planned(read_run(write_run(tmp_path, facts={PLAN: plan}), QUIET))
    assert found is not None
    assert [row[-1] for row in found.rows] == ["", "+50 %", "-50 %"]


# --- alarms ---------------------------------------------------------------------------------------


def signs(before: int, after: int, **other: Any) -> Signs:
    chosen = other.pop("chosen", -8.0)
    found = changes(scores_of(before), scores_of(after, chosen=chosen))
    return Signs(changes=found, pairs=HELD_OUT, steps=40, **other)


def told(found: Signs) -> list[tuple[str, str]]:
    return [(remark.level, remark.text) for remark in alarms(found)]


def test_a_run_that_learns_raises_no_alarm() -> None:
    ((level, text),) = told(signs(32, 60, preference_shares=(0.3,), more_preference="raise x"))
    assert level == "good" and text.startswith("The model prefers the chosen answers more often")


def test_a_run_that_stands_still_is_told_what_is_too_small() -> None:
    (level, text), *_ = told(signs(32, 32, more_preference="raise objective.lambda"))
    assert (level, text[:16]) == ("alarm", "Flat: after 40 s")
    assert text.endswith("objective.lambda or training.learning_rate is too small.")
    assert not [text for _, text in told(signs(32, 60)) if text.startswith("Flat")]


@pytest.mark.parametrize(
    ("advice", "says"),
    [
        ("", ". training.learning_rate is too small."),
        ("lower objective.alpha", ". objective.alpha is too large, or training.learning_rate"),
    ],
)
def test_a_run_that_stands_still_is_told_of_no_weight_that_it_lacks(advice: str, says: str) -> None:
    (_, text), *_ = told(signs(32, 32, more_preference=advice))
    assert says in text


def test_a_loss_without_a_preference_term_may_stand_still() -> None:
    assert not [text for _, text in told(signs(32, 32, is_to_prefer=False)) if "Flat" in text]


def test_a_base_that_prefers_the_chosen_answers_already_is_no_alarm() -> None:
    levels = {text.partition("(")[0]: level for level, text in told(signs(64, 64))}
    assert levels["The model preferred the chosen answers before training "] == "note"


def test_chosen_answers_that_fall_are_an_alarm() -> None:
    levels = {text[:34]: level for level, text in told(signs(32, 60, chosen=-12.0))}
    assert levels["The chosen answers became less lik"] == "alarm"


def test_a_preference_term_that_hardly_counts_is_an_alarm() -> None:
    found = signs(32, 60, preference_shares=(0.01, 0.02), more_preference="raise objective.lambda")
    assert any(
        level == "alarm" and "1.5 % of the loss" in text and "raise objective.lambda" in text
        for level, text in told(found)
    )


def test_perfect_accuracy_with_broken_answers_is_an_alarm() -> None:
    (level, text), *_ = told(signs(32, 64, broken=0.5, accuracy=1.0))
    assert level == "alarm" and "50 % of the sample answers do not end" in text
    assert "lower the learning rate" in text
    assert not [text for _, text in told(signs(32, 64, broken=0.0, accuracy=1.0)) if "end" in text]


@pytest.mark.parametrize(
    ("answer", "ended", "broken"),
    [
        ("It is Paris.", True, False),
        ("It is Paris.", None, False),
        ("It is Paris, and", False, True),
        ("  ", True, True),
        ("You are great! You are great! You are great! You are great!", True, True),
        ("ha ha ha", True, False),
    ],
)
def test_broken_answers_are_told_apart(answer: str, ended: bool | None, broken: bool) -> None:
    row = {"answer": answer} if ended is None else {"answer": answer, "ended": ended}
    assert is_broken(row) is broken


def test_an_answer_that_is_cut_before_it_is_as_long_as_the_chosen_one_may_have_ended() -> None:
    row = {"step": 0, "prompt": "p", "answer": "It is Paris, which", "ended": False}
    assert not is_broken({**row, "chosen": "It is Paris, which lies on the Seine."})
    assert is_broken({**row, "chosen": "It is Paris."})
    (asked,) = over_steps([{**row, "chosen": "It is Paris, which lies on the Seine."}])
    assert asked.answers[0].note == "cut"


def test_only_the_last_answers_count_and_a_resumed_run_has_each_once() -> None:
    rows = [
        {"step": step, "id": "a", "prompt": "p", "answer": text, "chosen": "c", "ended": ended}
        for step, text, ended in ((0, "x", False), (5, "y", False), (5, "z", True))
    ]
    assert broken_share(rows[:1]) == 1.0 and broken_share(rows[2:]) == 0.0
    assert broken_share([]) is None
    (asked,) = over_steps(rows)
    said = [(each.who, each.text) for each in asked.answers]
    assert said == [("before training", "x"), ("step 5", "z"), ("chosen in the data", "c")]


# --- harmless -------------------------------------------------------------------------------------


def hostile_page(folder: Path) -> str:
    samples = [
        {
            "step": step,
            "id": "1",
            "prompt": HOSTILE,
            "answer": HOSTILE + LONG_WORD,
            "chosen": HOSTILE,
        }
        for step in (0, 10)
    ]
    facts = {
        "reasons": [HOSTILE],
        "versions": {HOSTILE: HOSTILE},
        "pairs": {
            **{"hash": "a" * 64, "read": 9, "train": 6, "eval": 2, "dropped": [[HOSTILE, 1]]},
            "sources": [{"name": HOSTILE, "used_for": "train", "read": 9, "kept": 8}],
            "lengths": {"edges": [0, 5, 10], "sides": {"prompt": [4, 2], HOSTILE: [1, 5]}},
        },
    }
    run = read_run(write_run(folder, lines=lines_of(20, 10), facts=facts, samples=samples), QUIET)
    return html(page_of_run(replace(run, name=HOSTILE)))


def test_no_text_of_data_or_models_becomes_markup(tmp_path: Path) -> None:
    text = hostile_page(tmp_path)
    parts = Parts(text)
    kinds = [attributes.get("type") for tag, attributes in parts.tags if tag == "script"]
    assert kinds == ["application/json", None, None]
    assert not [tag for tag, _ in parts.tags if tag == "img"]
    assert parts.text.count(HOSTILE) >= 10 and "49" not in parts.text.partition("{{ 7 * 7")[0][-5:]
    assert parts.plots[-1]["curves"][1]["name"] == HOSTILE
    assert "\u2028" not in parts.scripts[0] and "<" not in parts.scripts[0]


def test_the_page_asks_the_network_for_nothing_and_runs_only_its_own_scripts(
    tmp_path: Path,
) -> None:
    parts = Parts(hostile_page(tmp_path))
    places = [
        (tag, value)
        for tag, attributes in parts.tags
        for name, value in attributes.items()
        if name in ("src", "href", "srcset", "action", "data") or name.startswith("on")
    ]
    assert places == [("link", "data:,")]
    (policy,) = [each["content"] for _, each in parts.tags if each.get("http-equiv")]
    assert policy is not None and policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy and "http" not in policy
    for script in parts.scripts[1:]:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy


def test_the_library_carries_its_licences() -> None:
    folder = Path(write.__file__).parent / "echarts"
    for name, says in (("LICENSE", "Apache License"), ("NOTICE", "Apache ECharts")):
        assert says in (folder / name).read_text(encoding="utf-8")
    assert "BSD 3-Clause" in (folder / "LICENSE-zrender").read_text(encoding="utf-8")
    version = re.search(r"ECharts (\S+)", (folder / "echarts.min.js").read_text(encoding="utf-8"))
    assert version is not None
    assert f'"echarts": "{version[1]}"' in (folder / "package.json").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (0.0, "0"),
        (128.0, "128"),
        (12345.678, "12,346"),
        (0.123456, "0.1235"),
        (0.00012345, "0.0001234"),
        (2e-5, "2.000e-05"),
        (float("nan"), ""),
        (None, ""),
    ],
)
def test_numbers_have_few_digits(value: float | None, says: str) -> None:
    assert number(value) == says


# --- searches, comparisons ------------------------------------------------------------------------


def test_a_search_says_what_it_cost_and_who_was_given_up(tmp_path: Path) -> None:
    folder, search = write_search(tmp_path)
    shown = named_shown(folder)
    page = page_of([shown], QUIET)
    parts = Parts(html(page))
    plane, parallel, importance, front, *course = parts.plots
    assert [dot["look"] for dot in plane["dots"]].count("best") == 1
    assert len(plane["dots"]) == 9 and plane["x"]["log"] and plane["y"]["log"]
    assert [axis["name"] for axis in parallel["axes"]][:2] == ["lambda", "learning rate"]
    assert importance["rows"][0]["name"] == "learning rate"
    assert front["path"] == [[0.5, 0.9]]
    assert [mark["text"] for mark in course[0]["marks"]] == ["rung 1", "rung 2"]
    trained = sum(trial.steps for trial in search.trials)
    assert f"{trained} of 180 steps were trained" in parts.text
    assert parts.text.count("given up at step 10") == 4
    assert HOSTILE in parts.text and len([1 for tag, _ in parts.tags if tag == "script"]) == 3


def test_a_given_value_outside_of_its_range_has_a_place_or_none(tmp_path: Path) -> None:
    search = write_search(tmp_path)[1]
    optimizers = {"choice": ["adamw", "lion"]}
    space = {"objective.lambda": {"loguniform": [0.1, 2.0]}, "training.optimizer": optimizers}
    search.settings["space"] = space
    for trial in search.trials:
        given = trial.number == 0
        lambda_, optimizer = (0.0, "ademamix") if given else (0.5, "lion")
        trial.values = {"objective.lambda": lambda_, "training.optimizer": optimizer}
    page = page_of_search(search, "place")
    (all_trials,) = [plot for _, plot in plots_of(page) if isinstance(plot, ParallelPlot)]
    assert all_trials.strands[0].values[:2] == (None, "ademamix"), "there is no zero on a log scale"
    assert html(page) and len(write_pictures(page, tmp_path)) > 1


def test_the_setting_that_decides_is_the_important_one(tmp_path: Path) -> None:
    _, search = write_search(tmp_path)
    from orpo_ray.report.search_page import _domains

    trials = [(trial.values, 0.1 * trial.number) for trial in search.trials]
    found = importances(_domains(search), trials)
    assert next(iter(found)) == "training.learning_rate"
    assert sum(found.values()) == pytest.approx(1)
    assert importances(_domains(search), trials[:7]) == {}
    assert importances(_domains(search), [(values, 1.0) for values, _ in trials]) == {}


COMPARISON: dict[str, Any] = {
    "name": "p/c",
    "status": "finished",
    "budget": {"unit": "pairs", "amount": 1000},
    "methods": [
        {
            **{"method": "orpo", "state": "finished", "accuracy": 0.8, "low": 0.7, "high": 0.9},
            **{"margin": 0.5, "margin_low": 0.4, "margin_high": 0.6, "device_hours": 0.2},
            **{"seconds": 700.0, "seeds": 2, "spread": {"accuracy": 0.01}, "broken": 0.25},
            "runs": ["p/c/orpo/seed-0", "p/c/orpo/seed-1"],
        },
        {"method": "sft>dpo", "state": "failed", "error": HOSTILE, "accuracy": None, "runs": None},
        {"method": "dpo"},
    ],
    "verdicts": [
        {"method": "orpo", "other": "dpo", "verdict": "better", "difference": 0.1},
        {"method": "dpo", "other": "sft>dpo", "verdict": "within noise"},
    ],
    "reading": ["orpo leads.", "orpo: 25% of its greedy answers are broken.", f"dpo: {HOSTILE}"],
    "curve": [
        {"pairs": 250, "methods": [{"method": "orpo", "accuracy": 0.6, "low": 0.5, "high": 0.7}]},
        {"pairs": 1000, "methods": [{"method": "orpo", "accuracy": 0.8}]},
    ],
}


def test_a_comparison_shows_what_is_there_and_lacks_what_is_not(tmp_path: Path) -> None:
    folder = tmp_path / "moved"
    write_run(folder / "orpo", "seed-0", lines=lines_of(20, 10))
    (folder / COMPARISON_FILE).write_text(json.dumps(COMPARISON), encoding="utf-8")
    shown = named_shown(folder)
    assert isinstance(shown, ComparisonFolder)
    parts = Parts(html(page_of([shown], QUIET)))
    titles = [plot["title"] for plot in parts.plots]
    assert titles[:3] == ["Held-out accuracy", "Unscaled margin", "Cost and accuracy"]
    assert titles[-1] == "Held-out accuracy by number of pairs"
    assert "orpo leads." in parts.text and f"dpo: {HOSTILE}" in parts.text
    assert "Held-out NLL" in titles, "the curves of the first seed"
    assert f"sft>dpo failed: {HOSTILE}" in parts.text
    assert "orpo: 25% of its greedy answers are broken" in parts.text


@pytest.mark.parametrize("name", [name for name in COMPARISON if name != "name"])
@pytest.mark.parametrize("null", [True, False])
def test_any_part_of_a_comparison_may_be_missing(name: str, null: bool) -> None:
    record = {key: value for key, value in COMPARISON.items() if key != name}
    page = page_of_comparison(record | ({name: None} if null else {}), "place", {})
    assert page.title == "p/c" and html(page)


def test_the_cost_of_a_comparison_is_that_of_all_its_seeds() -> None:
    found = page_of_comparison(COMPARISON, "place", {}).tabs[0].sections[0].blocks[0]
    assert isinstance(found, Figures)
    assert found.figures[-1].value == "0.400", "two seeds of 0.2 device-hours each"


def test_a_comparison_over_numbers_of_pairs_has_no_empty_table() -> None:
    page = page_of_comparison({**COMPARISON, "methods": []}, "place", {})
    assert page.subtitle == "1 method at 2 numbers of pairs, 1,000 pairs for each"
    assert "Numbers" not in [section.title for section in page.tabs[0].sections]


def test_a_method_may_lack_any_number() -> None:
    methods = COMPARISON["methods"]
    for name in methods[0]:
        if name != "method":
            record = {**COMPARISON, "methods": [{**methods[0], name: None}]}
            assert html(page_of_comparison(record, "place", {}))


# --- written --------------------------------------------------------------------------------------


def test_a_page_lies_in_the_runs_folder(tmp_path: Path) -> None:
    run = write_run(tmp_path, lines=lines_of(20, 10))
    assert write_report(run, QUIET) == str(run.path(REPORT_FILE))
    assert Parts(run.path(REPORT_FILE).read_text(encoding="utf-8")).plots


def test_a_run_that_has_only_begun_has_a_page(tmp_path: Path) -> None:
    parts = Parts(html(page_of([write_run(tmp_path)], QUIET)))
    assert parts.plots == [] and "not finished" in parts.text


def test_half_a_character_is_replaced(tmp_path: Path) -> None:
    samples = [{"step": 0, "prompt": "half \ud83d", "answer": "of it"}]
    run = write_run(tmp_path, lines=lines_of(2, 1), samples=samples)
    write_report(run, QUIET)
    assert "half ?" in run.path(REPORT_FILE).read_text(encoding="utf-8")


def test_a_line_whose_step_is_no_number_is_left_out(tmp_path: Path) -> None:
    odd = {"step": "last", "prompt": "p", "answer": "a", "train/loss": 1.0}
    run = write_run(tmp_path, lines=[*lines_of(2, 1), odd], samples=[odd])
    found = read_run(run, QUIET)
    assert found.steps == 2 and found.samples == ()


def test_a_line_that_a_kill_has_cut_is_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path, lines=lines_of(20, 10), samples=[{"step": 0, "prompt": "p"}])
    with run.path("metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 21, "train/lo')
    read = read_run(run, QUIET)
    assert (read.steps, read.samples) == (20, ())


def test_several_runs_stand_side_by_side(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, lines=lines_of(20, 10)) for name in "ab"]
    page = page_of(runs, QUIET)
    assert [tab.name for tab in page.tabs] == ["side by side", *(run.place for run in runs)]
    curves = plots_of(page)[0][1]
    assert isinstance(curves, LinePlot) and len(curves.curves) == 2
    folder, _ = write_search(tmp_path / "c")
    with pytest.raises(ConfigError, match="it is no run, and only runs go side by side"):
        page_of([runs[0], named_shown(folder)], QUIET)


def test_a_page_that_fails_is_announced_and_fails_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(page: Page) -> str:
        raise ZeroDivisionError("a fault of ours")

    monkeypatch.setattr(write, "html", fails)
    said: list[str] = []
    run = write_run(tmp_path, lines=lines_of(20, 10))
    assert try_to_report(run, said.append) is None
    assert said == [
        "report.html could not be written: ZeroDivisionError: a fault of ours; the run itself is "
        "whole"
    ]
    assert not run.path(REPORT_FILE).exists()
