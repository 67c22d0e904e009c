"""Sweep of one model: its jobs, of which those that an earlier run finished are reused, and the table they make."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text
from torch.utils.data import DataLoader

from catp_lightning.calibration.identity import model_fingerprint
from catp_lightning.errors import PolicyError
from catp_lightning.evaluation.sweep.calibrations import calibrated
from catp_lightning.evaluation.sweep.difficult import difficult_page, difficult_tables
from catp_lightning.evaluation.sweep.examples import examples_of
from catp_lightning.evaluation.sweep.figure import figure
from catp_lightning.evaluation.sweep.jobs import Jobs, data_fingerprint, versions
from catp_lightning.evaluation.sweep.methods import Job, controls_among, fixed_methods, is_calibrated
from catp_lightning.evaluation.sweep.page import sweep_page
from catp_lightning.evaluation.sweep.prices import known_prices
from catp_lightning.evaluation.sweep.reading import Reading, calibration_draws, guide_of, name_of
from catp_lightning.evaluation.sweep.reference import check_reference, reference_of
from catp_lightning.evaluation.sweep.results import about, comparison_of, outcomes_of
from catp_lightning.evaluation.sweep.table import ModelTable
from catp_lightning.models import find_family
from catp_lightning.safe_text import rich_text
from catp_lightning.utils.files import write_bytes, write_json, write_text
from catp_lightning.utils.plots import png
from catp_lightning.utils.progress import Lines, Preparation


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
        output: folder in which one named as the model gets `table.md`, `table.json`, `table.html`, `accuracy.png`,
            `jobs` and `policies`; `difficult.md` and `.json` where "downsample" is among the methods.
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
    name = name_of(family)
    lines.now = f"{name}: reading the questions"
    loaders = calibration_draws(reading, draws) if calibrations else []  # errors come before the work
    asked = reading.test()
    preparation.over = True
    folder, batches = output / name, list(asked)
    settings = {**reading.settings, "versions": versions(), "weights": model_fingerprint(family.model)}
    loader: DataLoader[Any] = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]  # a list is enough
    everything = {**settings, "data": data_fingerprint(batches)}
    guide = guide_of(family, reading.device)
    runner = Jobs(folder / "jobs", partial(reading.predict, loader), everything, guide, known_prices(family))
    lines.now = f"{name}: answering without pruning"
    full = runner.finished(None) or runner.run(None)
    jobs = [job.at(keep) for job in found for keep in budgets]
    for title in reversed(calibrations):
        for number, loader in reversed(list(enumerate(loaders, 1))):
            name_of_draw = title if number == 1 else f"{title} draw {number}"
            place = folder / "policies" / name_of_draw.replace(" ", "-")
            lines.now = f"{name}: {name_of_draw}, calibrating"
            policies = calibrated(reading, loader, title.partition(" ")[2], budgets, settings, place, console, lines)
            if isinstance(policies, str):
                notes[title] = policies
            else:
                jobs = [Job(title, name_of_draw, policy) for policy in policies] + jobs
        if not loaders:
            notes[title] = "The data has no calibration split."
    outcomes = dict(outcomes_of(jobs, runner, notes, f"{name}:", console, lines))
    lines.now = f"{name}: writing tables, and asking a few questions again for examples"
    if not outcomes:
        raise PolicyError(f"None of {', '.join(names)} makes sense on {name}: {next(iter(notes.values()))}")
    comparison = comparison_of(full, outcomes, batches, reference_of(reference, outcomes, notes))
    controls = controls_among(outcomes)
    examples = examples_of(reading, family, batches, full, outcomes, comparison.reference, guide)
    table = ModelTable.of(name, about(comparison), comparison, controls, notes, everything, examples)
    write_text(folder / "table.md", table.markdown())
    write_json(folder / "table.json", table.to_json(), indent=2)
    write_bytes(folder / "accuracy.png", image := png(drawn := figure([table]), dpi=120))
    write_text(folder / "table.html", sweep_page(table.markdown(), "accuracy", drawn, image, [table]))
    files = "table.md, table.json, table.html, accuracy.png"
    if hard := difficult_tables(name, comparison, controls):
        write_text(folder / "difficult.md", difficult_page(hard))
        write_json(folder / "difficult.json", [one.to_json() for one in hard], indent=2)
        files += ", difficult.md, difficult.json"
    where = rich_text(folder, "bold")
    console.print(Text.assemble(rich_text(f"{name}: "), where, f": {files}"))
    return table
