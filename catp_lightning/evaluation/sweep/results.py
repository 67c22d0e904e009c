"""Jobs that are run, and their results, question by question, as a comparison takes them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import isnan
from typing import Any

import numpy as np
from rich.console import Console
from tqdm import tqdm

from catp_lightning.errors import PolicyError, PruningError
from catp_lightning.evaluation.comparison import Comparison, Result
from catp_lightning.evaluation.sweep.jobs import Jobs, Outcome
from catp_lightning.evaluation.sweep.methods import CALIBRATED, Job
from catp_lightning.evaluation.sweep.prices import schedule_text
from catp_lightning.metrics import vqa_score
from catp_lightning.metrics.benchmarks import BENCHMARKS, REPORTED
from catp_lightning.safe_text import one_line, rich_text
from catp_lightning.utils.progress import Lines, Pace, shows_bars

FULL = "no pruning"


def outcomes_of(
    jobs: Sequence[Job], runner: Jobs, notes: dict[str, str], name: str, console: Console, lines: Lines
) -> Iterator[tuple[Job, Outcome]]:
    """Yield each job with its outcome, reused or run now; a job that the model refuses when it runs becomes a note."""
    done = {job: outcome for job in jobs if (outcome := runner.finished(job)) is not None}
    if done:
        console.print(rich_text(f"{name} {len(done)} of {len(jobs)} jobs were finished by an earlier run."))
    pace, begun, todo = Pace(), 0, len(jobs) - len(done)
    with tqdm(total=len(jobs), initial=len(done), desc=one_line(name), disable=not shows_bars()) as bar:
        for number, job in enumerate(jobs, 1):
            if job not in done:
                left, begun = pace.left(name, begun, [todo]), begun + 1
                lines.now = f"{name} {number} of {len(jobs)} jobs{left}: {job.name}, keep {job.policy.keep}"
                bar.set_postfix_str(one_line(f"{job.name}, keep {job.policy.keep}"))
                try:  # another job of this run may have had the same policy
                    done[job] = runner.finished(job) or runner.run(job)
                except (PruningError, PolicyError) as error:
                    at = f", keep {job.policy.keep}" if job.price is None else f" at {job.price}"
                    notes[f"{job.title}{at}"] = str(error)
                bar.update()
            if job in done:
                yield job, done[job]


def comparison_of(
    full: Outcome, outcomes: Mapping[Job, Outcome], batches: Sequence[Any], reference: str, depth: int = 0
) -> Comparison:
    """Return the comparison of jobs, the unpruned model first.

    Args:
        full: outcome of the unpruned model.
        outcomes: outcomes of the jobs.
        batches: the questions.
        reference: title of the method that others are compared with.
        depth: number of the decoder's layers; only needed where jobs are to pay a price.
    """
    every = max(outcome.visual_tokens or 0.0 for outcome in outcomes.values())
    found = Comparison(_images(full, batches), reference, [_result(FULL, None, full, full, every, batches)])
    for job, outcome in outcomes.items():
        assert outcome.tokens_kept is not None
        result = _result(job.title, job.policy.keep, outcome, full, outcome.tokens_kept, batches)
        if job.price is not None:
            schedule = schedule_text(job.policy, depth, named=job.title.startswith(CALIBRATED))
            result = replace(result, budget=job.price.budget, schedule=schedule)
        found.results.append(result)
    return found


def about(comparison: Comparison) -> str:
    """Return the number of questions and images of a comparison, in a line."""
    return f"{len(comparison.images)} questions about {len(set(comparison.images))} images."


def _result(
    title: str, keep: int | float | None, outcome: Outcome, full: Outcome, tokens: float, batches: Sequence[Any]
) -> Result:
    same = [float(one == other) for one, other in zip(outcome.answers, full.answers, strict=True)]
    score, figures = scored(outcome.answers, batches)
    more: dict[str, Any] = {"prices": outcome.prices, "figures": figures, "seconds": outcome.seconds}
    return Result(title, keep, score, np.array(same), tokens, outcome.tokens_per_layer, **more)


def scored(answers: Sequence[str], batches: Sequence[Any]) -> tuple[np.ndarray | None, dict[str, float]]:
    """Return the accuracy of each answer by its data set's rule, float [N] in [0, 1], and the figures it reports.

    Figures are those of `REPORTED`, under names such as "pope_f1"; those of no question, or that need questions which
    are not there, are left out. The accuracy is None where some questions have no right answers.
    """
    truth = _column(batches, "answers")
    if len(truth) == len(answers):
        return np.array([vqa_score(one, ten) / 30 for one, ten in zip(answers, truth, strict=True)]), {}
    references = _column(batches, "references")
    if not answers or len(references) != len(answers):
        return None, {}
    names = [batch["metric"] for batch in batches for _ in batch["references"]]
    scores, figures = np.zeros(len(answers)), dict[str, float]()
    for name in dict.fromkeys(names):
        metric: Any = BENCHMARKS[name]()
        at = [place for place, one in enumerate(names) if one == name]
        pairs = [(answers[place], references[place]) for place in at]
        scores[at] = [metric.score(*pair) for pair in pairs]
        metric.update(*zip(*pairs, strict=True))
        found = metric.compute()
        wanted = [figure for figure in REPORTED.get(name, ()) if figure in found]
        figures |= {f"{name}_{figure}": value for figure in wanted if not isnan(value := found[figure].item())}
    return scores, figures


def _images(full: Outcome, batches: Sequence[Any]) -> list[int]:
    """Return the image id of each question; where the data has none, a different one for each question."""
    images = _column(batches, "image_ids")
    return images if len(images) == len(full.answers) else list(range(len(full.answers)))


def _column(batches: Sequence[Any], key: str) -> list[Any]:
    values = [batch.get(key, []) if isinstance(batch, Mapping) else [] for batch in batches]
    return [item for value in values for item in (value.tolist() if hasattr(value, "tolist") else value)]
