"""A small submission, as a run of a sweep would give it."""

from datetime import date
from pathlib import Path

import numpy as np

from catp_lightning.evaluation.comparison import Comparison, Result
from catp_lightning.evaluation.league import Submission, written
from catp_lightning.evaluation.sweep.table import ModelTable
from catp_lightning.policy import PruningPolicy

SETTINGS = {"data": "0123456789abcdef", "weights": "fedcba", "versions": {"torch": "2.14", "transformers": "5.23"}}


def table(method: str = "calibrated") -> ModelTable:
    """The table of a method at two budgets, and of a control at one, on eight questions."""
    score = np.array([1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0, 1.0])
    results = [
        Result("no pruning", None, score, np.ones(8), 32.0, prices={"prefill_flops": 1.0}, seconds=4.0),
        Result(method, 0.5, score, np.ones(8), 16.0, prices={"prefill_flops": 0.6}, seconds=3.0),
        Result(method, 0.25, score * 0.5, np.ones(8), 8.0, tokens_per_layer=20.0, seconds=3.0),
        Result("stride", 0.25, score * 0.25, np.ones(8) / 2, 8.0, figures={"pope_f1": 0.75}),
    ]
    comparison = Comparison(range(8), method, results)
    notes = {"fastervlm": "There is no [CLS] token."}
    return ModelTable.of("digits_blip2", "8 questions about 8 images.", comparison, {"stride": False}, notes, SETTINGS)


def submitted(folder: Path, results: Path, method: str = "calibrated") -> Path:
    """Write the submission of that table into a folder, with policies from another; returns its own folder."""
    for keep in (0.5, 0.25):
        PruningPolicy("l2-norm", keep=keep).save(results / f"policies/calibrated/keep-{keep}.json")
    PruningPolicy("stride", keep=0.25).save(results / "policies/calibrated-draw-2/keep-0.25.json")
    submission = Submission.of(table(method), "digits-blip2", "digits", "two cores", date(2026, 1, 31))
    return written(submission, results, folder)
