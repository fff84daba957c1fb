"""The report in a browser: what a reader with a screen, a phone, a dark room or a printer gets."""

from __future__ import annotations

import io
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from eat_dist.report import write_report
from evaluation_folders import complete_run, evaluation, write_run
from report_browser import CHROMIUM, CONTRAST, opened, watched

pytest.importorskip("playwright", reason="playwright is not installed")
from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on the PATH")
SECTIONS = ["verdict", "figures", "curves", "strength", "transfer", "ers", "map", "images", "training", "detector"]
SECTIONS += ["sanity", "origin"]
LONG = "natural-with-a-name-that-is-longer-than-a-phone-is-wide-0"


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two complete runs and one without pictures and training side by side, that one with a failed check."""
    folder = tmp_path_factory.mktemp("report")

    def one_curve(strength: float) -> dict[str, Any]:
        points = evaluation(strength=strength)["curves"]
        return {"strength": strength, "curves": [point for point in points if point["objective"] == "displacement"]}

    failed = evaluation(defense="pgd_at", failing=("gradients",), **one_curve(0.3))
    runs = [
        complete_run(folder / "eat-0", **one_curve(0.45)),
        complete_run(folder / LONG, defense="natural", **one_curve(0.04)),
        write_run(folder / "pgd_at-0", summary=failed),
    ]
    return Path(write_report(runs, str(folder / "report.html")).page)


def screenshot(page: Page, selector: str = "body") -> np.ndarray[Any, Any]:
    content = page.locator(selector).first.screenshot()
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(image.convert("RGB"))


def test_it_opens_quietly_and_asks_for_nothing_else(browser: Browser, page_file: Path) -> None:
    _, requests, complaints = watched(browser, page_file)

    assert requests == []
    assert complaints == []


def test_its_policy_keeps_out_what_is_smuggled_in(browser: Browser, page_file: Path, tmp_path: Path) -> None:
    """The negative control of the test above: a script and an image from elsewhere are refused, and it shows."""
    smuggled = '<script>document.title = "run"</script><img src="http://192.0.2.1/x.png">'
    html = page_file.read_text(encoding="utf-8").replace("<main", f"{smuggled}<main")
    (tmp_path / "page.html").write_text(html, encoding="utf-8")
    page = browser.new_context().new_page()
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))

    page.goto((tmp_path / "page.html").as_uri())

    assert page.title() != "run"
    assert len([text for text in complaints if "Content Security Policy" in text]) == 2


def test_every_section_shows_something(browser: Browser, page_file: Path) -> None:
    page = opened(browser, page_file)
    with Image.open(io.BytesIO(page.screenshot(full_page=True))) as image:
        pixels = np.asarray(image.convert("RGB"))

    assert page.locator("section").count() == len(SECTIONS)
    for name in SECTIONS:
        box = page.locator(f"section#{name}").bounding_box()
        assert box is not None
        assert box["width"] > 500
        assert box["height"] > 60
        left, right = round(box["x"]), round(box["x"] + box["width"])
        top, bottom = round(box["y"]), round(box["y"] + box["height"])
        assert len(np.unique(pixels[top:bottom:3, left:right:3].reshape(-1, 3), axis=0)) > 5, name


def test_every_picture_and_drawing_is_drawn(browser: Browser, page_file: Path) -> None:
    page = opened(browser, page_file)
    widths = page.evaluate("[...document.images].map(image => image.naturalWidth)")

    assert widths
    assert min(widths) >= 28
    for index in range(page.locator(".plot svg").count()):
        drawn = page.locator(".plot svg").nth(index)
        box = drawn.bounding_box()
        assert box is not None
        assert box["width"] > 150
    # The first curve is there in its series' colour, #0072b2.
    pixels = screenshot(page, ".plot svg").astype(int)
    assert (np.abs(pixels - [0x00, 0x72, 0xB2]).max(axis=2) < 12).sum() > 50


def test_dark_and_light_differ_and_both_are_readable(browser: Browser, page_file: Path) -> None:
    shots = {}
    for scheme in ("light", "dark"):
        page = opened(browser, page_file, scheme=scheme)
        page.evaluate("document.querySelectorAll('details').forEach(fold => fold.open = true)")
        shots[scheme] = screenshot(page, "header")
        found = page.evaluate(CONTRAST)
        assert len(found) > 500
        assert [entry for entry in found if entry[0] < 4.5] == []
    assert shots["light"].mean() > 200
    assert shots["dark"].mean() < 60


def test_contrast_is_really_measured(browser: Browser, page_file: Path) -> None:
    """Grey #888 on white is 3.54 : 1 (WCAG's own example of what fails)."""
    page = opened(browser, page_file)
    page.evaluate("document.querySelector('h1').style.cssText = 'color: #888; background: #fff'")

    contrast = {text: ratio for ratio, text in page.evaluate(CONTRAST)}
    title = next(text for text in contrast if text.startswith("Robustness of"))

    assert contrast[title] == pytest.approx(3.54, abs=0.01)


@pytest.mark.parametrize("width", [320, 390, 768])
def test_a_phone_never_scrolls_sideways(browser: Browser, page_file: Path, width: int) -> None:
    page = opened(browser, page_file, width=width)
    page.evaluate("document.querySelectorAll('details').forEach(fold => fold.open = true)")

    assert page.evaluate("document.documentElement.scrollWidth") == width
    # The tables do, inside their box, and their row headings stay in sight.
    box = page.locator("section#figures .scroll").first
    if width == 320:
        assert box.evaluate("box => box.scrollWidth > box.clientWidth")
        box.evaluate("box => box.scrollLeft = 200")
        heading = box.locator("tbody th").first.bounding_box()
        assert heading is not None
        assert 0 <= heading["x"] < 40


def test_a_screen_reader_finds_its_way(browser: Browser, page_file: Path) -> None:
    page = opened(browser, page_file)
    for landmark in ("banner", "navigation", "main", "contentinfo"):
        assert page.get_by_role(landmark).count() == 1, landmark
    levels = page.evaluate("[...document.querySelectorAll('h1, h2, h3, h4')].map(heading => +heading.tagName[1])")
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    assert page.evaluate("[...document.querySelectorAll('table')].every(table => table.caption?.textContent.trim())")
    assert page.evaluate("[...document.querySelectorAll('th')].every(cell => cell.scope)")
    assert page.evaluate("[...document.images].every(image => image.alt)")
    unnamed = ".plot svg:not([role=img]), .plot svg:not([aria-label])"
    assert page.locator(unnamed).count() == 0
    # A drawing's name tells its numbers.
    curve = page.locator(".plot svg").first.get_attribute("aria-label") or ""
    assert "eat-0: 70.0 at 0" in curve
    # What is bold is said, too.
    assert page.locator("section#figures table").first.inner_text().count("best") >= 1
    assert page.evaluate("[...document.querySelectorAll('nav a')].every(link => document.querySelector(link.hash))")


def test_keys_alone_reach_tables_and_folds(browser: Browser, page_file: Path) -> None:
    page = opened(browser, page_file)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    fold = page.locator("details").first
    assert fold.get_attribute("open") is None
    fold.locator("summary").focus()
    page.keyboard.press("Enter")
    assert fold.get_attribute("open") is not None
    assert page.evaluate("[...document.querySelectorAll('.scroll')].every(box => box.tabIndex === 0)")


def test_it_can_be_printed_from_a_dark_screen(browser: Browser, page_file: Path) -> None:
    page = opened(browser, page_file, scheme="dark")
    page.emulate_media(media="print", color_scheme="dark")

    # Series have the light theme's colours, too: the dark one's are pale on paper.
    assert page.evaluate("getComputedStyle(document.body).getPropertyValue('--series-0').trim()") == "#0072b2"
    assert screenshot(page, "header").mean() > 200
    assert not page.locator("nav").is_visible()
    assert len(page.pdf(format="A4")) > 20_000
    assert [entry for entry in page.evaluate(CONTRAST) if entry[0] < 4.5] == []
