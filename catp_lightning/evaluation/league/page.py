"""The page of the league: what methods reached, model by model, and the published settings that nobody has run yet."""

from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

from catp_lightning.evaluation.league.submission import Row, Submission
from catp_lightning.evaluation.recipes import Recipe
from catp_lightning.safe_text import Markdown, markdown_text
from catp_lightning.utils.markdown import markdown_table

HEAD = """\
# League

Every method, on the same questions of each data set. `catp league` writes this page from the folders in `league/`, and
a test holds it to them. How to add one: [evaluation.md](evaluation.md#a-row-of-the-league).

Accuracy is that of the data set's own rule, the mean over questions; figures that it reports beside that have columns
of their own. *Change* is accuracy minus the unpruned model's, paired by question. Intervals are 95% and resample images
and, where a method has several draws (calibrations, random seeds), those too. *Tokens* stay of a sample, *per layer* is
how many a layer of the language model reads; FLOPs are those of its prefill, in per cent of the unpruned model's,
without what choosing costs, a guide's reading too. *Seconds* are of the whole run on the machine that is named, and can
be compared only within a table, roughly. Policies of calibrated rows lie beside their submission. A method that does
not beat the controls is not ahead.
"""

OVERVIEW = """\
Accuracy in % of the unpruned model's, at equal budgets of tokens that stay. Methods that *pay more* drop them inside
the language model, whose first layers still read all, or keep more than their budget, as unions over heads do; the
tables below have the price. "-" where a method makes no sense.
"""


def league_page(submissions: Sequence[Submission], recipes: Sequence[Recipe]) -> str:
    """Return the page in Markdown, of all submissions and of the recipes' settings without one."""
    parts = [HEAD]
    if submissions:
        parts.append(f"## Overview\n\n{OVERVIEW}\n{_overview(submissions)}")
    parts += [_section(submission) for submission in submissions]
    if empty := [_empty(recipe, submissions) for recipe in recipes if _open_tasks(recipe, submissions)]:
        head = "## Published settings without a submission\n\n"
        told = (
            "`catp recipe show NAME` has the settings. Figures are what was published, by others; an empty row waits "
            "for a submission.\n"
        )
        parts.append(head + told + "".join(f"\n{text}" for text in empty))
    return "\n".join(parts)


def league_json(submissions: Sequence[Submission], recipes: Sequence[Recipe]) -> dict[str, Any]:
    """Return the same as plain JSON types."""
    return {
        "submissions": [submission.to_json() for submission in submissions],
        "open": [
            {"recipe": recipe.name, "model": recipe.model["model"], "task": task, "keep": list(recipe.keep)}
            for recipe in recipes
            for task in _open_tasks(recipe, submissions)
        ],
    }


def _overview(submissions: Sequence[Submission]) -> str:
    columns = [(one, keep) for one in submissions for keep in _budgets(one)]
    methods = dict.fromkeys(row.method for one in submissions for row in one.rows[1:])
    lines = []
    for method in methods:
        values = [_share(next((row for row in _at(one, keep) if row.method == method), None)) for one, keep in columns]
        known = [value for value in values if value is not None]
        cells = ["-" if value is None else f"{100 * value:.1f}" for value in values]
        more = any(_pays_more(row, one.rows) for one in submissions for row in one.rows if row.method == method)
        shown = f"{method} (pays more)" if more else method
        lines.append((len(known), sum(known) / max(1, len(known)), [shown, *cells]))
    lines.sort(key=lambda line: (-line[0], -line[1]))  # those that run everywhere first, the best of them first
    return markdown_table(["method", *(f"{one.model}, {one.data}, keep {keep}" for one, keep in columns)],
                          [cells for *_, cells in lines])  # fmt: skip


def _pays_more(row: Row, rows: Sequence[Row]) -> bool:
    """True if layers read over 5% more tokens of a method than of the cheapest at the same budget."""
    least = min(other.tokens_per_layer for other in rows if repr(other.keep) == repr(row.keep))
    return row.tokens_per_layer > 1.05 * least


def _share(row: Row | None) -> float | None:
    return None if row is None else row.agreement if row.accuracy is None else row.accuracy_share


def _section(submission: Submission) -> str:
    facts = [
        f"{submission.about} Recipe {submission.recipe}, task {submission.task}.",
        f"{submission.date}, {submission.machine}; {', '.join(submission.versions)}; data {submission.digest}.",
    ]
    parts = [f"## {markdown_text(submission.model)}, {markdown_text(submission.data)}\n", *map(markdown_text, facts)]
    for keep in _budgets(submission):
        parts.append(f"\n### keep {keep}, {markdown_text(submission.model)}, {markdown_text(submission.data)}\n")
        parts.append(_table([submission.rows[0], *_at(submission, keep)]))
    return "\n".join(parts)


def _budgets(submission: Submission) -> list[int | float]:
    return list({repr(row.keep): row.keep for row in submission.rows if row.keep is not None}.values())


def _at(submission: Submission, keep: int | float) -> list[Row]:
    """Return the rows of a budget, the best first."""
    rows = [row for row in submission.rows if repr(row.keep) == repr(keep)]
    return sorted(rows, key=lambda row: -(row.agreement if row.accuracy is None else row.accuracy))


def _table(rows: Sequence[Row]) -> str:
    measured = rows[0].accuracy is not None
    figures = [figure.name for figure in rows[0].figures]
    optional = [name for name in ("prefill_flops", "prefill_seconds", "seconds")
                if any(getattr(row, name) is not None for row in rows)]  # fmt: skip
    heads = {"prefill_flops": "FLOPs %", "prefill_seconds": "prefill time %", "seconds": "seconds"}
    head = ["method", *(["accuracy (95%)", "% of unpruned", "change (95%)"] if measured else ["agreement (95%)"])]
    head += [*figures, "tokens", "per layer", *(heads[name] for name in optional)]
    return markdown_table(head, [_cells(row, measured, figures, optional) for row in rows])


def _cells(row: Row, measured: bool, figures: Sequence[str], optional: Sequence[str]) -> list[str]:
    title = markdown_text(row.method)
    cells: list[str] = [Markdown(f"{title} (control)") if row.control else title]
    if measured:
        change = _interval(row.accuracy_change, row.accuracy_change_interval, "+")
        cells += [_interval(row.accuracy, row.accuracy_interval), _percent(row.accuracy_share), change]
    else:
        cells.append(_interval(row.agreement, row.agreement_interval))
    own = {figure.name: figure.value for figure in row.figures}
    cells += [f"{own[name]:.{3 if own[name] <= 1 else 1}f}" if name in own else "" for name in figures]
    cells += [f"{row.tokens:.1f}", f"{row.tokens_per_layer:.1f}"]
    for name in optional:
        value = getattr(row, name)
        cells.append("" if value is None else f"{value:.1f}" if name == "seconds" else _percent(value))
    return cells


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def _interval(value: float | None, interval: Sequence[float] | None, sign: str = "") -> str:
    if value is None or interval is None:
        return ""
    return f"{value:{sign}.3f} ({interval[0]:{sign}.3f} to {interval[1]:{sign}.3f})"


def _open_tasks(recipe: Recipe, submissions: Sequence[Submission]) -> list[str]:
    """Return the tasks of a recipe that no submission is of; one of another model, with --model, does not count."""
    model = PurePosixPath(recipe.model["model"]).name
    done = {one.task for one in submissions if (one.recipe, one.model) == (recipe.name, model)}
    return [task.name for task in recipe.tasks if task.name not in done]


def _empty(recipe: Recipe, submissions: Sequence[Submission]) -> str:
    """Return the table of a recipe: what was published, and an empty row for each task that nobody has run."""
    head = ["setting", *(f"keep {keep}" for keep in recipe.keep)]
    lines = []
    for one in recipe.published:
        known = {repr(keep): value for keep, value in one.known.items()}
        cells = [f"{known[repr(keep)]:.2f}" if repr(keep) in known else "" for keep in recipe.keep]
        whole = f", unpruned {known['1.0']:.2f}" if "1.0" in known else ""
        if any(cells) or whole:
            lines.append([f"published: {one.method}, {one.task}, {one.measure}{whole} ({one.source})", *cells])
    lines += [[task, *([""] * len(recipe.keep))] for task in _open_tasks(recipe, submissions)]
    about = markdown_text(f"{recipe.about}: {recipe.model['model']}.")
    text = f"### {markdown_text(recipe.name)}\n\n{about}\n\n"
    return text + markdown_table(head, lines)
