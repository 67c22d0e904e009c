"""Tables and verdicts of `benchmarks.shift`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.shift_replay import Replayed
from catp_lightning.evaluation.sweep.methods import CALIBRATED
from catp_lightning.safe_text import Markdown as MarkdownText
from catp_lightning.utils.markdown import markdown_table

BUDGETS: dict[str, tuple[float, ...]] = {
    "digits_blip2": (0.5, 0.25, 0.125, 0.0625),
    "digits_llava": (0.5, 0.25, 0.125, 0.05),
    "digits_mllama": (0.5, 0.25, 0.125, 0.05),
    "digits_qwen2_5_vl": (0.5, 0.25, 0.125, 0.05),
}
TITLES = {
    "digits_blip2": "BLIP-2",
    "digits_llava": "LLaVA",
    "digits_mllama": "Llama-3.2-Vision",
    "digits_qwen2_5_vl": "Qwen2.5-VL",
}
DIVERSE = "divprune"

# Requirements on the calibrated policy.
AIMS: dict[str, dict[float, float]] = {
    "digits_blip2": {0.5: 0.995, 0.25: 0.975, 0.125: 0.955, 0.0625: 0.88},
    "digits_llava": {0.125: 0.975, 0.05: 0.97},
    "digits_mllama": {0.5: 0.985, 0.25: 0.94, 0.125: 0.91, 0.05: 0.82},
}
"""Agreement that is asked for at a budget."""
NOT_BELOW = {"digits_llava": (DIVERSE, "grid")}
AHEAD = {
    "digits_llava": ((DIVERSE, "grid"), (0.125, 0.05)),
    "digits_mllama": (("l2-norm", DIVERSE), (0.25, 0.125, 0.05)),
}
"""Rivals that have to be beaten, and the budgets: the lower end of the paired interval is above 0."""
TOLERANCE = 0.003  # on NOT_BELOW, at every budget
SHIFT_TOLERANCE = 0.02  # on DivPrune under a shift, at 1/8 and at the smallest budget


@dataclass(frozen=True)
class Measured:
    """What was measured on a model.

    Attributes:
        model: its name.
        chosen: what calibration chose, for each draw and budget.
        settings: what was measured on each test set by its name, unshifted first.
        promise: budget that a promise chose, with the promise of its evidence; None: none was made.
    """

    model: str
    chosen: Sequence[Sequence[str]]
    settings: dict[str, Replayed]
    promise: tuple[int | float, Mapping[str, Any]] | None = None

    @property
    def budgets(self) -> tuple[float, ...]:
        return tuple(dict.fromkeys(keep for name, keep in self.plain.rows if name == CALIBRATED))

    @property
    def plain(self) -> Replayed:
        return next(iter(self.settings.values()))

    def to_dict(self) -> dict[str, Any]:
        settings = {name: found.to_dict() for name, found in self.settings.items()}
        return {"chosen": self.chosen, "promise": self.promise, "settings": settings}


def share(keep: float) -> str:
    """Return a budget as a fraction.

    >>> share(0.05)
    '1/20'
    """
    return f"1/{round(1 / keep)}"


def page(found: Sequence[Measured], about: str) -> str:
    """Return all verdicts and tables as Markdown."""
    judged = [[TITLES[model.model], *line] for model in found for line in verdicts(model)]
    text = f"# Calibrated policies, rivals and shifts\n\n{about} Means of draws; 95% intervals over images and draws.\n"
    text += "\n## Verdicts\n\n" + markdown_table(["model", "asked", "measured", "met"], judged)
    return text + "".join(_tables(model) for model in found)


def verdicts(model: Measured) -> list[list[str]]:
    """Return what is asked of a model, what was measured, and whether that is enough."""
    lines = []
    aims = AIMS.get(model.model, {})
    for keep in (keep for keep in aims if keep in model.budgets):
        aim, row = aims[keep], model.plain.rows[CALIBRATED, keep]
        lines.append([f"{share(keep)}: at least {aim}", agreement(row), _yes(row["agreement"] >= aim)])
    for rival in NOT_BELOW.get(model.model, ()):
        for keep in model.budgets:
            row = model.plain.rows[rival, keep]
            enough = row["reference_ahead"] >= -TOLERANCE
            lines.append([f"{share(keep)}: at most {TOLERANCE} below {rival}", ahead(row), _yes(enough)])
    rivals, budgets = AHEAD.get(model.model, ((), ()))
    for rival in rivals:
        for keep in (keep for keep in budgets if keep in model.budgets):
            row = model.plain.rows[rival, keep]
            enough = row["reference_ahead_interval"][0] > 0
            lines.append([f"{share(keep)}: ahead of {rival}", ahead(row), _yes(enough)])
    for name, setting in list(model.settings.items())[1:]:
        for keep in _judged(model):
            row = setting.rows[DIVERSE, keep]
            enough = row["reference_ahead"] >= -SHIFT_TOLERANCE
            asked = f"{name}, {share(keep)}: at most {SHIFT_TOLERANCE} below {DIVERSE}"
            lines.append([asked, ahead(row), _yes(enough)])
    return lines


def _tables(model: Measured) -> str:
    budgets, plain = model.budgets, model.plain
    shares = [share(keep) for keep in budgets]
    levels = [[name, *(agreement(plain.rows[name, keep]) for keep in budgets)] for name in (CALIBRATED, *plain.rivals)]
    behind = [[name, *(ahead(plain.rows[name, keep]) for keep in budgets)] for name in plain.rivals]
    kinds = [[kind, *(f"{of_kind[keep]:.3f}" for keep in budgets)] for kind, of_kind in plain.by_kind.items()]
    chosen = [[str(draw), *names] for draw, names in enumerate(model.chosen)]
    return (
        f"\n## {TITLES[model.model]}\n\nAgreement with the unpruned model, mean of draws:\n\n"
        + markdown_table(["method", *shares], levels)
        + "\nHow far calibrated is ahead, paired by question:\n\n"
        + markdown_table(["rival", *shares], behind)
        + "\nAgreement of calibrated by kind of question:\n\n"
        + markdown_table(["kind", *shares], kinds)
        + "\nUnder each shift:\n\n"
        + markdown_table(["setting", "keep", CALIBRATED, DIVERSE, "ahead", "best other rule"], _shifted(model))
        + "\nWhat calibration chose:\n\n"
        + markdown_table(["draw", *shares], chosen)
    )


def _shifted(model: Measured) -> list[list[str]]:
    lines = []
    for name, setting in model.settings.items():
        for keep in _judged(model):
            ours, diverse = setting.rows[CALIBRATED, keep], setting.rows[DIVERSE, keep]
            others = [setting.rows[rival, keep] for rival in setting.rivals if rival != DIVERSE]
            best = max(others, key=lambda row: float(row["agreement"]))
            shown = [agreement(ours), f"{diverse['agreement']:.3f}", ahead(diverse)]
            lines.append([name, share(keep), *shown, f"{best['method']} {best['agreement']:.3f}"])
    return lines


def _judged(model: Measured) -> list[float]:
    """Return the budgets at which a shift is judged: 1/8 and the smallest."""
    return [keep for keep in model.budgets if keep in (0.125, min(model.budgets))]


def agreement(row: dict[str, Any]) -> str:
    low, high = row["agreement_interval"]
    return f"{row['agreement']:.3f} ({low:.3f} to {high:.3f})"


def ahead(row: dict[str, Any]) -> str:
    low, high = row["reference_ahead_interval"]
    return f"{row['reference_ahead']:+.3f} ({low:+.3f} to {high:+.3f})"


def _yes(value: Any) -> str:
    return "yes" if value else MarkdownText("**no**")
