"""The league: submissions, a folder each, and the page that lists them."""

from catp_lightning.evaluation.league.page import league_json, league_page
from catp_lightning.evaluation.league.stored import read, read_all, written
from catp_lightning.evaluation.league.submission import Row, Submission

__all__ = ["Row", "Submission", "league_json", "league_page", "read", "read_all", "written"]
