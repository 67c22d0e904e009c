"""What `benchmarks.agreement` asks of the calibrated policy, and whether it is met."""

from collections.abc import Mapping, Sequence
from typing import Any

from catp_lightning.evaluation.sweep.methods import CALIBRATED
from catp_lightning.safe_text import Markdown as MarkdownText
from catp_lightning.utils.markdown import markdown_table

BUDGETS = (0.5, 0.25, 0.125, 0.0625)
SHOWN = {
    "stride": "stride",
    "l2-norm": "L2 norm",
    "self-attention": "self-attention",
    "catp": "CATP, all layers",
    "catp weighted by image token": "CATP, image-token weights",
    "cross-attention": "mean log attention",
    "diversity of outputs": "diversity of outputs (plain DPP)",
    "diversity of cross-attention": "diversity of cross-attention (plain DPP)",
    "position": "position",
    "region-attention": "region attention",
}
"""Fixed rules of the table: names of candidates, and the names that the table shows."""
CONTROLS = ("random (3 seeds)", "stride", "L2 norm", "position", *(title for title in SHOWN.values() if "DPP" in title))
BEST = "CATP, best layer on calibration data"

# Requirements on the calibrated policy.
BEATEN = ("CATP, all layers", BEST, "self-attention", "L2 norm")
NOT_WORSE = ("random (3 seeds)", SHOWN["diversity of outputs"], SHOWN["diversity of cross-attention"])
CEILING = 0.99  # a rival this good need not be beaten
TOLERANCE = 0.005
BETTER_FROM = 0.125  # at this budget and below, rivals in NOT_WORSE have to be beaten
AIMS = dict(zip(BUDGETS, (0.995, 0.985, 0.95, 0.85), strict=True))


def met(row: Mapping[str, Any]) -> bool:
    """True if calibration is as far ahead of a rival as is required, by the lower end of the paired interval."""
    low: float = row["reference_ahead_interval"][0]
    if row["method"] in NOT_WORSE and row["keep"] > BETTER_FROM:
        return low >= -TOLERANCE
    return low > 0 or (row["method"] not in NOT_WORSE and bool(row["agreement"] >= CEILING))


def verdicts(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return as Markdown the aims, and for each rival and budget whether calibration is ahead as is required."""
    ours = {row["keep"]: row for row in rows if row["method"] == CALIBRATED}
    reached = [
        [f"{keep}", f"{aim}", _with_interval(ours[keep]), yes(ours[keep]["agreement"] >= aim)]
        for keep, aim in AIMS.items()
    ]
    rivals: dict[str, dict[float, str]] = {}
    for row in rows:
        if row["method"] != CALIBRATED:
            verdict = MarkdownText(f"{yes(met(row))} ({row['reference_ahead_interval'][0]:+.3f})")
            rivals.setdefault(row["method"], {})[row["keep"]] = verdict
    asked = {**dict.fromkeys(BEATEN, "ahead"), **dict.fromkeys(NOT_WORSE, "not worse")}
    order = [*asked, *(name for name in rivals if name not in asked)]
    lines = [[name, asked.get(name, "-"), *(rivals[name][keep] for keep in BUDGETS)] for name in order]
    return (
        "Aims:\n\n"
        + markdown_table(["keep", "aim", "calibrated, agreement (95%)", "reached"], reached)
        + f"\nIs *{CALIBRATED}* ahead? The lower end of the paired interval is in brackets. *ahead*: it is above "
        f"0, or the rival reaches {CEILING}. *not worse*: at least -{TOLERANCE}, and above 0 from keep {BETTER_FROM} "
        "down. Of the others nothing is asked; *yes* is then as for *ahead*.\n\n"
        + markdown_table(["rival", "asked", *(f"keep {keep}" for keep in BUDGETS)], lines)
    )


def _with_interval(row: Mapping[str, Any]) -> str:
    low, high = row["agreement_interval"]
    return f"{row['agreement']:.4f} ({low:.4f} to {high:.4f})"


def yes(value: Any) -> str:
    return "yes" if value else MarkdownText("**no**")
