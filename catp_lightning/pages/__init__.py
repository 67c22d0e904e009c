"""Pages of HTML that stand alone: text, tables that sort, plots with hover, and examples to click through."""

from catp_lightning.pages.page import Example, html_page

__all__ = ["Example", "html_page"]
