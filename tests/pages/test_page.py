"""A page of HTML, read as a browser reads it."""

import re
from html.parser import HTMLParser

import pytest
from matplotlib.figure import Figure

from catp_lightning.pages import Example, html_page
from catp_lightning.pages import page as writing
from catp_lightning.safe_text import markdown_text, one_line
from catp_lightning.utils.markdown import markdown_table
from catp_lightning.utils.plots import png
from tests.support.hostile import HOSTILE


class Read(HTMLParser):
    """Tags of a page with their attributes, and the text outside of scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] not in ("script", "style"):
            self.texts.append(data)


def drawn(label: str) -> Figure:
    figure = Figure()
    axes = figure.subplots()
    axes.plot([1, 2], [3, 4], label=label)
    axes.set_title(label)
    return figure


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_is_shown_as_it_is_wherever_data_stand(name: str) -> None:
    text = HOSTILE[name]
    markdown = f"# {markdown_text(text)}\n\n![plot](plot.png)\n\n{markdown_table(['m', text], [[text, '1']])}"
    plain = "# plain\n\n![plot](plot.png)\n\n| m | n |\n| --- | --- |\n| a | 1 |\n"
    quiet = html_page("plain", plain, {"plot": drawn("a")}, {}, [Example("a", True, "b", "c", "d", b"\xff\xd8")])
    example = Example(text, True, text, text, text, b"\xff\xd8")
    page = html_page(text, markdown, {"plot": drawn(text)}, {}, [example])
    found = Read(page)
    assert [tag for tag, _ in found.tags] == [tag for tag, _ in Read(quiet).tags]
    names = {name for _, attributes in found.tags for name in attributes}
    assert not any(name.startswith("on") for name in names)
    assert all(str(own.get("src", "data:")).startswith("data:") for _, own in found.tags)
    assert {own["href"] for tag, own in found.tags if tag == "a"} == {"#examples"}
    assert page.count("</script") == quiet.count("</script"), "no name ends a script"
    assert "".join(found.texts).count(one_line(text).strip()) >= 5


def test_a_page_asks_nothing_of_a_network_and_stays_small() -> None:
    pictures = [Example("keep 0.5", kind, "q", "a", "b", bytes(90_000)) for kind in (False, True) for _ in range(9)]
    page = html_page("t", "# t\n\n![plot](plot.png)\n", {"plot": drawn("a")}, {}, pictures)
    assert "default-src 'none'" in page and len(page) < 2_000_000
    found = Read(page)
    assert [tag for tag, own in found.tags if tag == "img"] == ["img"] * 3, "of pictures those that fit are shown"
    assert all(f"keep 0.5: {kind}" in "".join(found.texts) for kind in ("other answer (2)", "same answer (1)"))
    assert not [
        tag
        for tag, own in found.tags
        if tag in ("script", "link", "img") and re.match("https?:|//", str(own.get("src") or own.get("href") or ""))
    ]


def test_tags_in_the_text_are_shown_and_not_obeyed() -> None:
    found = Read(html_page("t", '# t\n\na <b onclick="x">c</b>\n\n<iframe src="https://d.example"></iframe>\n', {}, {}))
    assert not {"b", "iframe"} & {tag for tag, _ in found.tags}
    assert '<iframe src="https://d.example">' in "".join(found.texts)


def test_a_figure_without_anything_to_hover_over_is_a_picture() -> None:
    empty = Figure()
    empty.subplots().text(0.5, 0.5, "words")
    page = html_page("t", "# t\n\n![words](words.png)\n", {"words": empty}, {"words": png(empty)})
    (image,) = (own for tag, own in Read(page).tags if tag == "img")
    assert str(image["src"]).startswith("data:image/png;base64,iVBOR") and "data-figure" not in page.split("<script")[0]


def test_without_bokeh_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install bokeh"):
        html_page("t", "# t\n", {}, {})
