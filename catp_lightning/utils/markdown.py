"""Markdown tables."""

from collections.abc import Sequence
from typing import Any

from catp_lightning.safe_text import markdown_text


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return a Markdown table in which cells are shown literally, except cells that are `Markdown` already.

    >>> print(markdown_table(["keep", "tokens"], [["0.5", "16"]]), end="")
    | keep | tokens |
    | --- | --- |
    | 0.5 | 16 |
    """
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(map(markdown_text, line))} |\n" for line in lines)
