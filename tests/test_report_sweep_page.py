"""The page of a sweep in a browser: quiet, whole on a phone, readable in the light and in the dark."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eat_dist.report import write_report
from report_browser import CHROMIUM, CONTRAST, opened, watched
from sweep_folders import CONDITIONAL, TWO, write_sweep

pytest.importorskip("playwright", reason="playwright is not installed")
from playwright.sync_api import Browser

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on the PATH")
SECTIONS = ["verdict", "trials", "parallel", "front", "course", "importance", "slices", "origin"]
SPACE = CONDITIONAL | {"optimiser.a_key_that_is_longer_than_any_phone_is_wide": {"log_uniform": [1e-5, 1e-3]}}


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pruned and failed trials, a conditional setting, and a key of great length."""
    folder = tmp_path_factory.mktemp("report")
    sweep = write_sweep(folder / "diversity", trials=26, pruned=10, failed=3, space=SPACE)
    return Path(write_report([sweep], str(folder / "report.html")).page)


def test_it_opens_quietly_and_asks_for_nothing_else(browser: Browser, page_file: Path) -> None:
    page, requests, complaints = watched(browser, page_file)

    assert requests == []
    assert complaints == []
    assert page.evaluate("[...document.querySelectorAll('section')].map(section => section.id)") == SECTIONS
    assert page.evaluate("[...document.querySelectorAll('nav a')].every(link => document.querySelector(link.hash))")


@pytest.mark.parametrize("width", [320, 768])
def test_a_phone_never_scrolls_sideways(browser: Browser, page_file: Path, width: int) -> None:
    page = opened(browser, page_file, width=width)
    page.evaluate("document.querySelectorAll('details').forEach(fold => fold.open = true)")

    assert page.evaluate("document.documentElement.scrollWidth") == width
    drawn = page.locator("section#parallel .plot svg").bounding_box()
    assert drawn is not None
    assert 200 < drawn["width"] <= width
    # The table of trials scrolls within its box, the trials' numbers stay.
    box = page.locator("section#trials .scroll").first
    assert box.evaluate("box => box.scrollWidth > box.clientWidth")
    box.evaluate("box => box.scrollLeft = 300")
    heading = box.locator("tbody th").first.bounding_box()
    assert heading is not None
    assert 0 <= heading["x"] < 40


def test_it_is_readable_in_the_light_and_in_the_dark(browser: Browser, page_file: Path) -> None:
    shots = {}
    for scheme in ("light", "dark"):
        page = opened(browser, page_file, scheme=scheme)
        page.evaluate("document.querySelectorAll('details').forEach(fold => fold.open = true)")
        found = page.evaluate(CONTRAST)
        assert len(found) > 300
        assert [entry for entry in found if entry[0] < 4.5] == []
        with Image.open(io.BytesIO(page.locator("section#parallel .plot").screenshot())) as image:
            shots[scheme] = np.asarray(image.convert("RGB")).astype(int)
    # The best line has the strongest colour of each theme: dark blue on white, yellow on black.
    for scheme, colour in (("light", (0x0D, 0x08, 0x87)), ("dark", (0xF0, 0xF9, 0x21))):
        assert (np.abs(shots[scheme] - colour).max(axis=2) < 12).sum() > 200
    assert shots["light"].mean() > 200
    assert shots["dark"].mean() < 80


def test_a_screen_reader_is_told_what_the_drawings_show(browser: Browser, page_file: Path) -> None:
    page = opened(browser, page_file)
    names = page.evaluate("[...document.querySelectorAll('.plot svg')].map(svg => svg.getAttribute('aria-label'))")

    assert len(names) == page.locator(".plot svg[role=img]").count() == 10
    assert "The best, trial" in names[0]
    assert "on the front: trial" in names[1]
    assert "pruned after epoch 2" in names[2]
    assert "by chance up to" in names[3]
    best = page.locator("section#trials table").first.locator("tbody tr").first
    assert best.locator("th").inner_text().startswith("★")
    assert "best" in best.inner_text()


def test_the_front_of_two_objectives_comes_before_its_settings(browser: Browser, tmp_path: Path) -> None:
    space = {key: CONDITIONAL[key] for key in list(CONDITIONAL)[:1]}
    sweep = write_sweep(tmp_path / "s", trials=9, objectives=TWO, space=space)
    written = write_report([sweep], str(tmp_path / "r.html"))
    page = opened(browser, Path(written.page), width=320)

    shown = page.evaluate("[...document.querySelectorAll('section')].map(section => section.id)")

    assert shown.index("front") < shown.index("parallel")
    assert page.evaluate("document.documentElement.scrollWidth") == 320
    # There is no single best, so no bar of its figures.
    assert page.locator(".bar").count() == 0
    assert "on the front of clean R@1 and attacked NMI" in page.locator("#verdict").inner_text()
