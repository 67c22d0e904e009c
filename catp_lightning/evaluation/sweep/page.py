"""The page of a sweep: its tables, which can be sorted, and its plot with hover, in one file of HTML."""

from matplotlib.figure import Figure

from catp_lightning.pages import html_page


def sweep_page(markdown: str, name: str, drawn: Figure, image: bytes) -> str:
    """Return the page: the text with the plot before its first table.

    Args:
        markdown: the text and its tables; its first line is the title, "# ...".
        name: name of the plot's file, without suffix.
        drawn: the plot.
        image: the plot as a PNG file.
    """
    title = markdown.partition("\n")[0].removeprefix("# ")
    head, section, rest = markdown.partition("\n## ")
    if not section:  # tables of several models have no sections
        head, section, rest = markdown.partition("\n|")
    return html_page(title, f"{head}\n\n![{name}]({name}.png)\n\n{section}{rest}", {name: drawn}, {name: image})
