"""Text of others made safe for where it is shown: names from policies, models, data sets, packages and paths.

A name may hold what a terminal obeys, what Rich or Markdown reads as markup, or what matplotlib reads as a formula.
Nothing is taken away: what would act is shown instead.
"""

import re
import unicodedata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.text import Text

LONGEST = 60
"""Characters of a name in a figure."""

_ACTING = frozenset({"Cc", "Cf", "Cs", "Co", "Zl", "Zp"})
"""Unicode's categories of what acts or has no form: control and format characters (right to left), halves of pairs."""


def printable(text: object) -> str:
    r"""`str(text)` in which characters that act on a terminal are written out; line breaks and tabs stay.

    >>> print(printable("\x1b[2J\u202eabc"))
    \x1b[2J\u202eabc
    """
    shown = str(text)
    if shown.isascii() and shown.isprintable():
        return shown
    return "".join(_written(sign) if _acts(sign) else sign for sign in shown)


def one_line(text: object) -> str:
    r"""`printable`, with line breaks and tabs written out too, so that no name can look like a line of ours.

    >>> one_line("a name\ncatp: saved.")
    'a name\\ncatp: saved.'
    """
    return "".join(_written(sign) if sign in "\n\t" else sign for sign in printable(text))


def rich_text(text: object, style: str = "") -> "Text":
    """For Rich's console, tables and progress bars, which read markup and emoji codes in a str."""
    from rich.text import Text

    return Text(one_line(text), style)


class Markdown(str):
    """Text that is Markdown already, which `markdown_text` leaves as it is."""


def markdown_text(text: object) -> Markdown:
    r"""For a paragraph, a list item or a cell of a table: shown as it is, without tags, links, images or formulas.

    >>> print(markdown_text("<img src=x> | [a](https://b)"))
    &lt;img src=x&gt; \| \[a\](https&#58;//b)
    >>> print(markdown_text("l2-norm, 0.5 (0.4 to 0.6)"), markdown_text("digits_blip2"))
    l2-norm, 0.5 (0.4 to 0.6) digits_blip2
    """
    if isinstance(text, Markdown):
        return text
    return Markdown(_MARKUP.sub(lambda found: _ENTITIES.get(found[0], f"\\{found[0]}"), one_line(text)))


_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "@": "&#64;", ":": "&#58;", ".": "&#46;"}
_MARKUP = re.compile(r"[\\`*\[\]|~$<>&@]|(?<![^\W_])_|_(?![^\W_])|:(?=//)|(?<=www)\.", re.IGNORECASE)
"""What Markdown reads inside a line; an underscore within a word, and a bare address, are told apart."""


def figure_text(text: object) -> str:
    """For a legend or title: one line, not longer than `LONGEST`; `figures.png` draws no formulas."""
    shown = one_line(text)
    shown = shown if len(shown) <= LONGEST else f"{shown[: LONGEST - 1]}…"
    return f" {shown}" if shown.startswith("_") else shown  # matplotlib leaves such a label out of its legend


def _acts(sign: str) -> bool:
    return sign not in "\n\t" and unicodedata.category(sign) in _ACTING


def _written(sign: str) -> str:
    r"""As in a Python literal; `repr` leaves nothing that acts as it is."""
    return repr(sign)[1:-1]
