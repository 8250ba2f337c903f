"""Pages in a real browser: Debian's chromium, driven by Playwright."""

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from run_folders import (
    HOSTILE,
    LONG_WORD,
    keep_scores,
    lines_of,
    scores_of,
    write_run,
    write_search,
)

from orpo_ray.report.write import page_of, write_to
from orpo_ray.runs.console import SILENT
from orpo_ray.runs.shown import Shown, named_shown

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright (extra test)")
CHROMIUM = shutil.which("chromium")

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(CHROMIUM is None, reason="needs a browser: apt-get install chromium"),
]

PHONE = {"width": 400, "height": 800}
OPENS_WITHIN_S = 2.0
DRAWN = "html[data-drawn]"
Open = Callable[..., Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(browser: Any, tmp_path: Path) -> Iterator[Open]:
    """Opens the page of what is given. No page may complain, or ask for anything."""
    complaints: list[str] = []
    asked: list[str] = []
    own = {"data:,"}
    contexts = []

    def opens(*shown: Shown, **options: Any) -> Any:
        file = tmp_path / f"{len(contexts)}.html"
        write_to(page_of(shown, SILENT.announce), file)
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda said: complaints.append(f"{said.type}: {said.text}"))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(file.as_uri())
        page.wait_for_selector(DRAWN)
        own.add(file.as_uri())
        return page

    yield opens
    for context in contexts:
        context.close()
    assert complaints == [] and set(asked) <= own


@pytest.fixture
def run(tmp_path: Path) -> Shown:
    samples = [
        {"step": step, "id": "1", "prompt": HOSTILE, "answer": LONG_WORD + HOSTILE, "ended": True}
        for step in (0, 40)
    ]
    facts = {
        "resumed": [{"step": 20, "again": 3}],
        "versions": {LONG_WORD: LONG_WORD},
        "reasons": [LONG_WORD, HOSTILE],
    }
    run = write_run(tmp_path, lines=lines_of(40, 10), facts=facts, samples=samples)
    for step, correct in ((0, 32), (10, 36), (20, 40), (30, 44), (40, 48)):
        keep_scores(run, step, scores_of(correct))
    return run


def points_of(page: Any, title: str) -> dict[str, int]:
    """How many points each curve of a plot was drawn with."""
    found: dict[str, int] = page.evaluate(
        """title => {
            const number = plots.findIndex((plot) => plot.title === title);
            const series = charts.get(number).getOption().series;
            return Object.fromEntries(
                series.filter((each) => each.type === "line" && each.name)
                    .map((each) => [each.name, each.data.length]));
        }""",
        title,
    )
    return found


def figure(page: Any, title: str) -> Any:
    return page.locator("figure:visible", has=page.get_by_role("heading", name=title, exact=True))


def drawn(page: Any) -> int:
    """Lines that are in the picture, in every plot that can be seen."""
    return int(page.locator("figure:visible .plot svg path").count())


def test_a_single_point_can_be_seen(opened: Open, tmp_path: Path) -> None:
    page = opened(write_run(tmp_path, lines=lines_of(1, 1)))
    assert figure(page, "Gradient norm").locator("svg path[transform]").count() == 1


def test_every_point_is_drawn_and_none_too_many(opened: Open, run: Shown) -> None:
    page = opened(run)
    assert points_of(page, "Preference accuracy") == {
        "accuracy, train": 40,
        "accuracy, held out": 5,
    }
    assert set(points_of(page, "Loss and its parts").values()) == {40, 5}
    assert page.locator("figure .plot svg").count() == page.evaluate("plots.length") == 10
    assert drawn(page) > 100
    assert page.locator("svg text", has_text="resumed").count() == 10


def test_a_script_in_an_answer_does_not_run(opened: Open, run: Shown) -> None:
    page = opened(run)
    assert page.evaluate("typeof window.stolen") == "undefined"
    assert page.locator("img").count() == 0
    assert HOSTILE in page.locator(".asked").first.inner_text()


def test_hover_tells_the_values_of_a_step(opened: Open, run: Shown) -> None:
    page = opened(run)
    plot = figure(page, "Preference accuracy").locator(".plot")
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.move(box["x"] + box["width"] - 25, box["y"] + box["height"] / 2, steps=5)
    tip = plot.locator(".tip")
    tip.wait_for()
    assert "step 40" in tip.inner_text()
    assert "accuracy, held out\n0.75" in tip.inner_text()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    playwright.expect(tip).to_contain_text("accuracy, held out, at 20")


def test_a_part_of_a_run_is_shown_by_mouse_and_by_numbers(opened: Open, run: Shown) -> None:
    page = opened(run)
    plot = figure(page, "Gradient norm").locator(".plot")
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    middle, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(middle, y)
    page.mouse.down()
    page.mouse.move(middle + 100, y)
    page.mouse.up()
    first, last = (int(page.locator(f".zoom [name={end}]").input_value()) for end in ("from", "to"))
    assert 15 < first < last < 40
    assert points_of(page, "Gradient norm")["gradient norm, train"] <= last - first + 3
    assert points_of(page, "Learning rate")["learning rate, train"] <= last - first + 3
    page.get_by_role("button", name="whole run").click()
    assert points_of(page, "Gradient norm")["gradient norm, train"] == 40
    page.locator(".zoom [name=from]").fill("30")
    page.locator(".zoom [name=to]").fill("40")
    page.locator(".zoom [name=to]").blur()
    assert points_of(page, "Gradient norm")["gradient norm, train"] == 12


def test_a_curve_is_switched_off_and_on(opened: Open, run: Shown) -> None:
    page = opened(run)
    button = figure(page, "Preference accuracy").get_by_role("button", name="accuracy, train")
    button.click()
    assert points_of(page, "Preference accuracy") == {"accuracy, held out": 5}
    figure(page, "Preference accuracy").get_by_role("button", name="accuracy, train").click()
    assert len(points_of(page, "Preference accuracy")) == 2


def test_numbers_of_a_plot_are_a_table_too(opened: Open, run: Shown) -> None:
    page = opened(run)
    figure(page, "Preference accuracy").get_by_text("numbers").click()
    rows = figure(page, "Preference accuracy").locator("tbody tr")
    playwright.expect(rows).to_have_count(41)
    assert rows.last.inner_text().split() == ["40", "0.75", "0.75", "0.6318", "0.8399"]


def test_tabs_show_one_run_each(opened: Open, run: Shown, tmp_path: Path) -> None:
    other = write_run(tmp_path / "b", "other", lines=lines_of(20, 10))
    page = opened(run, other)
    tabs = page.get_by_role("tab")
    assert tabs.all_inner_texts() == ["side by side", "run", "other"]
    assert points_of(page, "Preference accuracy") == {"run": 5, "other": 3}
    assert page.locator(".panel:visible").count() == 1
    tabs.nth(2).click()
    assert tabs.nth(2).get_attribute("aria-selected") == "true"
    assert page.locator("figure:visible").count() == 10 and drawn(page) > 100
    assert page.locator("[role=tabpanel]:visible .zoom [name=to]").input_value() == "20"


def test_light_and_dark(opened: Open, run: Shown) -> None:
    def paper(page: Any) -> str:
        return str(page.evaluate("getComputedStyle(document.body).backgroundColor"))

    light, dark = (opened(run, color_scheme=scheme) for scheme in ("light", "dark"))
    assert (paper(light), paper(dark)) == ("rgb(251, 251, 249)", "rgb(20, 24, 28)")
    labels = "document.querySelector('figure svg text').getAttribute('fill')"
    assert light.evaluate(labels) != dark.evaluate(labels)
    light.get_by_role("button", name="Light or dark").click()
    assert paper(light) == paper(dark) and light.evaluate(labels) == dark.evaluate(labels)


@pytest.mark.parametrize("what", ["run", "runs", "search"])
def test_a_phone_needs_no_sideways_scrolling(
    opened: Open, run: Shown, tmp_path: Path, what: str
) -> None:
    shown: dict[str, tuple[Shown, ...]] = {
        "run": (run,),
        "runs": (run, write_run(tmp_path / "b", LONG_WORD[:80], lines=lines_of(20, 10))),
        "search": (named_shown(write_search(tmp_path / "c")[0]),),
    }
    page = opened(*shown[what], viewport=PHONE, has_touch=True, is_mobile=True)
    for number in range(max(1, page.get_by_role("tab").count())):
        if page.get_by_role("tab").count():
            page.get_by_role("tab").nth(number).click()
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
        assert page.locator("figure:visible .plot svg").count() > 0


def test_paper_has_all_tabs_in_dark_ink(opened: Open, run: Shown, tmp_path: Path) -> None:
    other = write_run(tmp_path / "b", "other", lines=lines_of(20, 10))
    page = opened(run, other, color_scheme="dark")
    page.emulate_media(media="print")
    page.wait_for_selector("html[data-theme=light]")
    assert page.evaluate("charts.size === plots.length")
    assert page.locator(".panel:visible").count() == 3
    assert not page.locator("nav").is_visible() and not page.locator("#theme").is_visible()
    page.emulate_media(media="screen")
    page.wait_for_selector("html[data-theme=dark]")


def test_a_tab_that_was_left_is_printed_in_full_size(
    opened: Open, run: Shown, tmp_path: Path
) -> None:
    page = opened(run, write_run(tmp_path / "b", "other", lines=lines_of(20, 10)))
    whole = page.locator(".plot svg").first.get_attribute("width")
    page.get_by_role("tab").nth(1).click()
    # Observers of sizes are called in a frame, after what asked for the frame.
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => setTimeout(done)))")
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    assert page.locator(".plot svg").first.get_attribute("width") == whole


def test_a_search_is_drawn_with_all_its_trials(opened: Open, tmp_path: Path) -> None:
    page = opened(named_shown(write_search(tmp_path)[0]))
    assert page.locator("figure:visible .plot svg").count() == 6
    counted = page.evaluate("charts.get(0).getOption().series[0].data.length")
    strands = page.evaluate("charts.get(1).getOption().series[0].data.length")
    assert (counted, strands) == (9, 8)


def test_ten_thousand_steps_open_within_two_seconds(opened: Open, tmp_path: Path) -> None:
    """The fastest of three loads counts: other processes of a busy machine slow single ones."""
    page = opened(write_run(tmp_path, lines=lines_of(10_000, 500)))
    assert min(seconds_to_open(page) for _ in range(3)) < OPENS_WITHIN_S
    assert points_of(page, "Gradient norm") == {"gradient norm, train": 1000}
    assert points_of(page, "Preference accuracy")["accuracy, held out"] == 21


def seconds_to_open(page: Any) -> float:
    """From the request for the page until all its plots are drawn."""
    began = time.monotonic()
    page.reload()
    page.wait_for_selector(DRAWN)
    return time.monotonic() - began
