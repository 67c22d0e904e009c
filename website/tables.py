"""Tables and sections of the written pages, from which the page of each method and family takes its line."""

import re

from website.sources import ROOT


def read(page: str) -> str:
    """Return the text of a page of docs/."""
    return (ROOT / "docs" / page).read_text(encoding="utf-8")


def rows(page: str, first: str) -> dict[str, dict[str, str]]:
    """Return the rows of a table by their first cell, a name in backticks: cells by the names of their columns.

    Args:
        page: file name of a page of docs/.
        first: name of the table's first column; the first table with it is taken.
    """
    head, _, *lines = [_cells(line) for line in _table(read(page), first).splitlines()]
    return {cells[0].strip("`"): dict(zip(head, cells, strict=True)) for cells in lines}


def linked(text: str, first: str, folder: str) -> str:
    """Return a page with the names in the first column of a table as links to their own pages.

    Args:
        text: the page.
        first: as in `rows`.
        folder: where the pages of the names are.
    """
    table = _table(text, first)
    return text.replace(table, re.sub(r"^\| `([^`]+)` ", rf"| [`\1`]({folder}/\1.md) ", table, flags=re.MULTILINE))


def arxiv(text: str) -> str:
    """Return the text with its arXiv numbers as links."""
    return re.sub(r"\b(\d{4}\.\d{5})(v\d)?\b", r"[arXiv:\1\2](https://arxiv.org/abs/\1\2)", text)


def about(words: set[str]) -> str:
    """Return the anchor of the section of families.md that tells of a family.

    Args:
        words: model types and names of classes; the first line of the page that has one in backticks decides, by the
            section that it links to or else by the one that it is in.

    Raises:
        LookupError: the page tells of none of them.
    """
    section = ""
    for line in read("families.md").partition("\n## Refused")[0].splitlines():
        if line.startswith("## "):
            section = re.sub(r"[^\w\- ]", "", line[3:].lower()).replace(" ", "-")
        if words & {word.rstrip("…") for word in re.findall(r"`([^`]+)`", line)}:
            link = re.match(r"\| \[[^]]*\]\(#([^)]+)\)", line)
            return link[1] if link else section
    raise LookupError(f"docs/families.md tells of none of {', '.join(sorted(words))}.")


def _table(text: str, first: str) -> str:
    return re.findall(rf"^\| {first} \|.*\n(?:\|.*\n)+", text, flags=re.MULTILINE)[0]


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))]
