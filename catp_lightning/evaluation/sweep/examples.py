"""Examples for a sweep's page: questions asked again under methods of the table, with what these keep of the images."""

import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

from catp_lightning.calibration.report.questions import decoded
from catp_lightning.callbacks.calibration_examples import wanted_samples
from catp_lightning.callbacks.token_pruning import TokenPruning
from catp_lightning.evaluation.sweep.jobs import Outcome
from catp_lightning.evaluation.sweep.methods import Job
from catp_lightning.evaluation.sweep.reading import Reading
from catp_lightning.models import Family
from catp_lightning.pages import Example
from catp_lightning.plots import kept_tokens
from catp_lightning.policy import PruningPolicy
from catp_lightning.pruning.record import Prefill
from catp_lightning.utils.messages import rank_zero_warn

EACH = 2
"""Number of examples of a method at a budget whose answer is another one, and of those whose answer is the same."""

MOST = 32
"""Number of examples of a sweep on one model: each is drawn, in about 0.15 seconds."""


class Drawing(TokenPruning):
    """Pruning that draws what is kept of some samples, each while its batch is there.

    Args:
        policy: policy that prunes.
        guide: the model that guided methods read.
        rows: the samples to draw of each batch, by their place in it.

    Attributes:
        pictures: JPEG files by batch and row; samples without an image are left out.
    """

    def __init__(self, policy: PruningPolicy, guide: nn.Module | None, rows: Sequence[Collection[int]]) -> None:
        super().__init__(policy, guide=guide, log_images=sys.maxsize)  # more than any batch has
        self.rows, self.pictures = rows, dict[tuple[int, int], bytes]()

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        prefills: Sequence[Prefill] = self._loop.prefills if self._loop is not None else ()
        samples = [shown for prefill in prefills for shown in prefill.shown]
        if len(samples) == (len(outputs) if isinstance(outputs, list) else 1):
            for row in self.rows[batch_idx]:
                if samples[row].drawable:
                    self.pictures[batch_idx, row] = kept_tokens(samples[row]).jpeg()
        super().on_predict_batch_end(trainer, pl_module, outputs, batch, batch_idx, *args)
        self.shown.clear()  # nothing is held longer than its batch


def examples_of(
    reading: Reading,
    family: Family,
    batches: Sequence[Any],
    full: Outcome,
    outcomes: Mapping[Job, Outcome],
    reference: str,
    guide: Callable[[], nn.Module],
) -> list[Example]:
    """Ask questions again under the reference and the best other method of each budget; return what was kept.

    The answers are those of the table. If asking again fails there is a warning and no example.

    Args:
        reading: the model with its prediction loop.
        family: family of the model.
        batches: the compared questions.
        full: outcome of the unpruned model.
        outcomes: outcomes of the jobs.
        reference: title of the method that others are compared with.
        guide: returns the model that guided methods read.
    """
    shown = shown_jobs(full, outcomes, reference)
    each = min(EACH, max(1, MOST // (2 * len(shown))))
    try:
        return [
            example
            for job in shown
            for example in _of_job(reading, family, batches, full, outcomes[job], job, each, guide)
        ]
    except Exception as error:  # of any type: the user's step and data run again
        rank_zero_warn(f"The page shows no examples, for they failed ({type(error).__name__}: {error!s:.200}).")
        return []


def shown_jobs(full: Outcome, outcomes: Mapping[Job, Outcome], reference: str) -> list[Job]:
    """Return the reference and the other method that agrees most at each budget; of several draws the first."""
    found = []
    for budget in dict.fromkeys(map(_budget, outcomes)):
        own = [job for job in outcomes if _budget(job) == budget]
        found += [job for job in own if job.title == reference][:1]
        others = [job for job in own if job.title != reference]
        if others:
            found.append(max(others, key=lambda job: int(_agreed(full, outcomes[job]).sum())))
    return found


def _of_job(
    reading: Reading,
    family: Family,
    batches: Sequence[Any],
    full: Outcome,
    outcome: Outcome,
    job: Job,
    each: int,
    guide: Callable[[], nn.Module],
) -> list[Example]:
    """Return examples of one job, those with another answer first."""
    ends = np.cumsum([0, *full.batches]).tolist()
    agreed = _agreed(full, outcome)
    places = [torch.arange(first, end, dtype=torch.int64, device="cpu") for first, end in pairwise(ends)]
    wanted = wanted_samples(places, np.arange(len(agreed)), agreed, each)
    if not wanted:
        return []
    numbers = sorted(wanted)
    rows = [[place - ends[number] for place in wanted[number]] for number in numbers]
    drawing = Drawing(job.policy, guide() if job.guided else None, rows)
    loader: DataLoader[Any] = DataLoader([batches[number] for number in numbers], batch_size=None)  # type: ignore[arg-type]  # a list is enough
    reading.predict(loader, drawing)
    found = []
    for (at, row), picture in drawing.pictures.items():
        place, batch = ends[numbers[at]] + row, batches[numbers[at]]
        question = _question(reading, family, batch, row) or f"question {full.question_ids[place]}"
        texts = (question, full.answers[place], outcome.answers[place])
        found.append(Example(f"{job.title}, {_budget(job)}", bool(agreed[place]), *texts, picture))
    return sorted(found, key=lambda example: example.agrees)


def _budget(job: Job) -> str:
    return f"keep {job.policy.keep}" if job.price is None else str(job.price)


def _agreed(full: Outcome, outcome: Outcome) -> np.ndarray:
    """Return whether each answer is the unpruned model's: bool [N]."""
    return np.array([one == other for one, other in zip(outcome.answers, full.answers, strict=True)])


def _question(reading: Reading, family: Family, batch: Any, row: int) -> str:
    """Return the text of a batch's prompt as its tokenizer decodes it, without visual tokens; "" if it is not there."""
    inputs = batch.get("inputs", batch) if isinstance(batch, Mapping) else {}
    ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else None
    if not isinstance(ids, torch.Tensor):
        return ""
    text = [number for number in ids[row].tolist() if number not in family.placeholder_ids]
    try:
        return decoded((reading.module, family.model), text).strip()
    except Exception:  # any tokenizer may raise anything
        return ""
