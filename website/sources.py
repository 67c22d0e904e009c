"""Pages of the repository as pages of the site: links rewritten, lists indented as Python-Markdown reads them."""

import os
import re
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
RENAMED = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "examples/tour.ipynb": "tour.md",
}
"""Pages outside of docs/ that are pages of the site, and their names there."""

_BLOCK = re.compile(r"(^```.*?^```$)", flags=re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?<=\]\()([^)\s]+)(?=\))")


def place(path: Path) -> Path:
    """Return where a file of the repository is in the site: a page, a picture of docs/, or a page that shows a source.

    Args:
        path: the file's path from the root of the repository.
    """
    if str(path) in RENAMED:
        return Path(RENAMED[str(path)])
    if path.is_relative_to("docs"):
        return path.relative_to("docs")
    if path.parent == Path("examples") and path.suffix == ".png":  # shown by a notebook
        return Path(path.name)
    return Path("source", f"{path}.md")


def for_site(text: str, path: Path) -> tuple[str, set[Path]]:
    """Return a page as the site needs it, and the files of the repository that it links to outside of the pages.

    Args:
        text: the page's Markdown.
        path: its path from the root of the repository.
    """
    shown: set[Path] = set()

    def target(match: re.Match[str]) -> str:
        link, mark, anchor = match[1].partition("#")
        if not link or re.match(r"[a-z]+:", link):
            return match[1]
        there = Path(os.path.normpath(path.parent / link))
        if place(there).is_relative_to("source"):
            shown.update([there, *_listed(there)])
        return os.path.relpath(place(there), place(path).parent) + mark + anchor

    return _outside_of_blocks(text, lambda prose: _indented(_LINK.sub(target, prose))), shown


def source_page(path: Path) -> str:
    """Return a page that shows a file of the repository, or lists a folder; the search leaves it out."""
    head = f"---\nsearch:\n  exclude: true\nhide:\n  - toc\n---\n\n# `{path.name}`\n\n`{path}`\n\n"
    if (ROOT / path).is_dir():
        return head + "".join(f"- [`{file.name}`]({path.name}/{file.name}.md)\n" for file in _listed(path))
    language = {".py": "python", ".jsonl": "json"}.get(path.suffix, "text")
    return f"{head}~~~~~~{language}\n{(ROOT / path).read_text(encoding='utf-8')}\n~~~~~~\n"


def _listed(path: Path) -> list[Path]:
    return [file.relative_to(ROOT) for file in sorted((ROOT / path).glob("*.py"))]


def _outside_of_blocks(text: str, change: Callable[[str], str]) -> str:
    parts = _BLOCK.split(text)
    return "".join(part if number % 2 else change(part) for number, part in enumerate(parts))


def _indented(prose: str) -> str:
    """Indent what belongs to an item of a list by four spaces; GitHub is content with the width of its marker."""
    lines, width = [], 0
    for line in prose.split("\n"):
        if marker := re.match(r"- |\d+\. ", line):
            width = len(marker[0])
        elif line and not line.startswith(" "):
            width = 0
        elif width and line.startswith(" " * width):
            line = " " * (4 - width) + line  # noqa: PLW2901
        lines.append(line)
    return "\n".join(lines)
