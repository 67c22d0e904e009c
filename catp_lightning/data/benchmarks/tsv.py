"""Read tables whose cells are separated by tabs, as pandas writes them."""

import re
from collections.abc import Iterator

from catp_lightning.data.records import read_text
from catp_lightning.errors import DataError

_CELL = re.compile(r'"([^"]*(?:""[^"]*)*)"(?=[\t\n]|\Z)|([^\t\n]*)')
"""A cell in quotes, where it may hold tabs, line breaks and doubled quotes; or a cell without."""


def read_tsv(path: str, holds: str) -> list[tuple[str, dict[str, str]]]:
    """Return the rows of a table as texts by the names in its first row, and where each begins, without empty rows.

    Args:
        path: path of the file.
        holds: what it should hold, for messages.

    Raises:
        DataError: the file is missing or not UTF-8, has no rows, names a column twice, or a row has more or fewer cells
            than there are names.
    """
    rows = _rows(read_text(path, holds))
    _, names = next(rows, (0, []))
    if len(set(names)) < len(names):
        raise DataError(f"{path}, line 1 names a column twice: {', '.join(names):.200}. It should hold {holds}.")
    found = []
    for line, cells in rows:
        if len(cells) != len(names):
            raise DataError(
                f"{path}, line {line} has {len(cells)} cells, and the first line names {len(names)} columns. Was the "
                "file copied completely?"
            )
        found.append((f"{path}, line {line}", dict(zip(names, cells, strict=True))))
    if not found:
        raise DataError(f"{path} has no rows. It should hold {holds}.")
    return found


def _rows(text: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the line where each row begins, from 1, and its cells."""
    cells: list[str] = []
    place, line, start = 0, 1, 1
    while place <= len(text):
        match = _CELL.match(text, place)
        assert match is not None  # the second form matches everywhere
        quoted, plain = match.groups()
        cells.append(plain if quoted is None else quoted.replace('""', '"'))
        line += match[0].count("\n")
        place = match.end() + 1
        if text[match.end() : place] != "\t":
            if cells != [""]:
                yield start, cells
            line += 1
            cells, start = [], line
