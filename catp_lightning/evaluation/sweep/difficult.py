"""Comparison on the questions that a model answers wrong from a smaller image (VTC-Bench, 2510.07143)."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from catp_lightning.evaluation.comparison import Comparison
from catp_lightning.evaluation.sweep.results import about
from catp_lightning.evaluation.sweep.table import ModelTable
from catp_lightning.safe_text import markdown_text

DOWNSAMPLED = "downsample"
"""Name of the method that reads a smaller image."""

ABOUT = """\
# {name}, difficult questions

At each budget only the questions that the unpruned model answers better than it does from an image made smaller to as
many tokens (the method *downsample*): the others need none of the methods. Without right answers those are compared on
that the two answer differently. The unpruned model is right on them by selection, and *downsample* is wrong.

"""


def difficult(comparison: Comparison, keep: int | float) -> Comparison | None:
    """Return the comparison at a budget on its difficult questions; None: no such question, or nothing downsampled."""
    full, *others = comparison.results
    at = [result for result in others if result.at == repr(keep)]
    smaller = [result for result in at if result.method == DOWNSAMPLED]
    if not smaller:
        return None
    (small,) = smaller
    worse = small.same == 0 if full.score is None or small.score is None else small.score < full.score
    if not worse.any():
        return None
    chosen = [
        replace(one, score=None if one.score is None else one.score[worse], same=one.same[worse], figures={})
        for one in (full, *at)
    ]
    images = [comparison.images[place] for place in np.flatnonzero(worse).tolist()]
    return Comparison(images, comparison.reference, chosen)


def difficult_tables(name: str, comparison: Comparison, controls: Mapping[str, bool]) -> list[ModelTable]:
    """Return a table of each budget's difficult questions; budgets without any are left out.

    Args:
        name: name of the model.
        comparison: the comparison on all questions, the unpruned model's result first.
        controls: titles of controls, as `ModelTable.of` takes them.
    """
    budgets = {one.at: one.keep for one in comparison.results if one.keep is not None}.values()
    found = [own for keep in budgets if (own := difficult(comparison, keep)) is not None]
    return [ModelTable.of(name, about(own), own, controls, {}) for own in found]


def difficult_page(tables: Sequence[ModelTable]) -> str:
    """Return the tables of `difficult_tables`, at least one, as Markdown."""
    head = ABOUT.format(name=markdown_text(tables[0].name))
    (budgets,) = zip(*(table.budgets for table in tables), strict=True)
    parts = zip(budgets, tables, strict=True)
    return head + "\n".join(f"## keep {keep}\n\n{table.about}\n\n{table.of_budget(keep)}" for keep, table in parts)
