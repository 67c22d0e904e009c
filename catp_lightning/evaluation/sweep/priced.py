"""Sweep of one model at equal prices: each method keeps as many tokens, or drops them as late, as a price allows."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text
from torch.utils.data import DataLoader

from catp_lightning.calibration.identity import model_fingerprint
from catp_lightning.errors import PolicyError, PruningError
from catp_lightning.evaluation.sweep.best_layers import at_best_layers, chooses_layer
from catp_lightning.evaluation.sweep.calibrations import calibrated
from catp_lightning.evaluation.sweep.examples import examples_of
from catp_lightning.evaluation.sweep.jobs import Jobs, Outcome, data_fingerprint, versions
from catp_lightning.evaluation.sweep.methods import (
    CALIBRATED,
    ENTRY,
    Job,
    controls_among,
    fixed_methods,
    is_calibrated,
)
from catp_lightning.evaluation.sweep.page import sweep_page
from catp_lightning.evaluation.sweep.priced_figure import priced_figure
from catp_lightning.evaluation.sweep.priced_table import PricedTable
from catp_lightning.evaluation.sweep.prices import Price, Solver, known_prices
from catp_lightning.evaluation.sweep.reading import Reading, calibration_draws, guide_of, name_of
from catp_lightning.evaluation.sweep.reference import check_reference, reference_of
from catp_lightning.evaluation.sweep.results import about, comparison_of, outcomes_of
from catp_lightning.evaluation.sweep.training import is_trained, trained
from catp_lightning.models import Family, find_family
from catp_lightning.policy import PruningPolicy
from catp_lightning.pricing import Prices
from catp_lightning.safe_text import rich_text
from catp_lightning.utils.files import write_bytes, write_json, write_text
from catp_lightning.utils.plots import png
from catp_lightning.utils.progress import Lines, Preparation

TITLES = {ENTRY: "calibrated, at the entry only"}
ANY_RULE = PruningPolicy("stride")
"""A rule before the decoder: all of them pay the same for the same number of tokens."""


def sweep_prices(
    reading: Reading,
    names: Sequence[str],
    prices: Sequence[Price],
    layers: bool,
    reference: str | None,
    output: Path,
    lines: Lines,
    preparation: Preparation,
    draws: int = 1,
) -> PricedTable:
    """Compare methods on one model, each at the same prices; jobs that an earlier run has finished are not run again.

    What a fixed method keeps is solved for the price over the compared questions. Methods that drop tokens at one layer
    of the decoder, FastV for example, are compared at their own layer, and at the layer that agrees best with the
    unpruned model on each part of the calibration split. Visual exit leaves at the last layer that the price allows.

    Args:
        reading, reference, lines, preparation, draws: as in `sweep_model`.
        names: as in `sweep_model`; also `ENTRY`, and methods of `SCHEDULES`.
        prices: prices at which each method is compared.
        layers: compare with each single layer as well, also methods that drop tokens there.
        output: folder in which one named as the model gets `prices.md`, `prices.json`, `prices.html`, `prices.png`,
            `priced-jobs` and `priced-policies`.

    Raises:
        PolicyError: the reference is not among the methods, none of them can pay one of the prices, or prices of the
            model's prompts are not known.
        PruningError: a unit is not known for the model.
    """
    family, console = find_family(reading.module), Console()
    name, known = name_of(family), _known(family, prices)
    fixed = [name for name in names if not is_calibrated(name) and not is_trained(name)]
    found, notes = fixed_methods(fixed, family, layers)
    single = [job for job in fixed_methods(fixed, family, True)[0] if chooses_layer(job, family)]
    calibrations, networks = [name for name in names if is_calibrated(name)], list(filter(is_trained, names))
    titles = [job.title for job in found] + [TITLES.get(title, title) for title in calibrations] + networks
    check_reference(TITLES.get(reference or "", reference), titles, notes, family)
    lines.now = f"{name}: reading the questions"
    loaders = calibration_draws(reading, draws) if calibrations or single or networks else []
    asked = reading.test()
    preparation.over = True
    folder, batches = output / name, list(asked)
    settings = {**reading.settings, "versions": versions(), "weights": model_fingerprint(family.model), "priced": 1}
    guide = guide_of(family, reading.device)

    def answering(batches: Sequence[Any], place: Path) -> Jobs:
        loader: DataLoader[Any] = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]  # a list is enough
        everything = {**settings, "data": data_fingerprint(batches)}
        return Jobs(place, partial(reading.predict, loader), everything, guide, known)

    runner = answering(batches, folder / "priced-jobs")
    lines.now = f"{name}: answering without pruning"
    full = runner.finished(None) or runner.run(None)
    if not full.sizes:
        raise PolicyError(f"{name} read no image in the compared questions: there is nothing to prune.")
    solver = Solver(known, full.sizes)
    jobs = _paying(found, prices, solver, notes)
    if single and not loaders:
        notes["methods at their best layer"] = "The data has no calibration split, on which that layer is chosen."
    for number, loader in enumerate(loaders, 1) if single else ():
        part = answering(list(loader), folder / "priced-jobs" / f"calibration-{number}")
        jobs += at_best_layers(single, prices, solver, part, notes, f"{name}: best layers, part {number}", lines)
    for title in networks:
        for number, loader in enumerate(loaders, 1):
            lines.now = f"{name}: {title} draw {number}, training"
            place = folder / "priced-policies" / f"{title}-draw-{number}"
            jobs += _trained(title, number, prices, solver, reading, loader, settings, place, notes)
    for title in reversed(calibrations):
        if not loaders:
            notes[TITLES.get(title, title)] = "The data has no calibration split."
        for number, loader in reversed(list(enumerate(loaders, 1))):
            lines.now = f"{name}: {title} draw {number}, calibrating"
            place = folder / "priced-policies"
            jobs = (
                _calibrated(title, number, prices, solver, reading, loader, settings, place, notes, console, lines)
                + jobs
            )
    outcomes = dict(outcomes_of(jobs, runner, notes, f"{name}:", console, lines))
    lines.now = f"{name}: writing tables, and asking a few questions again for examples"
    if not outcomes:
        raise PolicyError(f"None of {', '.join(names)} can pay a price on {name}: {next(iter(notes.values()))}")
    _tell_of_excess(outcomes, notes)
    wanted = reference_of(TITLES.get(reference or "", reference), outcomes, notes)
    comparison = comparison_of(full, outcomes, batches, wanted, family.depth)
    examples = examples_of(reading, family, batches, full, outcomes, wanted, guide)
    table = PricedTable.of(
        name, about(comparison), comparison, controls_among(outcomes), notes, runner.settings, examples
    )
    _write(table, folder)
    written = ": prices.md, prices.json, prices.html, prices.png"
    console.print(Text.assemble(rich_text(f"{name}: "), rich_text(folder, "bold"), written))
    return table


def _write(table: PricedTable, folder: Path) -> None:
    write_text(folder / "prices.md", table.markdown())
    write_json(folder / "prices.json", table.to_json(), indent=2)
    drawn = priced_figure([table])
    image = png(drawn, dpi=120)
    write_bytes(folder / "prices.png", image)
    write_text(folder / "prices.html", sweep_page(table.markdown(), "prices", drawn, image, [table]))


def _known(family: Family, prices: Sequence[Price]) -> Prices:
    """Return the prices of a model's prompts.

    Raises:
        PolicyError: the model reads the image by cross-attention.
        PruningError: a unit that is asked for is not known.
    """
    known = known_prices(family)
    if known is None:
        raise PolicyError(
            f"{type(family.model).__name__} reads the image by cross-attention, and a sweep knows prices only where "
            "visual tokens are rows of the prompt: compare at numbers of tokens, --keep."
        )
    for price in prices:
        known.check(price.unit)
    return known


def _paying(found: Sequence[Job], prices: Sequence[Price], solver: Solver, notes: dict[str, str]) -> list[Job]:
    """Return each job at each price that it can pay; why it cannot pay another becomes a note."""
    jobs = []
    for job in found:
        if job.policy.scorer == "visual-exit" and job.policy.scorer_args:
            continue  # the price says at which layer
        for price in prices:
            try:
                policy = solver.solve(job.policy, price, job.schedule)
                if policy is not None:
                    jobs.append(replace(job, policy=policy, price=price, name=_solved_name(job, policy)))
                    continue
                why = solver.why_not(job.policy, price=price)
            except (PolicyError, PruningError) as error:
                why = str(error)
            notes[f"{job.title} at {price}"] = why
    return jobs


def _solved_name(job: Job, policy: PruningPolicy) -> str:
    if policy.scorer == "visual-exit":
        return f"{job.name} at layer {policy.scorer_args['layer']}"
    return " then ".join([job.name, *(repr(stage.keep) for stage in policy.then)])


def _calibrated(
    title: str,
    number: int,
    prices: Sequence[Price],
    solver: Solver,
    reading: Reading,
    loader: Any,
    settings: dict[str, Any],
    folder: Path,
    notes: dict[str, str],
    console: Console,
    lines: Lines,
) -> list[Job]:
    """Return the jobs of one calibration, at each price that it can pay; reasons why it cannot become notes.

    `CALIBRATED` is calibrated for the prices themselves, others for the share of tokens with which they pay them.
    """
    shown, place = TITLES.get(title, title), folder / f"{title} draw {number}".replace(" ", "-")
    scorer = title.partition(" ")[2] if title not in (CALIBRATED, ENTRY) else ""
    if scorer == "visual-exit" or is_trained(scorer):
        notes[shown] = "What it pays is no share of the tokens, so that it is not calibrated for a price."
        return []
    policy = PruningPolicy(scorer) if scorer else ANY_RULE
    payable = {price: one for price in prices if (one := solver.solve(policy, price)) is not None}
    for price in prices:
        if price not in payable:
            notes[f"{shown} at {price}"] = solver.why_not(policy, price=price)
    asked: list[tuple[list[Price], Any, Path]] = []
    if title == CALIBRATED:
        for unit in dict.fromkeys(price.unit for price in payable):
            own = [price for price in payable if price.unit == unit]
            asked.append((own, {unit: [price.share for price in own]}, place / unit))
    elif payable:
        asked.append((list(payable), list(dict.fromkeys(one.keep for one in payable.values())), place))
    jobs = []
    for own, what, where in asked:
        policies = calibrated(reading, loader, scorer, what, settings, where, console, lines)
        if isinstance(policies, str):
            notes[f"{shown} at {', '.join(map(str, own))}"] = policies
            continue
        by_keep = dict(zip(what, policies, strict=True)) if isinstance(what, list) else {}
        for at, price in enumerate(own):
            policy = by_keep[payable[price].keep] if by_keep else policies[at]
            jobs.append(Job(shown, f"{title} draw {number} at {price}", policy, price=price))
    return jobs


def _trained(
    title: str,
    number: int,
    prices: Sequence[Price],
    solver: Solver,
    reading: Reading,
    loader: Any,
    settings: dict[str, Any],
    folder: Path,
    notes: dict[str, str],
) -> list[Job]:
    """Return the jobs of a compressor that is trained on one part of the calibration split, at each price.

    Its rows pay what as many tokens before the decoder pay. What "dyvte" pays is known in tokens a layer reads.
    """
    asked = {
        price: price.share if title == "dyvte" else one.keep
        for price in prices
        if (one := solver.solve(ANY_RULE, price)) is not None and (title != "dyvte" or price.unit == "tokens_per_layer")
    }
    if missing := [price for price in prices if price not in asked]:
        notes[f"{title} at {', '.join(map(str, missing))}"] = "What it pays is not known before prompts are read."
    keeps = list(dict.fromkeys(asked.values()))
    policies = trained(reading, loader, title, keeps, solver.tokens, settings, folder) if keeps else []
    if isinstance(policies, str):
        notes[title] = policies
        return []
    by_keep = dict(zip(keeps, policies, strict=True))
    return [
        Job(title, f"{title} draw {number} at {price}", by_keep[keep], price=price) for price, keep in asked.items()
    ]


def _tell_of_excess(outcomes: dict[Job, Outcome], notes: dict[str, str]) -> None:
    """Note the jobs that paid over 1% more than their price: those that keep more than their budget of tokens."""
    for job, outcome in outcomes.items():
        paid = (outcome.prices or {}).get(job.price.unit, 0.0) if job.price else 0.0
        if job.price and paid > 1.01 * job.price.share:
            notes[f"{job.title} at {job.price}"] = f"it is in the table, but paid {paid:.3g}, more than that."
