"""Tables of a sweep: one for each model, with a part for each budget, and one for several models."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from rich.table import Table

from catp_lightning.evaluation.comparison import Comparison, Measure
from catp_lightning.pages import Example
from catp_lightning.safe_text import Markdown, markdown_text, rich_text
from catp_lightning.utils.markdown import markdown_table

Row = Mapping[str, Any]

READING = """\
Intervals are 95% and resample images and, where a method has several draws (calibrations on different data, random
seeds), those too; *over draws* is their standard deviation and range. Agreement is with the answers of the unpruned
model. Tokens are those that stay of a sample; where they leave inside the decoder the table adds how many a layer
reads, the mean over its layers. *Ahead* is how far the reference is ahead in agreement, paired by question. The best
method stands first. A method that does not beat the controls is not ahead.
"""


@dataclass(frozen=True)
class ModelTable:
    """Table of a sweep's results on one model.

    Attributes:
        name: name of the model.
        about: number of questions and images, in a line.
        reference: the title of the method that the others are compared with.
        rows: rows of `Comparison.rows`, the unpruned model's first, with `control`, `published` (True if a control is
            a published rule as well) and, where accuracy was measured, `accuracy_share`, the accuracy as a share of
            the unpruned model's; None if that is 0.
        notes: by title, why a method is not in the table.
        settings: settings that the answers depend on beside the policies: versions, checksums of weights and data.
        examples: questions with what is kept of their images, for the page of HTML.
    """

    name: str
    about: str
    reference: str
    rows: Sequence[Row]
    notes: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    examples: Sequence[Example] = ()

    @classmethod
    def of(
        cls,
        name: str,
        about: str,
        comparison: Comparison,
        controls: Mapping[str, bool],
        notes: Mapping[str, str],
        settings: Mapping[str, Any] | None = None,
        examples: Sequence[Example] = (),
    ) -> Self:
        """Return the table of a comparison whose first result is the unpruned model's.

        `controls` has an entry for each control, by title: True if it is a published rule as well.
        """
        rows: list[Row] = [
            {**row, "control": row["method"] in controls, "published": controls.get(row["method"], False)}
            for row in comparison.rows()
        ]
        if (best := rows[0].get("accuracy")) is not None:
            rows = [{**row, "accuracy_share": row["accuracy"] / best if best else None} for row in rows]
        return cls(name, about, comparison.reference, rows, notes, settings or {}, examples)

    @property
    def budgets(self) -> list[int | float]:
        return list({repr(row["keep"]): row["keep"] for row in self.rows if row["keep"] is not None}.values())

    def heading(self, keep: int | float) -> str:
        """Return a budget as text."""
        return f"keep {keep}"

    @property
    def measured(self) -> bool:
        """True if the data has right answers, so that accuracy was measured."""
        return "accuracy" in self.rows[0]

    @property
    def figures(self) -> list[str]:
        """Names of the figures that the data set reports beside accuracy, `pope_f1` and its like."""
        return list(self.rows[0].get("figures", {}))

    def at(self, keep: int | float) -> list[Row]:
        """Return the rows of a budget, the best first, below the unpruned model's row."""
        rows = [row for row in self.rows if repr(row["keep"]) == repr(keep)]  # 1 and 1.0 are two budgets
        measure = "accuracy" if self.measured else "agreement"
        return [self.rows[0], *sorted(rows, key=lambda row: -row[measure])]

    def markdown(self) -> str:
        head = f"# {markdown_text(self.name)}\n\n{markdown_text(self.about)}"
        parts = [f"{head} The reference is *{markdown_text(self.reference)}*.\n\n{READING}"]
        parts += [f"## keep {keep}\n\n{self.of_budget(keep)}" for keep in self.budgets]
        if ratios := self.ratios():
            parts.append(f"## Calibrated over self-attention\n\n{ratios}")
        if self.notes:
            parts.append(f"## Not in the table\n\n{self._reasons()}")
        return "\n".join(parts)

    def console(self) -> list[Table]:
        """Return a table for the terminal for each budget, with the columns that fit there."""
        tables = []
        for keep in self.budgets:
            head = ["method", *(["accuracy"] if self.measured else []), "agreement (95%)", "tokens"]
            table = Table(*head, title=f"keep {keep}", title_justify="left")
            for row in self.at(keep):
                accuracy = [f"{row['accuracy']:.3f}"] if self.measured else []
                cells = [*accuracy, interval(row, "agreement"), f"{row['tokens']:.1f}"]
                style = "bold" if row["method"] == self.reference else None
                table.add_row(rich_text(row["method"] + kind(row)), *cells, style=style)
            tables.append(table)
        return tables

    def _reasons(self) -> str:
        """Return a Markdown list of why methods are not in the table, grouped by reason."""
        titles: dict[str, list[str]] = {}
        for title, why in self.notes.items():
            titles.setdefault(why, []).append(title)
        lines = (f"{', '.join(several)}: {why}" for why, several in titles.items())
        return "".join(f"- {markdown_text(line)}\n" for line in lines)

    def of_budget(self, keep: int | float) -> str:
        """Return the Markdown table of a budget."""
        rows = self.at(keep)
        inside = any("tokens_per_layer" in row for row in rows)
        head = ["method", *(["accuracy (95%)", "% of unpruned"] if self.measured else []), *self.figures]
        head += ["agreement (95%)", "tokens"]
        head += ["tokens per layer"] if inside else []
        head += ["agreement over draws"] if any("agreement_draws" in row for row in self.rows) else []
        head.append("ahead (95%)")
        return markdown_table(head, [self._cells(row, inside) for row in rows])

    def _cells(self, row: Row, inside: bool) -> list[str]:
        title = markdown_text(row["method"])
        title = Markdown(f"**{title}**") if row["method"] == self.reference else title
        cells: list[str] = [Markdown(f"{title}{kind(row)}")]
        if self.measured:
            cells += [interval(row, "accuracy"), share(row), *(figure_text(row, name) for name in self.figures)]
        cells += [interval(row, "agreement"), f"{row['tokens']:.1f}"]
        if inside:
            cells.append(f"{row.get('tokens_per_layer', row['tokens']):.1f}")
        if any("agreement_draws" in row for row in self.rows):
            cells.append(over_draws(row, "agreement"))
        return [*cells, interval(row, "reference_ahead", "+") if "reference_ahead" in row else ""]

    def ratios(self) -> str:
        """Return a Markdown table of calibrated accuracy over that of self-attention pruning; "" if there is none.

        The ratio is the headline measure of CATP, arXiv 2404.08567.
        """
        lines = []
        for keep in self.budgets:
            found = {row["method"]: row.get("accuracy") for row in self.at(keep)}
            ours, other = found.get("calibrated"), found.get("self-attention")
            if ours is not None and other:
                lines.append([keep, f"{ours:.3f}", f"{other:.3f}", f"{ours / other:.2f}"])
        return markdown_table(["keep", "calibrated", "self-attention", "ratio"], lines) if lines else ""

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.name,
            "about": self.about,
            "reference": self.reference,
            "rows": [dict(row) for row in self.rows],
            "notes": dict(self.notes),
            "settings": dict(self.settings),
        }


def combined(tables: Sequence[ModelTable]) -> str:
    """Return a Markdown table of several models, a row for each method, a column for each model and budget.

    Cells are accuracy as a share of the unpruned model's, or agreement where accuracy was not measured.
    """
    columns = [(table, keep) for table in tables for keep in table.budgets]
    methods = dict.fromkeys(row["method"] for table in tables for row in table.rows[1:])
    kinds = {row["method"]: kind(row) for table in tables for row in table.rows}
    lines = []
    for method in methods:
        cells = [method + kinds[method]]
        for table, keep in columns:
            row = next((row for row in table.at(keep)[1:] if row["method"] == method), None)
            cells.append("-" if row is None else share(row))
        lines.append(cells)
    head = ["method", *(f"{table.name}, {table.heading(keep)}" for table, keep in columns)]
    about = (
        "# All models\n\nAccuracy in % of the unpruned model's (agreement with its answers where the data has no right "
        "ones); - where a method\nmakes no sense on a model. Intervals and reasons are in each model's own table.\n\n"
    )
    return about + markdown_table(head, lines)


def kind(row: Row) -> str:
    """Return the text that marks a control behind its name; "" for other methods."""
    if not row["control"]:
        return ""
    return " (published, also a control)" if row.get("published") else " (control)"


def share(row: Row) -> str:
    """Return accuracy in percent of the unpruned model's, or agreement in percent; "-" if that accuracy is 0."""
    value = row.get("accuracy_share", row["agreement"])
    return "-" if value is None else f"{100 * value:.1f}"


def figure_text(row: Row, name: str) -> str:
    """Return a figure of the data set as text: those up to 1 with three digits behind the point, others with one."""
    value = row["figures"].get(name)
    return "-" if value is None else f"{value:.3f}" if value <= 1 else f"{value:,.1f}"


def over_draws(row: Row, measure: Measure) -> str:
    """Return standard deviation and range of a row's draws as text; "" where there is one draw.

    >>> over_draws({"agreement_draws": [0.93, 0.95, 0.94]}, "agreement"), over_draws({}, "agreement")
    ('± 0.010 (0.930 to 0.950)', '')
    """
    draws = row.get(f"{measure}_draws", [])
    return f"± {np.std(draws, ddof=1):.3f} ({min(draws):.3f} to {max(draws):.3f})" if len(draws) > 1 else ""


def interval(row: Row, name: str, sign: str = "") -> str:
    """Return a figure of a row with its interval, as text."""
    low, high = row[f"{name}_interval"]
    return f"{row[name]:{sign}.3f} ({low:{sign}.3f} to {high:{sign}.3f})"
