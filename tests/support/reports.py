"""Policies that carry what a real calibration measured."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes

from catp_lightning import PruningPolicy
from catp_lightning.calibration.report.report import report
from catp_lightning.callbacks import CrossAttentionCalibration
from tests.support.calibrations import QUICK, data
from tests.support.models import faint_blip2, greedily
from tests.support.modules import Generating
from tests.support.trainers import loading, trainer


def calibrated(path: Path, **settings: Any) -> list[PruningPolicy]:
    """By a real calibration of a small model."""
    callback = CrossAttentionCalibration(path, settings=QUICK, **settings)
    trainer(callback).predict(Generating(faint_blip2(0.2), greedily(1)), loading(data(48, 24)))
    return callback.policies


def unreported(patch: pytest.MonkeyPatch) -> None:
    """Let calibrations write no report, and answer nothing again for its examples."""
    for part in ("report", "examples_of"):
        patch.setattr(f"catp_lightning.callbacks.calibration.{part}", lambda *_: [])


def write(policies: Sequence[PruningPolicy], folder: Path, *more: Any) -> tuple[list[str], str]:
    """The three lines, and the page."""
    lines = report(policies, [], folder, [], 12.34, *more)
    return lines, (folder / "report.md").read_text()


def tables(page: str, heading: str) -> list[list[str]]:
    """The rows of the table under a heading; every row must have as many cells as the header."""
    section = page.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in section.split("\n") if line.startswith("|")]
    assert set(rows[1]) == {"---"} and {len(row) for row in rows} == {len(rows[0])}
    return rows[2:]


def with_evidence(policy: PruningPolicy, **changes: Any) -> PruningPolicy:
    return replace(policy, evidence={**policy.evidence, **changes})


def with_heads(policy: PruningPolicy) -> PruningPolicy:
    """As if probes had found layer 1 and three of its heads."""
    found = {
        "layers": [1],
        "layer_steps": [{"layer": 1, "explained": 0.0321, "error": 0.0043}],
        "layer_stability": [0.2, 0.8],
        "head_weights": [[0.25, 0.0, -0.5, 0.125]],
        "head_stability": [[0.6, 0.0, 1.0, 0.8]],
        "explained": 0.0456,
        "explained_error": 0.0054,
        "strength": 0.2,
    }
    nothing = {"layers": [], "layer_steps": [], "layer_stability": [0.0, 0.0]}
    fitted = {"slots": policy.evidence["fitted"]["slots"], "cross-attention": found, "region-attention": nothing}
    return with_evidence(policy, fitted=fitted)


def lines_of(axes: Axes) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Points of every labelled line, with error bars or without."""
    drawn = {str(line.get_label()): line for line in axes.lines}
    drawn |= {str(bars.get_label()): bars.lines[0] for bars in axes.containers}
    return {name: line.get_data() for name, line in drawn.items() if not name.startswith("_")}
