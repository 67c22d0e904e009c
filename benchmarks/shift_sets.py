"""Tables of `benchmarks.shift` with a column for each test set, and what became of a promise on each."""

from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.shift_replay import PROMISED, RANDOM, Replayed
from benchmarks.shift_tables import DIVERSE, TITLES, Measured, agreement, ahead, share
from catp_lightning.calibration.report.controls import verdict
from catp_lightning.evaluation.sweep.methods import CALIBRATED
from catp_lightning.safe_text import Markdown
from catp_lightning.utils.markdown import markdown_table


def sets_page(found: Sequence[Measured], about: str) -> str:
    """Return a section for each model, and the table of promises, as Markdown."""
    text = f"# Under a shift\n\n{about} Means of draws; 95% intervals over images and draws.\n"
    text += "".join(_section(model) for model in found)
    if any(model.promise is not None for model in found):
        text += f"\n## What a promise became\n\n{_promises(found)}"
    return text


def _section(model: Measured) -> str:
    sets, found = list(model.settings), list(model.settings.values())
    told = [
        ["unpruned model, accuracy", *(f"{each.accuracy:.3f}" for each in found)],
        ["agreement of an answer that sees nothing", *(f"{each.blind:.3f}" for each in found)],
    ]
    right = [
        [share(keep), name, *(_right(each, name, keep) for each in found)]
        for keep in model.budgets
        for name in (CALIBRATED, DIVERSE, RANDOM)
    ]
    behind = list(_behind(model))
    lost = markdown_table(["set", "keep", "rule", "calibrated ahead"], behind) if behind else "There is none.\n"
    text = f"\n## {TITLES[model.model]}\n\n" + markdown_table(["", *sets], told)
    for keep in model.budgets:
        table = markdown_table(["method", *sets, "tokens a layer reads"], list(_levels(model, keep)))
        text += f"\nAgreement with the unpruned model at {share(keep)}:\n\n{table}"
    return (
        text
        + "\nAgreement where the unpruned answer is right:\n\n"
        + markdown_table(["keep", "method", *sets], right)
        + "\nCalibrated and the best other rule that costs no more, which is taken from these very answers:\n\n"
        + markdown_table(["set", "keep", CALIBRATED, "best other rule", "calibrated ahead"], list(_best(model)))
        + f"\nEvery rule that costs no more and that calibrated is behind, by the interval:\n\n{lost}"
    )


def _levels(model: Measured, keep: float) -> Iterator[list[str]]:
    """Yield a row for each method, best first on scenes as calibrated; those that cost more come last."""
    plain = model.plain
    dearer = [name for name in plain.dearer if (name, keep) in plain.rows]
    groups = ((CALIBRATED, *plain.rivals), dearer)
    for name in (name for group in groups for name in sorted(group, key=lambda name: -_level(plain, name, keep))):
        cells = [agreement(found.rows[name, keep]) for found in model.settings.values()]
        title = Markdown(f"**{name}**") if name == CALIBRATED else name
        yield [title, *cells, f"{plain.rows[name, keep]['tokens_per_layer']:.1f}"]


def _level(found: Replayed, name: str, keep: float) -> float:
    return float(found.rows[name, keep]["agreement"])


def _right(found: Replayed, name: str, keep: float) -> str:
    right = found.where_right(name, keep)
    return "" if right is None else f"{right:.3f}"


def _best(model: Measured) -> Iterator[list[str]]:
    for name, found in model.settings.items():
        for keep in model.budgets:
            best = max(found.rivals, key=lambda rival: _level(found, rival, keep))
            row = found.rows[best, keep]
            shown = [agreement(found.rows[CALIBRATED, keep]), f"{best} {row['agreement']:.3f}", _judged(row)]
            yield [name, share(keep), *shown]


def _behind(model: Measured) -> Iterator[list[str]]:
    for name, found in model.settings.items():
        for keep in model.budgets:
            rows = [found.rows[rival, keep] for rival in found.rivals]
            lost = [row for row in rows if verdict(row["reference_ahead_interval"]) == "behind"]
            for row in sorted(lost, key=lambda row: float(row["reference_ahead"])):
                yield [name, share(keep), row["method"], ahead(row)]


def _judged(row: dict[str, Any]) -> str:
    return f"{ahead(row)} {verdict(row['reference_ahead_interval'])}"


def _promises(found: Sequence[Measured]) -> str:
    lines = []
    for model in found:
        if model.promise is None:
            continue
        keep, promise = model.promise
        step = next((step for step in promise["steps"] if step["keep"] == keep), None)
        seen = "" if step is None else f"{step['disagreed']} of {promise['images']}, at most {step['bound']:.3f}"
        cells = [_disagreement(found_on.rows[PROMISED, keep]) for found_on in model.settings.values()]
        lines.append([TITLES[model.model], f"{promise['max_disagreement']:.0%}", f"{keep:g}", seen, *cells])
    sets = next(model for model in found if model.promise is not None).settings
    return markdown_table(["model", "promised", "keep", "tested by calibration", *sets], lines)


def _disagreement(row: dict[str, Any]) -> str:
    low, high = row["agreement_interval"]
    return f"{1 - row['agreement']:.3f} ({1 - high:.3f} to {1 - low:.3f})"
