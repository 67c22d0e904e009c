"""Tables of a sweep at equal prices: one for each model, with a part for each price."""

from typing import Any

from rich.table import Table

from catp_lightning.evaluation.sweep.table import ModelTable, Row, interval, kind, over_draws
from catp_lightning.pricing import COUNTED, Unit
from catp_lightning.safe_text import Markdown, markdown_text, rich_text
from catp_lightning.utils.markdown import markdown_table

READING = """\
At each price every method keeps as many tokens as the price buys, or drops all at the last layer that it allows: prices
are shares of what the unpruned model pays, the mean over the questions, and columns in % say what was really paid, of
each kind: visual tokens kept at the end, those that a layer reads (the mean over layers), FLOPs of the language model's
prefill, and bytes of its cache. What choosing costs is not in them. *Keeps* is the share of tokens that stays, and
where others leave; several are those of several draws. *At its best layer* is the layer that agrees best with the
unpruned model on the calibration questions. Intervals are 95% and resample images and, where a method has several draws
(calibrations on different data, random seeds), those too. Agreement is with the answers of the unpruned model. The last
column is how far the reference is ahead in agreement, paired by question: *ahead* where the whole interval is above 0,
*behind* where it is below, else *level*. The best method stands first.
"""
HEADS: dict[Unit, str] = {
    "tokens": "tokens %",
    "tokens_per_layer": "per layer %",
    "prefill_flops": "FLOPs %",
    "cache_bytes": "cache %",
}


class PricedTable(ModelTable):
    """Table of a sweep at equal prices; its rows have `budget`, `schedules` and `prices` in place of `keep`."""

    @property
    def budgets(self) -> list[dict[str, float]]:  # type: ignore[override]
        """Prices in the table, unit by unit, the largest first."""
        found = {(unit, share) for row in self.rows for unit, share in row.get("budget", {}).items()}
        return [{unit: share} for unit, share in sorted(found, key=lambda one: (COUNTED.index(one[0]), -one[1]))]

    def at(self, budget: Any) -> list[Row]:
        """Return the rows of a price, those that agree most first, below the unpruned model's row."""
        rows = [row for row in self.rows if row.get("budget") == budget]
        return [self.rows[0], *sorted(rows, key=lambda row: -row["agreement"])]

    def heading(self, budget: Any) -> str:
        ((unit, share),) = budget.items()
        return f"{share:g} of {unit}"

    def markdown(self) -> str:
        head = f"# {markdown_text(self.name)}, at equal prices\n\n{markdown_text(self.about)}"
        parts = [f"{head} The reference is *{markdown_text(self.reference)}*.\n\n{READING}"]
        parts += [f"## {self.heading(budget)}\n\n{self.of_budget(budget)}" for budget in self.budgets]
        if self.notes:
            parts.append(f"## Not in the table, or beside its price\n\n{self._reasons()}")
        return "\n".join(parts)

    def console(self) -> list[Table]:
        tables = []
        for budget in self.budgets:
            table = Table(
                "method", "keeps", "agreement (95%)", "paid", title=self.heading(budget), title_justify="left"
            )
            ((unit, _),) = budget.items()
            for row in self.at(budget):
                cells = [_keeps(row), interval(row, "agreement"), f"{row['prices'][unit]:.3f}"]
                style = "bold" if row["method"] == self.reference else None
                table.add_row(rich_text(row["method"] + kind(row)), *map(rich_text, cells), style=style)
            tables.append(table)
        return tables

    def ratios(self) -> str:
        return ""

    def of_budget(self, budget: Any) -> str:
        rows = self.at(budget)
        units = [unit for unit in COUNTED if unit in rows[0]["prices"]]
        drawn = any("agreement_draws" in row for row in self.rows)
        head = ["method", "keeps", "agreement (95%)", *(["over draws"] if drawn else []), *map(HEADS.get, units)]
        return markdown_table([*map(str, head), "reference (95%)"], [self._line(row, units, drawn) for row in rows])

    def _line(self, row: Row, units: list[Unit], drawn: bool) -> list[str]:
        title = markdown_text(row["method"])
        title = Markdown(f"**{title}**") if row["method"] == self.reference else title
        cells: list[str] = [Markdown(f"{title}{kind(row)}"), _keeps(row), interval(row, "agreement")]
        cells += [over_draws(row, "agreement")] if drawn else []
        cells += [f"{100 * row['prices'][unit]:.1f}" for unit in units]
        return [*cells, f"{interval(row, 'reference_ahead', '+')} {verdict(row)}" if "reference_ahead" in row else ""]


def _keeps(row: Row) -> str:
    return "; ".join(dict.fromkeys(row.get("schedules", ["all"])))


def verdict(row: Row) -> str:
    """Return "ahead", "level" or "behind": what a row's interval says of the reference.

    >>> verdict({"reference_ahead_interval": [0.01, 0.03]}), verdict({"reference_ahead_interval": [-0.01, 0.03]})
    ('ahead', 'level')
    """
    low, high = row["reference_ahead_interval"]
    return "ahead" if low > 0 else "behind" if high < 0 else "level"
