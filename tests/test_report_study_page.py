"""The page of a study in a browser: quiet, whole on a phone, readable in the light and in the dark."""

from __future__ import annotations

from pathlib import Path

import pytest

from eat_dist.report import write_report
from report_browser import CHROMIUM, CONTRAST, opened, watched
from study_folders import drawn, study_json, write_study

pytest.importorskip("playwright", reason="playwright is not installed")
from playwright.sync_api import Browser

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on the PATH")
ROWS = ["natural", "mixup", "trades", "pgd_at", "a_row_with_a_name_that_is_longer_than_any_phone_is_wide", "eat"]


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two datasets, a failed run, and a name of great length."""
    folder = tmp_path_factory.mktemp("report")
    content = study_json({"omniglot": drawn(ROWS), "cub_mini": drawn(ROWS[::-1], seed=1)})
    content["runs"][3] |= {"status": "FAILED", "figures": None, "error": "member 1: the clean loss is nan"}
    return Path(write_report([write_study(folder / "study", content)], str(folder / "report.html")).page)


def test_it_opens_quietly_and_asks_for_nothing_else(browser: Browser, page_file: Path) -> None:
    page, requests, complaints = watched(browser, page_file)

    assert requests == []
    assert complaints == []
    sections = page.evaluate("[...document.querySelectorAll('section')].map(section => section.id)")
    assert sections == ["verdict", "on-omniglot", "on-cub-mini", "runs", "origin"]
    assert page.evaluate("[...document.querySelectorAll('nav a')].every(link => document.querySelector(link.hash))")


@pytest.mark.parametrize("width", [320, 768])
def test_a_phone_never_scrolls_sideways(browser: Browser, page_file: Path, width: int) -> None:
    page = opened(browser, page_file, width=width)
    page.evaluate("document.querySelectorAll('details').forEach(fold => fold.open = true)")

    assert page.evaluate("document.documentElement.scrollWidth") == width
    box = page.locator("section#on-omniglot .scroll").first
    assert box.evaluate("box => box.scrollWidth > box.clientWidth") or width > 320


def test_it_is_readable_in_the_light_and_in_the_dark(browser: Browser, page_file: Path) -> None:
    for scheme in ("light", "dark"):
        page = opened(browser, page_file, scheme=scheme)
        page.evaluate("document.querySelectorAll('details').forEach(fold => fold.open = true)")
        found = page.evaluate(CONTRAST)
        assert len(found) > 200
        assert [entry for entry in found if entry[0] < 4.5] == []


def test_every_run_is_a_point_and_a_screen_reader_hears_the_means(browser: Browser, page_file: Path) -> None:
    page = opened(browser, page_file)
    names = page.evaluate("[...document.querySelectorAll('.plot svg')].map(svg => svg.getAttribute('aria-label'))")

    assert len(names) == 4
    assert names[0].startswith("omniglot: attacked R@1, 6 rows, the best first: eat ")
    assert " ± " in names[0]
    best = page.locator("section#on-omniglot table").first.locator("strong")
    assert best.count() > 0
    assert "✗ failed" in page.locator("section#runs").inner_text()
