"""Write the site: pages to build/website, and from them site/, with warnings as errors."""

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from website.generated import api_pages, family_pages, schedule_pages, scorer_pages, selector_pages
from website.notebook import page_of
from website.sources import RENAMED, ROOT, for_site, place, source_page
from website.tables import linked

NAV: list[Any] = [
    {"Home": ["index.md", "start.md", "tour.md", "how-it-works.md", "budget.md", "faq.md"]},
    {"Guides": ["calibration.md", "evaluation.md", "performance.md", "scaling.md", "reliability.md"]},
    {"Results": ["results.md", "calibrated.md", "shifts.md", "league.md"]},
    {"About": ["design.md", "contributing.md", "versioning.md", "changelog.md", "security.md"]},
]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m website", description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "site", help="folder of the site (site/)")
    parser.add_argument("--work", type=Path, default=ROOT / "build/website", help="folder of its pages (build/website)")
    parser.add_argument("--no-pictures", action="store_true", help="leave out pictures of what each method keeps")
    given = parser.parse_args()
    write(given.work, given.output.resolve(), not given.no_pictures)
    sys.exit(build(given.work))


def write(work: Path, site: Path, with_pictures: bool) -> None:
    """Write the pages and their configuration.

    Args:
        work: folder that gets them; what is there is deleted.
        site: folder that the site will be built in.
        with_pictures: True to prune shipped models, for a picture of what each method keeps.
    """
    shutil.rmtree(work, ignore_errors=True)
    pages = work / "docs"
    pages.mkdir(parents=True)
    shutil.copy(ROOT / "website/site.css", pages)
    pictures: set[str] = set()
    if with_pictures:
        from website.pictures import draw

        pictures = draw(pages / "pictures")
    for source in sorted(_copy(pages)):
        _write(pages / place(source), source_page(source))
    scorers, selectors = _all(pages, scorer_pages(pictures)), _all(pages, selector_pages(pictures))
    schedules = _all(pages, schedule_pages(pictures))
    families, api = _all(pages, family_pages(pictures)), _all(pages, api_pages())
    nav = [
        *NAV[:2],
        {"Methods": ["methods.md", {"Scorers": scorers}, {"Selectors": selectors}, {"Schedules": schedules}]},
        {"Families": ["families.md", "compatibility.md", {"One by one": families}]},
        NAV[2],
        {"API": api},
        NAV[3],
    ]
    # A file by its whole path: the folder of the pages may be anywhere.
    settings = {"INHERIT": str(ROOT / "website/mkdocs.yml"), "docs_dir": "docs", "site_dir": str(site), "nav": nav}
    _write(work / "mkdocs.yml", yaml.safe_dump(settings, sort_keys=False))


def build(work: Path) -> int:
    """Build the site of pages that were written to a folder; return 0, or 1 after any warning."""
    # Not --quiet: warnings would be neither shown nor counted. The variable is for news of the theme.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", str(work / "mkdocs.yml")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, check=False, cwd=ROOT, env=environment).returncode


def _copy(pages: Path) -> set[Path]:
    """Write the written pages and their pictures; return the files outside of them that they link to."""
    files: set[Path] = set()
    for file in [*(ROOT / name for name in RENAMED), *sorted((ROOT / "docs").rglob("*"))]:
        path = file.relative_to(ROOT)
        if file.suffix in (".md", ".ipynb"):
            written, pictures = page_of(file) if file.suffix == ".ipynb" else (file.read_text(encoding="utf-8"), {})
            text, more = for_site(written, path)
            for name, picture in pictures.items():
                (pages / name).write_bytes(picture)
            files |= more
            if file.name == "methods.md":
                for first, folder in (("name", "scorers"), ("selector", "selectors"), ("schedule", "schedules")):
                    text = linked(text, first, folder)
            _write(pages / place(path), text)
        elif file.is_file():
            (pages / place(path)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, pages / place(path))
    return files


def _all(pages: Path, written: Iterable[tuple[Path, str]]) -> list[str]:
    """Write pages and return their paths."""
    paths = []
    for path, text in written:
        _write(pages / path, text)
        paths.append(str(path))
    return paths


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
