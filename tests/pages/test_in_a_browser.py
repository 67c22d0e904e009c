"""The report of a calibration, opened and clicked in Chromium on a phone's width and on a desk's."""

import json
import re
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from catp_lightning import PruningPolicy
from catp_lightning.calibration.report.report import report
from catp_lightning.pages import Example
from catp_lightning.safe_text import one_line
from tests.support.browsers import WIDTHS, Opened, chromium, fits_and_asks_nothing, opening, texts
from tests.support.hostile import HOSTILE, other_names
from tests.support.paths import ROOT
from tests.support.quick import quick

EVIL = "".join(HOSTILE[name] for name in ("html", "image", "right to left", "no glyph")) + "\"'<script>owned=1</script>"
WORDS = """function words(node) {
  if (node.nodeType === 3) return node.data;
  if (node.nodeName === "STYLE") return "";
  return [...(node.shadowRoot?.childNodes ?? []), ...node.childNodes].map(words).join(" ");
}"""
"""All text of an element, that inside of shadow roots too."""
PLACE = """([x, y]) => {
  const { frame } = [...Bokeh.index.roots][0];
  return [frame.x_scale.compute(x), frame.y_scale.compute(y)];
}"""
"""Where a point of the first plot is on its canvas."""


def picture(shade: int) -> bytes:
    buffer = BytesIO()
    Image.new("RGB", (700, 300), (shade, 0, 0)).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def policies() -> list[PruningPolicy]:
    """With a name that tries to act, among others a word of 5,000 letters."""
    stored = json.loads((ROOT / "tests/golden/digits_llava-all-promise-0.json").read_text())
    texts = [EVIL, HOSTILE["long"]]
    return [PruningPolicy.from_dict(other_names(one, text)) for one, text in zip(stored, texts, strict=False)]


@pytest.fixture(scope="module")
def file(policies: list[PruningPolicy], tmp_path_factory: pytest.TempPathFactory) -> Path:
    examples = [
        Example("keep 0.5", kind == "same", f"question {kind} {number} {EVIL}", EVIL, HOSTILE["long"], picture(number))
        for kind, count in (("other", 3), ("same", 2))
        for number in range(count)
    ]
    folder = tmp_path_factory.mktemp("report")
    report(policies, [], folder, [], 1.0, None, 0, (), examples)
    return folder / "report.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module", params=quick(WIDTHS, {str(min(WIDTHS))}))
def opened(request: pytest.FixtureRequest, browser: Any, file: Path) -> Iterator[Opened]:
    with opening(browser, file, request.param) as found:
        yield found


def test_it_fits_the_window_asks_nothing_of_a_network_and_obeys_no_name(opened: Opened, file: Path) -> None:
    fits_and_asks_nothing(opened, file)
    assert opened.page.evaluate("typeof owned") == "undefined"
    ground = opened.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert max(map(int, re.findall(r"\d+", ground))) < 64, "dark where the reader's system is"


def test_it_shows_every_candidate_and_the_promise(opened: Opened, policies: list[PruningPolicy]) -> None:
    (policy, *_) = policies
    shown = " ".join(opened.page.locator("main").inner_text().split())
    promise = policy.evidence["promise"]
    assert f"With confidence {promise['confidence']:.4g}" in shown or "No budget was found" in shown
    cells = texts(opened.page, "td:first-child")
    for row in policy.evidence["candidates"]:
        assert one_line(row["name"]).strip() in cells


def test_a_click_on_a_head_sorts_the_table_by_numbers_and_a_second_one_backwards(opened: Opened) -> None:
    page = opened.page
    table = page.locator("h2:has-text('Candidates') + .scroll table").first
    heads = texts(table, "th")
    column = heads.index("divergence")
    before = texts(table, "tbody tr")
    found = {}
    for way in ("ascending", "descending"):
        table.locator("th button").nth(column).click()
        assert table.locator("th").nth(column).get_attribute("aria-sort") == way
        found[way] = [float(text.split()[0]) for text in texts(table, f"tbody td:nth-child({column + 1})")]
        assert sorted(texts(table, "tbody tr")) == sorted(before), "no row is lost"
    assert found["ascending"] == sorted(found["ascending"]) and len(set(found["ascending"])) > 5
    assert found["descending"] == found["ascending"][::-1] or found["descending"] == sorted(found["ascending"])[::-1]
    checked = heads.index("agreement, checked")
    table.locator("th button").nth(checked).click()
    cells = texts(table, f"tbody td:nth-child({checked + 1})")
    filled = [cell for cell in cells if cell]
    assert 0 < len(filled) < len(cells) and cells[: len(filled)] == filled, "empty cells come last"


def test_a_pointer_over_a_point_of_a_plot_is_told_its_numbers(opened: Opened) -> None:
    page = opened.page
    plot = page.locator("[data-figure='retention'] .panels > div").first
    plot.scroll_into_view_if_needed()
    box, said = plot.bounding_box(), page.locator(".bk-Tooltip")
    series = json.loads(page.locator("#plots").text_content())["retention"][0]["series"]
    (chosen,) = (one for one in series if one["name"] == "chosen")
    for (x, y, *_), text in list(zip(chosen["points"], chosen["texts"], strict=True))[:3]:
        across, down = page.evaluate(PLACE, [x, y])
        page.mouse.move(box["x"] + across + 2, box["y"] + down - 3)
        said.first.wait_for()
        assert f"chosen {text}" in " ".join(said.first.evaluate(WORDS).split())
        _, below = page.evaluate(PLACE, [x, 0.77])  # where there is nothing
        page.mouse.move(box["x"] + across, box["y"] + below)
        said.first.wait_for(state="hidden")


def test_a_click_on_a_name_in_the_legend_hides_its_line(opened: Opened) -> None:
    plot = opened.page.locator("[data-figure='retention']")
    button = plot.locator(".legend button").first
    button.scroll_into_view_if_needed()
    before = plot.locator(".panels").screenshot()
    button.click()
    opened.page.wait_for_timeout(300)
    assert button.get_attribute("aria-pressed") == "false" and plot.locator(".panels").screenshot() != before
    button.click()
    opened.page.wait_for_timeout(300)
    assert plot.locator(".panels").screenshot() == before


def test_examples_are_clicked_through_one_at_a_time(opened: Opened) -> None:
    page = opened.page
    seen = page.locator("figure.example:visible")
    kinds = page.locator("#examples button[data-kind]")
    assert texts(page, "#examples button[data-kind]") == ["keep 0.5: other answer (3)", "keep 0.5: same answer (2)"]
    for kind, count in (("other", 3), ("same", 2)):
        kinds.nth(int(kind == "same")).click()
        for number in [*range(count), 0]:
            assert seen.count() == 1
            assert seen.locator("dd").first.inner_text().startswith(f"question {kind} {number} ")
            assert seen.locator("img").evaluate("one => one.decode().then(() => one.naturalWidth)") == 700
            assert page.locator("#examples output").inner_text() == f"{number + 1} of {count}"
            page.locator("button[data-step='1']").click()
    page.locator("button[data-step='-1']").click()
    assert one_line(EVIL) in seen.locator("dd").nth(1).text_content()
