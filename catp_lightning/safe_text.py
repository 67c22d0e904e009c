"""Escape foreign text for where it is shown: names from policies, models, data sets, packages and paths.

A name may hold characters that a terminal obeys, that Rich or Markdown reads as markup, or that matplotlib reads as a
formula. No character is removed: those that would act are written out.
"""

import re
import unicodedata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.text import Text

LONGEST = 60
"""Limit on the characters of a name in a figure; longer ones are cut."""

_ACTING = frozenset({"Cc", "Cf", "Cs", "Co", "Zl", "Zp"})
"""Unicode categories of characters that act or have no form: control and format characters (right to left), halves of
surrogate pairs, private use, line and paragraph separators."""


def printable(text: object) -> str:
    r"""Return `str(text)` with characters that act on a terminal written out; line breaks and tabs stay.

    >>> print(printable("\x1b[2J\u202eabc"))
    \x1b[2J\u202eabc
    """
    shown = str(text)
    if shown.isascii() and shown.isprintable():
        return shown
    return "".join(_written(sign) if _acts(sign) else sign for sign in shown)


def one_line(text: object) -> str:
    r"""Return `printable(text)` with line breaks and tabs written out too: no name can look like a line of catp.

    >>> one_line("a name\ncatp: saved.")
    'a name\\ncatp: saved.'
    """
    return "".join(_written(sign) if sign in "\n\t" else sign for sign in printable(text))


def rich_text(text: object, style: str = "") -> "Text":
    """Return text for Rich's console, tables and progress bars, which read markup and emoji codes in a str."""
    from rich.text import Text

    return Text(one_line(text), style)


class Markdown(str):
    """Text that is Markdown already, which `markdown_text` leaves as it is."""


def markdown_text(text: object) -> Markdown:
    r"""Return text for a Markdown paragraph, list item or cell, shown literally: no tags, links, images or formulas.

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
"""Characters that Markdown acts on inside a line, in bare addresses too; an underscore within a word is literal."""


def figure_text(text: object) -> str:
    """Return text for a figure's legend or title: one line, cut to `LONGEST`; `figures.png` draws no formulas."""
    shown = one_line(text)
    shown = shown if len(shown) <= LONGEST else f"{shown[: LONGEST - 1]}…"
    return f" {shown}" if shown.startswith("_") else shown  # matplotlib leaves such a label out of its legend


def _acts(sign: str) -> bool:
    return sign not in "\n\t" and unicodedata.category(sign) in _ACTING


def _written(sign: str) -> str:
    r"""Return a character as in a Python literal; `repr` escapes every character that acts."""
    return repr(sign)[1:-1]
