"""The documentation as a site: built with warnings as errors, whole, without the network, and its code runs."""

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest

from catp_lightning.methods import SCORERS, SELECTORS
from catp_lightning.models import FAMILIES
from catp_lightning.policy import SCHEDULES
from website.__main__ import build, write
from website.sources import for_site

WRITTEN = ("budget", "calibration", "changelog", "contributing", "evaluation", "faq", "how-it-works", "start")
KINDS = ("scorers", "selectors", "schedules", "models")


class Page(HTMLParser):
    """What a page links to, what it loads, and its anchors."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.anchors: set[str] = set()
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        self.anchors |= {value for name in ("id", "name") if (value := given.get(name))}
        if target := given.get("href") if tag in ("a", "link") else given.get("src"):
            (self.links if tag == "a" else self.loaded).append(target)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    write(folder / "work", folder / "site", with_pictures=False)
    return folder


@pytest.fixture(scope="module")
def built(sources: Path) -> Path:
    assert build(sources / "work") == 0, "its warnings are in the captured output"
    return sources


@pytest.fixture(scope="module")
def pages(built: Path) -> dict[Path, Page]:
    found = sorted((built / "site").rglob("*.html"))
    return {file: Page(file) for file in found if file.name != "404.html"}  # its links begin at the host's root


def names() -> set[str]:
    """Of the pages of methods, schedules and families, and of some that are written by hand."""
    found = {f"scorers/{name}" for name in SCORERS} | {f"selectors/{name}" for name in SELECTORS}
    found |= {f"models/{family.__name__}" for family in FAMILIES} | {*WRITTEN, "index", "api/catp_lightning"}
    return found | {f"schedules/{name}" for name in SCHEDULES}


def test_every_method_schedule_and_family_has_a_source_of_its_page(sources: Path) -> None:
    assert {name for name in names() if not (sources / "work/docs" / f"{name}.md").is_file()} == set()


@pytest.mark.slow
def test_every_method_schedule_and_family_has_a_page(built: Path) -> None:
    assert {name for name in names() if not (built / "site" / f"{name}.html").is_file()} == set()


@pytest.mark.slow
def test_every_link_of_the_site_leads_somewhere(built: Path, pages: dict[Path, Page]) -> None:
    lost = []
    for file, page in pages.items():
        for link in page.links:
            path, anchor = urldefrag(unquote(link))
            if re.match(r"[a-z]+:", path):
                continue
            there = (file.parent / path).resolve() if path not in ("", ".") else file
            there = there / "index.html" if there.is_dir() else there
            known = there in pages and (not anchor or anchor in pages[there].anchors)
            if not known and not (there.is_file() and there not in pages):
                lost.append(f"{file.relative_to(built / 'site')}: {link}")
    assert not lost


@pytest.mark.slow
def test_nothing_is_loaded_from_elsewhere(pages: dict[Path, Page]) -> None:
    assert {target for page in pages.values() for target in page.loaded if re.match(r"([a-z]+:)?//", target)} == set()


def blocks(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield the Python blocks of the generated pages."""
    for file in sorted(file for kind in KINDS for file in folder.glob(f"{kind}/*.md")):
        for block in re.findall(r"```python\n(.*?)```", file.read_text(encoding="utf-8"), flags=re.DOTALL):
            yield str(file.relative_to(folder)), block


def test_the_code_of_every_method_and_family_runs(sources: Path) -> None:
    ran = []
    for page, block in blocks(sources / "work/docs"):
        exec(compile(block, page, "exec"), {"__name__": "page"})
        ran.append(page)
    assert len(ran) >= len(SCORERS) + len(SELECTORS) + len(SCHEDULES) + len(FAMILIES) - 1


def test_links_of_the_repository_become_links_of_the_site() -> None:
    text = (
        "[a](../README.md#try-it), [b](start.md), [c](../setup.py) and [d](https://example.org)\n```\n[e](../x.py)\n```"
    )
    page, shown = for_site(text, Path("docs/methods.md"))
    assert page == (
        "[a](index.md#try-it), [b](start.md), [c](source/setup.py.md) and [d](https://example.org)\n"
        "```\n[e](../x.py)\n```"
    )
    assert shown == {Path("setup.py")}
    assert for_site("[f](docs/faq.md)", Path("README.md")) == ("[f](faq.md)", set())


def test_what_belongs_to_an_item_of_a_list_is_indented_for_markdown() -> None:
    text = "1. one\n\n   ```\n   code\n   ```\n- two\n\n  more\n\nend\n  as it was"
    expected = "1. one\n\n    ```\n    code\n    ```\n- two\n\n    more\n\nend\n  as it was"
    assert for_site(text, Path("CONTRIBUTING.md"))[0] == expected
