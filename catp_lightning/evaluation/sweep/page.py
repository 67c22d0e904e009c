"""The page of a sweep: tables that can be sorted, a plot with hover, and examples with images, in one file of HTML."""

from collections.abc import Sequence
from dataclasses import replace

from matplotlib.figure import Figure

from catp_lightning.evaluation.sweep.table import ModelTable
from catp_lightning.pages import html_page

EXAMPLES = """\
Questions of the comparison, asked again: what a method keeps of the image, and the answers without pruning and with
it. At each budget they are of the reference and of the other method that agrees most. They are picked to show both
kinds, so their number says nothing of how often answers differ.\
"""


def sweep_page(markdown: str, name: str, drawn: Figure, image: bytes, tables: Sequence[ModelTable]) -> str:
    """Return the page: the text with the plot before its first table, and the examples of all tables.

    Args:
        markdown: the text and its tables; its first line is the title, "# ...".
        name: name of the plot's file, without suffix.
        drawn: the plot.
        image: the plot as a PNG file.
        tables: the tables in the text.
    """
    title = markdown.partition("\n")[0].removeprefix("# ")
    head, section, rest = markdown.partition("\n## ")
    if not section:  # tables of several models have no sections
        head, section, rest = markdown.partition("\n|")
    examples = [one for table in tables for one in table.examples]
    if len(tables) > 1:
        examples = [replace(one, at=f"{table.name}, {one.at}") for table in tables for one in table.examples]
    text = f"{head}\n\n![{name}]({name}.png)\n\n{section}{rest}"
    return html_page(title, text, {name: drawn}, {name: image}, examples, EXAMPLES)
