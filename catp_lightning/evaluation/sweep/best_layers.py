"""Methods that drop tokens at one layer of the decoder, at the layer that is best on the calibration split."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from catp_lightning.errors import PolicyError, PruningError
from catp_lightning.evaluation.sweep.jobs import Jobs
from catp_lightning.evaluation.sweep.methods import Job
from catp_lightning.evaluation.sweep.prices import Price, Solver
from catp_lightning.models import Family
from catp_lightning.utils.progress import Lines


def chooses_layer(job: Job, family: Family) -> bool:
    """True if a job drops some tokens at one layer that its policy names."""
    return (
        "layer" in job.policy.scorer_args
        and job.policy.scorer != "visual-exit"
        and bool(job.policy.build_scorer().stages(family.depth))
    )


def at_best_layers(
    jobs: Sequence[Job],
    prices: Sequence[Price],
    solver: Solver,
    runner: Jobs,
    notes: dict[str, str],
    doing: str,
    lines: Lines,
) -> list[Job]:
    """Return each method's job at its best layer, for each price.

    The best layer is that whose answers are most often the unpruned model's on the questions of `runner`, at what is
    kept for the price; of equal ones the first.

    Args:
        jobs: one job for each layer of each method.
        prices: the prices.
        solver: finds what is kept for a price at each layer.
        runner: answers questions of the calibration split.
        notes: gets the reason why a method has no layer at which it can pay a price.
        doing: what is being done, for `lines`.
        lines: progress lines.
    """
    found = []
    for scorer in dict.fromkeys(job.policy.scorer for job in jobs):
        title = f"{scorer} at its best layer"
        for price in prices:
            several = [job for job in jobs if job.policy.scorer == scorer]
            paying = [
                replace(job, policy=policy, price=price)
                for job in several
                if (policy := solver.solve(job.policy, price)) is not None
            ]
            if not paying:
                notes[f"{title} at {price}"] = solver.why_not(*(job.policy for job in several), price=price)
                continue
            agreements = []
            for number, job in enumerate(paying, 1):
                lines.now = f"{doing}: {job.name} at {price}, {number} of {len(paying)}"
                agreements.append(_agreement(job, runner) if len(paying) > 1 else 1.0)
            found.append(replace(paying[int(np.argmax(agreements))], title=title))
    return found


def _agreement(job: Job, runner: Jobs) -> float:
    """Return the share of a job's answers that are the unpruned model's; -1.0 if the model refuses the job."""
    full = runner.finished(None) or runner.run(None)
    try:
        outcome = runner.finished(job) or runner.run(job)
    except (PruningError, PolicyError):
        return -1.0
    return float(np.mean([one == other for one, other in zip(outcome.answers, full.answers, strict=True)]))
