"""Sweep of one model: its jobs, of which those that an earlier run finished are reused, and the table they make."""

import copy
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from rich.console import Console
from rich.text import Text
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from catp_lightning.calibration.identity import model_fingerprint
from catp_lightning.callbacks import CrossAttentionCalibration
from catp_lightning.errors import PolicyError, PruningError
from catp_lightning.evaluation.comparison import Comparison, Result
from catp_lightning.evaluation.sweep.figure import figure
from catp_lightning.evaluation.sweep.jobs import Jobs, Outcome, data_fingerprint, versions
from catp_lightning.evaluation.sweep.methods import Job, fixed_methods, is_calibrated
from catp_lightning.evaluation.sweep.reference import check_reference, reference_of
from catp_lightning.evaluation.sweep.table import ModelTable
from catp_lightning.methods.scorers import SCORERS
from catp_lightning.metrics import vqa_score
from catp_lightning.models import Family, find_family
from catp_lightning.policy import PruningPolicy
from catp_lightning.policy.locations import budget_file_name
from catp_lightning.safe_text import one_line, rich_text
from catp_lightning.utils.files import read_bytes, write_bytes, write_json, write_text
from catp_lightning.utils.plots import png
from catp_lightning.utils.progress import Lines, Preparation, shows_bars

FULL = "no pruning"


@dataclass(frozen=True)
class Reading:
    """One model of a sweep with its questions, and the function that predicts the answers.

    Attributes:
        module: module that holds the model; its prediction step returns answers.
        test: returns a loader of the compared questions.
        calibration: returns a loader of the calibration split; None: there is no such split.
        predict: `trainer.predict` on a loader, with a callback or None.
        device: device that the model runs on.
        settings: settings that answers depend on beside weights, data and policy; JSON types.
    """

    module: LightningModule
    test: Callable[[], Any]
    calibration: Callable[[], Any] | None
    predict: Callable[[Any, Any], Sequence[Any]]
    device: torch.device
    settings: Mapping[str, Any]


def sweep_model(
    reading: Reading,
    names: Sequence[str],
    budgets: Sequence[int | float],
    layers: bool,
    reference: str | None,
    output: Path,
    lines: Lines,
    preparation: Preparation,
    draws: int = 1,
) -> ModelTable:
    """Compare methods on one model and return the table; jobs that an earlier run has finished are not run again.

    Args:
        reading: the model and its questions.
        names: methods: names in `SCORERS`, `CALIBRATED`, or `CALIBRATED` before a scorer's name.
        budgets: budgets at which each method is compared.
        layers: compare attention scorers with each single layer as well.
        reference: the method that others are compared with; None: `CALIBRATED`, or the first.
        draws: number of parts of the calibration split to calibrate on, each by itself.
        output: folder in which one named as the model gets `table.md`, `table.json`, `accuracy.png`, `jobs` and
            `policies`.
        lines: progress lines, told what is being done.
        preparation: set to be over before the first question is read.

    Raises:
        PolicyError: the reference is not among the methods, or none of them makes sense on the model.
    """
    family, console = find_family(reading.module), Console()
    found, notes = fixed_methods([name for name in names if not is_calibrated(name)], family, layers)
    calibrations = [name for name in names if is_calibrated(name)]
    titles = [job.title for job in found] + calibrations
    check_reference(reference, titles, notes, family)
    name = Path(str(family.describe()["name"])).name
    name = family.name if name in ("", "..") else name
    lines.now = f"{name}: reading the questions"
    loaders = _calibration_draws(reading, draws) if calibrations else []  # errors come before the work
    asked = reading.test()
    preparation.over = True
    folder, batches = output / name, list(asked)
    settings = {**reading.settings, "versions": versions(), "weights": model_fingerprint(family.model)}
    loader: DataLoader[Any] = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]  # a list is enough
    everything = {**settings, "data": data_fingerprint(batches)}
    runner = Jobs(folder / "jobs", partial(reading.predict, loader), everything, _guide(family, reading.device))
    lines.now = f"{name}: answering without pruning"
    full = runner.finished(None) or runner.run(None)
    jobs = [job.at(keep) for job in found for keep in budgets]
    for title in reversed(calibrations):
        for number, loader in reversed(list(enumerate(loaders, 1))):
            name_of_draw = title if number == 1 else f"{title} draw {number}"
            place = folder / "policies" / name_of_draw.replace(" ", "-")
            lines.now = f"{name}: {name_of_draw}, calibrating"
            policies = calibrated(reading, loader, title.partition(" ")[2], budgets, settings, place, console)
            if isinstance(policies, str):
                notes[title] = policies
            else:
                jobs = [Job(title, name_of_draw, policy) for policy in policies] + jobs
        if not loaders:
            notes[title] = "The data has no calibration split."
    outcomes = dict(_outcomes(jobs, runner, notes, f"{name}:", console, lines))
    lines.now = f"{name}: writing tables"
    if not outcomes:
        raise PolicyError(f"None of {', '.join(names)} makes sense on {name}: {next(iter(notes.values()))}")
    table = _table(name, full, outcomes, batches, reference_of(reference, outcomes, notes), notes)
    write_text(folder / "table.md", table.markdown())
    write_json(folder / "table.json", table.to_json(), indent=2)
    write_bytes(folder / "accuracy.png", png(figure([table]), dpi=120))
    where = rich_text(folder, "bold")
    console.print(Text.assemble(rich_text(f"{name}: "), where, ": table.md, table.json, accuracy.png"))
    return table


def _outcomes(
    jobs: Sequence[Job], runner: Jobs, notes: dict[str, str], name: str, console: Console, lines: Lines
) -> Iterator[tuple[Job, Outcome]]:
    """Yield each job with its outcome, reused or run now; a job that the model refuses when it runs becomes a note."""
    done = {job: outcome for job in jobs if (outcome := runner.finished(job)) is not None}
    if done:
        console.print(rich_text(f"{name} {len(done)} of {len(jobs)} jobs were finished by an earlier run."))
    with tqdm(total=len(jobs), initial=len(done), desc=one_line(name), disable=not shows_bars()) as bar:
        for number, job in enumerate(jobs, 1):
            if job not in done:
                lines.now = f"{name} {number} of {len(jobs)} jobs: {job.name}, keep {job.policy.keep}"
                bar.set_postfix_str(one_line(f"{job.name}, keep {job.policy.keep}"))
                try:
                    done[job] = runner.run(job)
                except (PruningError, PolicyError) as error:
                    notes[f"{job.title}, keep {job.policy.keep}"] = str(error)
                bar.update()
            if job in done:
                yield job, done[job]


def _calibration_draws(reading: Reading, draws: int) -> list[Any]:
    """Return loaders of `draws` consecutive parts of the calibration split; [] if there is no such split.

    Raises:
        PolicyError: the split cannot be divided, or has fewer questions than `draws`.
    """
    if reading.calibration is None:
        return []
    loader = reading.calibration()
    if draws == 1:
        return [loader]
    data = getattr(loader, "dataset", None)
    if not isinstance(loader, DataLoader) or not isinstance(data, Sized) or len(data) < draws:
        raise PolicyError(
            f"calibration_draws is {draws}, but the calibration split cannot be divided into as many parts: that takes "
            "a DataLoader over a data set with a length, of at least so many questions. Give calibration_draws=1."
        )
    ends = [len(data) * part // draws for part in range(draws + 1)]
    return [
        DataLoader(Subset(data, range(first, end)), batch_size=loader.batch_size, collate_fn=loader.collate_fn)  # type: ignore[arg-type]
        for first, end in pairwise(ends)
    ]


def calibrated(
    reading: Reading,
    loader: Any,
    scorer: str,
    budgets: Sequence[int | float],
    settings: Mapping[str, Any],
    folder: Path,
    console: Console,
) -> list[PruningPolicy] | str:
    """Return a policy for each budget, an earlier run's if nothing has changed; or the reason why there is none.

    `loader` gives the calibration data; `scorer` is the one method that is calibrated, or "": all candidates compete.
    """
    file = folder / "settings.json"
    now = {**settings, "data": data_fingerprint(loader), "keep": [repr(keep) for keep in budgets]}
    now = json.loads(json.dumps(now))  # as it comes back from a file
    try:
        before = json.loads(read_bytes(file))
        if before["settings"] != now:
            raise ValueError("made with others")
        if before["refused"] is not None:
            return str(before["refused"])
    except (OSError, ValueError, KeyError, TypeError):
        shutil.rmtree(folder, ignore_errors=True)
        write_json(file, {"settings": now, "refused": None}, indent=1)
    files = [folder / budget_file_name(keep) for keep in budgets]
    if not all(policy.is_file() for policy in files):
        console.print(rich_text(f"Calibrating{scorer and ' ' + scorer}."))
        # The union over heads keeps more than its budget, whatever the heads weigh.
        selector = "top-k" if scorer and SCORERS[scorer].selector == "union" else None
        try:
            calibration = CrossAttentionCalibration(
                folder, keep=list(budgets), scorer=scorer or None, selector=selector
            )
            reading.predict(loader, calibration)
        except (PruningError, PolicyError) as error:
            write_json(file, {"settings": now, "refused": str(error)}, indent=1)
            return str(error)
    return [PruningPolicy.load(policy) for policy in files]


def _table(
    name: str,
    full: Outcome,
    outcomes: Mapping[Job, Outcome],
    batches: Sequence[Any],
    reference: str,
    notes: Mapping[str, str],
) -> ModelTable:
    images = _images(full, batches)
    every = max(outcome.visual_tokens or 0.0 for outcome in outcomes.values())
    comparison = Comparison(images, reference, [_result(FULL, None, full, full, every, batches)])
    for job, outcome in outcomes.items():
        assert outcome.tokens_kept is not None
        comparison.results.append(_result(job.title, job.policy.keep, outcome, full, outcome.tokens_kept, batches))
    controls = {job.title: SCORERS[job.policy.scorer].published for job in outcomes if job.control}
    about = f"{len(images)} questions about {len(set(images))} images."
    return ModelTable.of(name, about, comparison, controls, notes)


def _result(
    title: str, keep: int | float | None, outcome: Outcome, full: Outcome, tokens: float, batches: Sequence[Any]
) -> Result:
    truth = _column(batches, "answers")
    same = [float(one == other) for one, other in zip(outcome.answers, full.answers, strict=True)]
    score = None
    if len(truth) == len(outcome.answers):
        score = np.array([vqa_score(one, ten) / 30 for one, ten in zip(outcome.answers, truth, strict=True)])
    return Result(title, keep, score, np.array(same), tokens, outcome.tokens_per_layer)


def _images(full: Outcome, batches: Sequence[Any]) -> list[int]:
    """Return the image id of each question; where the data has none, a different one for each question."""
    images = _column(batches, "image_ids")
    return images if len(images) == len(full.answers) else list(range(len(full.answers)))


def _column(batches: Sequence[Any], key: str) -> list[Any]:
    values = [batch.get(key, []) if isinstance(batch, Mapping) else [] for batch in batches]
    return [item for value in values for item in (value.tolist() if hasattr(value, "tolist") else value)]


def _guide(family: Family, device: torch.device) -> Callable[[], Any]:
    """Return a function that gives the guide of guided methods: a copy of the model itself, made once, when needed."""
    copies: list[Any] = []

    def guide() -> Any:
        if not copies:
            own: Any = copy.deepcopy(family.model)
            copies.append(own.to(device))
        return copies[0]

    return guide
