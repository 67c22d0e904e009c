"""Tables and verdicts of `benchmarks.shift`."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from catp_lightning.evaluation.comparison import Comparison, Result
from catp_lightning.evaluation.sweep.methods import CALIBRATED
from catp_lightning.safe_text import Markdown as MarkdownText
from catp_lightning.utils.markdown import markdown_table

BUDGETS: dict[str, tuple[float, ...]] = {
    "digits_blip2": (0.5, 0.25, 0.125, 0.0625),
    "digits_llava": (0.5, 0.25, 0.125, 0.05),
    "digits_mllama": (0.5, 0.25, 0.125, 0.05),
    "digits_qwen2_5_vl": (0.5, 0.25, 0.125, 0.05),
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
class Replayed:
    """Agreement of J policies on N questions.

    Attributes:
        names, keeps: name and budget of each policy; policies of one name and budget are draws of one method.
        same: bool [J, N], True where a policy's answer is the unpruned one.
        tokens: mean number of visual tokens that each policy keeps.
        images: [N], the image that each question is about.
        kinds: [N], the kind of each question.
    """

    names: Sequence[str]
    keeps: Sequence[int | float]
    same: np.ndarray
    tokens: Sequence[float]
    images: Sequence[int]
    kinds: Sequence[str]

    @cached_property
    def rows(self) -> dict[tuple[str, int | float], dict[str, Any]]:
        """A row of `Comparison.rows` for each method and budget."""
        jobs = zip(self.names, self.keeps, self.same.astype(float), self.tokens, strict=True)
        results = [Result(name, keep, None, same, tokens) for name, keep, same, tokens in jobs]
        return {(row["method"], row["keep"]): row for row in Comparison(self.images, CALIBRATED, results).rows()}

    @cached_property
    def rivals(self) -> list[str]:
        return [name for name in dict.fromkeys(self.names) if name != CALIBRATED]

    @cached_property
    def by_kind(self) -> dict[str, dict[int | float, float]]:
        """Agreement of the calibrated policies on each kind of question at each budget, mean of draws."""
        ours = np.array([name == CALIBRATED for name in self.names])
        keeps, kinds = np.array(self.keeps), np.array(self.kinds)
        return {
            kind: {
                keep: float(self.same[ours & (keeps == keep)][:, kinds == kind].mean())
                for keep in dict.fromkeys(self.keeps)
            }
            for kind in dict.fromkeys(self.kinds)
        }


@dataclass(frozen=True)
class Measured:
    """What was measured on a model: `chosen` names for each draw and budget, `settings` by name, unshifted first."""

    model: str
    chosen: Sequence[Sequence[str]]
    settings: dict[str, Replayed]

    @property
    def budgets(self) -> tuple[float, ...]:
        return BUDGETS[self.model]

    @property
    def plain(self) -> Replayed:
        return next(iter(self.settings.values()))

    def to_dict(self) -> dict[str, Any]:
        return {
            "chosen": self.chosen,
            "settings": {
                name: {"rows": list(found.rows.values()), "calibrated by kind": found.by_kind}
                for name, found in self.settings.items()
            },
        }


def share(keep: float) -> str:
    """Return a budget as a fraction.

    >>> share(0.05)
    '1/20'
    """
    return f"1/{round(1 / keep)}"


def page(found: Sequence[Measured], about: str) -> str:
    """Return all verdicts and tables as Markdown."""
    judged = [[model.model, *line] for model in found for line in verdicts(model)]
    text = f"# Calibrated policies, rivals and shifts\n\n{about} Means of draws; 95% intervals over images and draws.\n"
    text += "\n## Verdicts\n\n" + markdown_table(["model", "asked", "measured", "met"], judged)
    return text + "".join(_tables(model) for model in found)


def verdicts(model: Measured) -> list[list[str]]:
    """Return what is asked of a model, what was measured, and whether that is enough."""
    lines = []
    for keep, aim in AIMS.get(model.model, {}).items():
        row = model.plain.rows[CALIBRATED, keep]
        lines.append([f"{share(keep)}: at least {aim}", _agreement(row), _yes(row["agreement"] >= aim)])
    for rival in NOT_BELOW.get(model.model, ()):
        for keep in model.budgets:
            row = model.plain.rows[rival, keep]
            enough = row["reference_ahead"] >= -TOLERANCE
            lines.append([f"{share(keep)}: at most {TOLERANCE} below {rival}", _ahead(row), _yes(enough)])
    rivals, budgets = AHEAD.get(model.model, ((), ()))
    for rival in rivals:
        for keep in budgets:
            row = model.plain.rows[rival, keep]
            enough = row["reference_ahead_interval"][0] > 0
            lines.append([f"{share(keep)}: ahead of {rival}", _ahead(row), _yes(enough)])
    for name, setting in list(model.settings.items())[1:]:
        for keep in _judged(model):
            row = setting.rows[DIVERSE, keep]
            enough = row["reference_ahead"] >= -SHIFT_TOLERANCE
            asked = f"{name}, {share(keep)}: at most {SHIFT_TOLERANCE} below {DIVERSE}"
            lines.append([asked, _ahead(row), _yes(enough)])
    return lines


def _tables(model: Measured) -> str:
    budgets, plain = model.budgets, model.plain
    shares = [share(keep) for keep in budgets]
    levels = [[name, *(_agreement(plain.rows[name, keep]) for keep in budgets)] for name in (CALIBRATED, *plain.rivals)]
    ahead = [[name, *(_ahead(plain.rows[name, keep]) for keep in budgets)] for name in plain.rivals]
    kinds = [[kind, *(f"{of_kind[keep]:.3f}" for keep in budgets)] for kind, of_kind in plain.by_kind.items()]
    chosen = [[str(draw), *names] for draw, names in enumerate(model.chosen)]
    return (
        f"\n## {model.model}\n\nAgreement with the unpruned model, mean of draws:\n\n"
        + markdown_table(["method", *shares], levels)
        + "\nHow far calibrated is ahead, paired by question:\n\n"
        + markdown_table(["rival", *shares], ahead)
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
            shown = [_agreement(ours), f"{diverse['agreement']:.3f}", _ahead(diverse)]
            lines.append([name, share(keep), *shown, f"{best['method']} {best['agreement']:.3f}"])
    return lines


def _judged(model: Measured) -> tuple[float, float]:
    """Return the budgets at which a shift is judged: 1/8 and the smallest."""
    return 0.125, min(model.budgets)


def _agreement(row: dict[str, Any]) -> str:
    low, high = row["agreement_interval"]
    return f"{row['agreement']:.3f} ({low:.3f} to {high:.3f})"


def _ahead(row: dict[str, Any]) -> str:
    low, high = row["reference_ahead_interval"]
    return f"{row['reference_ahead']:+.3f} ({low:+.3f} to {high:+.3f})"


def _yes(value: Any) -> str:
    return "yes" if value else MarkdownText("**no**")
