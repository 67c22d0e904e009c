"""A Chromium without a screen, where one is installed."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
WIDTHS = (390, 1280)
"""Width of a phone and of a desk's screen, in pixels."""
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]


@contextmanager
def chromium() -> Iterator[Any]:
    """Yield a browser of playwright; skip the test where there is none."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip("no Chromium is installed: apt-get install chromium")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()


@dataclass
class Opened:
    """A page, and all that it asked for or complained of since it was opened."""

    page: Any
    asked: list[str] = field(default_factory=list)
    told: list[str] = field(default_factory=list)


@contextmanager
def opening(browser: Any, file: Path, width: int) -> Iterator[Opened]:
    """Yield a page of ours with a plot, opened on a dark screen of a width in pixels."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme="dark")
    found = Opened(context.new_page())
    found.page.set_default_timeout(10_000)
    found.page.on("request", lambda asked: found.asked.append(asked.url))
    found.page.on("dialog", lambda dialog: (found.told.append(dialog.message), dialog.dismiss()))
    found.page.on("pageerror", lambda error: found.told.append(str(error)))
    found.page.on("console", lambda line: found.told.append(line.text) if line.type in ("error", "warning") else None)
    found.page.goto(file.as_uri())
    found.page.wait_for_selector(".bk-Figure")
    found.page.wait_for_timeout(500)  # layouts settle
    yield found
    context.close()


def texts(page: Any, selector: str) -> list[str]:
    return [text.strip() for text in page.locator(selector).all_text_contents()]


def fits_and_asks_nothing(opened: Opened, file: Path) -> None:
    """Assert that a page fits its window, can be read, asks no network for anything, complains of nothing, is small."""
    page = opened.page
    wide = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert wide[0] == wide[1], "nothing is scrolled sideways but tables inside of their boxes"
    assert page.evaluate("[...document.querySelectorAll('table')].every(one => one.closest('.scroll'))")
    sizes = page.evaluate(
        "[...document.querySelectorAll('p, td, button')].map(e => parseFloat(getComputedStyle(e).fontSize))"
    )
    assert min(sizes) >= 12, "letters that a phone's reader can read"
    assert opened.asked == [file.as_uri()] or all(url.startswith("data:") for url in opened.asked[1:])
    assert opened.told == []
    assert page.locator("main script, main iframe, main link, main [onerror], main a[href^='http']").count() == 0
    assert page.evaluate("[...document.images].every(one => one.src.startsWith('data:'))")
    assert file.stat().st_size < 2_000_000
