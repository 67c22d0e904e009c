"""A page of HTML in one file that asks no network for anything: Markdown, its figures with hover, and examples."""

import json
from base64 import b64encode
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jinja2 import Environment
from markdown_it import MarkdownIt
from matplotlib.figure import Figure

from catp_lightning.pages.hover import Panel, panels
from catp_lightning.safe_text import one_line

PICTURES = 300_000
"""Limit on the bytes of all pictures of examples together; with Bokeh's scripts, 1.4 MB, a page stays below 2 MB."""

SCRIPTS = ("bokeh.min.js", "bokeh-api.min.js")
"""Bokeh's scripts in a page. They are copied from where it is installed: its Python part, slow to import, is unused."""


@dataclass(frozen=True)
class Example:
    """A question, the answers of the unpruned and of the pruned model, and what the latter kept of the image.

    Attributes:
        at: the policy, by its budget.
        agrees: True if the answers are equal.
        question, unpruned, pruned: their texts.
        picture: a JPEG file.
    """

    at: str
    agrees: bool
    question: str
    unpruned: str
    pruned: str
    picture: bytes

    def cells(self) -> dict[str, Any]:
        """Return what a page shows of it, in texts without signs that act."""
        texts = {name: one_line(getattr(self, name)) for name in ("question", "unpruned", "pruned")}
        kind = one_line(f"{self.at}: {'same answer' if self.agrees else 'other answer'}")
        return {**texts, "kind": kind, "agrees": self.agrees, "picture": b64encode(self.picture).decode()}


def html_page(
    title: str,
    markdown: str,
    figures: Mapping[str, Figure],
    images: Mapping[str, bytes],
    examples: Sequence[Example] = (),
    about_examples: str = "",
) -> str:
    """Return a page of HTML that holds all it shows.

    Args:
        title: title of the page.
        markdown: text with tables, which become sortable. Tags of HTML in it are shown, not obeyed. An image that is
            called as one of the figures, "heads.png", becomes that figure.
        figures: figures by the names of their files without suffix.
        images: PNG files of the same figures, for one that has nothing to hover over.
        examples: examples; where they together exceed `PICTURES`, the last of each kind are left out.
        about_examples: what they are, in a sentence or two.
    """
    plots = {name: panels(figure) for name, figure in figures.items()}
    shown = [example.cells() for example in _that_fit(examples)]
    return (
        Environment(autoescape=True)
        .from_string(_own("page.html"))
        .render(
            title=one_line(title),
            style=_own("page.css"),
            text=_rendered(markdown, plots, images),
            examples=shown,
            about_examples=about_examples,
            kinds=Counter(example["kind"] for example in shown),
            plots=_json(plots),
            scripts=[*_bokeh(), _own("page.js")],
        )
    )


def _that_fit(examples: Sequence[Example]) -> list[Example]:
    """Return examples whose pictures together are small enough: the first of each kind, then the second ones."""
    before: Counter[tuple[str, bool]] = Counter()
    ranks = []
    for place, example in enumerate(examples):
        ranks.append((before[example.at, example.agrees], place))
        before[example.at, example.agrees] += 1
    fitting, size = [], 0
    for _, place in sorted(ranks):
        size += len(examples[place].picture)
        if size <= PICTURES:
            fitting.append(place)
    return [examples[place] for place in sorted(fitting)]


def _rendered(markdown: str, plots: Mapping[str, Sequence[Panel]], images: Mapping[str, bytes]) -> str:
    """Return Markdown as HTML, with a place for each plot, and tables in boxes of their own, which scroll."""

    def image(self: Any, tokens: Sequence[Any], place: int, options: Any, env: Any) -> str:
        name = Path(str(tokens[place].attrGet("src"))).stem
        if plots.get(name):
            return f'<span class="plot" data-figure="{escape(name)}"></span>'
        if name in images:
            picture = b64encode(images[name]).decode()
            return f'<span class="plot"><img alt="{escape(name)}" src="data:image/png;base64,{picture}"></span>'
        return ""

    writer = MarkdownIt("commonmark", {"html": False}).enable("table")
    writer.add_render_rule("image", image)
    writer.add_render_rule("table_open", lambda *_: '<div class="scroll"><table>\n')
    writer.add_render_rule("table_close", lambda *_: "</table></div>\n")
    return str(writer.render(markdown))


def _json(value: Any) -> str:
    """Return JSON that cannot end the script element that it stands in."""
    return json.dumps(value, allow_nan=False).replace("<", "\\u003c")


def _own(name: str) -> str:
    return files("catp_lightning.pages").joinpath(name).read_text(encoding="utf-8")


def _bokeh() -> list[str]:
    found = find_spec("bokeh")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("Pages of HTML hold Bokeh's scripts, and bokeh is not installed: pip install bokeh.")
    folder = Path(found.origin).parent / "server" / "static" / "js"
    return [(folder / name).read_text(encoding="utf-8") for name in SCRIPTS]
