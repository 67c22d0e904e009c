"""Flow of a calibration: probe, fit, race, check.

The split is divided by image. On the learning part, random subsets measure the value of tokens; candidates fitted to
these measurements compete with every fixed rule, and the worse ones are eliminated early. Both steps use the same
images, cross-fitted: the candidate that answers an image was fitted without the image's fold. Nothing is decided on the
checking part, so its figures are the ones to quote, and a promise is tested on it.
"""

from collections.abc import Generator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from catp_lightning.calibration.fit.around import ProbingAround
from catp_lightning.calibration.fit.fitting import Fitted, fit, fit_without
from catp_lightning.calibration.fit.learning import EPOCHS, Networks, learn
from catp_lightning.calibration.fit.probing import Learned, Probing
from catp_lightning.calibration.fit.reading import Reading
from catp_lightning.calibration.fit.records import Recorded
from catp_lightning.calibration.fit.ties import Tolerance
from catp_lightning.calibration.passes import Belongs, Pass
from catp_lightning.calibration.plan import Plan
from catp_lightning.calibration.replay.samples import Samples
from catp_lightning.calibration.report.result import CalibrationResult
from catp_lightning.calibration.search.candidate import Candidate
from catp_lightning.calibration.search.candidates import default_candidates, fitted_candidates
from catp_lightning.calibration.search.promise import Promise
from catp_lightning.calibration.search.promised import PromisedGroups
from catp_lightning.calibration.search.race import Check, Race
from catp_lightning.calibration.search.standings import Round, Standings
from catp_lightning.calibration.split import part_of, round_bounds, round_of
from catp_lightning.errors import PolicyError
from catp_lightning.methods.components import Features, Question
from catp_lightning.methods.observation import Needs, Signal, join
from catp_lightning.policy import check_keep
from catp_lightning.utils.messages import rank_zero_warn


def calibrate(
    plan: Plan, budgets: Sequence[int | float], promise: Promise | None = None, device: torch.device | None = None
) -> Generator[Pass, None, CalibrationResult]:
    """Yield each pass over the split in turn, and return what was measured.

    The caller gives every batch of the split to a pass before it asks for the next one. All processes must do so: the
    sums are reduced over them in between.

    Args:
        plan: model family, what is fitted and chosen among for it, and with which settings.
        budgets: shares or numbers of tokens; a candidate is chosen for each. With a promise in descending order.
        promise: promise that the chosen budget has to keep; None: none.
        device: device of the sums.

    Raises:
        PolicyError: a budget is not allowed or given twice, there is none, or there are too few images for a choice or
            for the promise.
    """
    check_budgets(budgets)
    settings, ties = plan.settings, Tolerance.under(plan.family.model.dtype)
    part = partial(part_of, checked=settings.checked if promise is None else settings.promised)

    components, described = None, []
    if plan.asks:
        reading = Reading(part, device)
        yield reading
        components = reading.components()
        described = [] if components is None else reading.described(components[0])

    probing = Probing(plan, budgets, part, device, promise is not None, components)
    yield probing
    learned = probing.learned()
    _check_amount(learned)
    plan = replace(plan, largest=learned.largest)
    promised = None
    if promise is not None and learned.asked is not None:
        promised = PromisedGroups(promise, learned.asked, learned.groups)
        promised.refuse_too_few(part(torch.from_numpy(learned.asked.images)).numpy() == 1)

    def belongs(to: int, samples: Samples) -> Tensor:
        """Return which samples are of a part, bool [B], without those that the unpruned model gives no number for."""
        return (part(samples.images) == to) & ~torch.isin(samples.keys, learned.not_finite)

    networks = None
    if components is not None and learned.records is not None:
        networks = yield from _train(plan, components, learned.records, partial(belongs, 0), device)

    fitted = fit(learned.sums, learned.pairs, learned.columns, ties)
    without = [
        fit_without(fold, learned.sums, learned.pairs, learned.columns, fitted, ties) for fold in range(settings.folds)
    ]
    if networks is not None:
        fitted = replace(fitted, network=networks.whole)
        without = [replace(found, network=own) for found, own in zip(without, networks.by_fold, strict=True)]
    candidates = all_candidates(plan, fitted)
    cross_fitted = [all_candidates(plan, found) for found in without]
    question = None if components is None else components[0]
    standings, alive = Standings(candidates, ties, question), [list(range(len(candidates))) for _ in budgets]
    bounds = round_bounds(learned.parts["learn"], settings.first_round)
    for number in range(len(bounds)):
        if number:
            alive = [standings.survivors(budget, alive[budget], settings.eta) for budget in range(len(budgets))]
        title = f"round {number + 1} of {len(bounds)}, {max(map(len, alive))} candidates"
        here = lambda samples, turn=number: belongs(0, samples) & (round_of(samples.images, bounds) == turn)  # noqa: E731
        race = Race(title, plan, cross_fitted, budgets, alive, here, learned.parts, device, question)
        yield race
        standings.rounds.append(Round(alive, race.sums.compute(), race.answers.compute()))

    final = standings.final(alive, settings.folds)
    candidates, chosen = list(final.candidates), final.chosen
    references = [number for number, candidate in enumerate(candidates) if candidate.reference]
    checked = [[first, *(number for number in references if number != first)] for first in chosen]
    check = Check(plan, candidates, budgets, checked, partial(belongs, 1), learned.parts, device)
    yield check  # decides nothing

    return CalibrationResult(
        model=plan.family.describe(),
        tokens=learned.tokens,
        budgets=tuple(budgets),
        promised=promised,
        candidates=candidates,
        chosen=chosen,
        choosing=final.sums,
        checking=check.sums.compute(),
        asked=check.asked.compute(),
        alive=checked,
        by_image=check.by_image.compute(),
        perturbed={name: sums.compute() for name, sums in check.perturbed.items()},
        parts=learned.parts,
        images=learned.images,
        fitted=fitted.evidence(learned.columns) | ({} if networks is None else {"learned": networks.evidence()}),
        components=described,
        statistics=learned.statistics,
    )


def _train(
    plan: Plan,
    components: tuple[Question, Features],
    random: Recorded,
    belongs: Belongs,
    device: torch.device | None,
) -> Generator[Pass, None, Networks | None]:
    """Train networks on probes of random sets; then on those and on probes around the sets that they find good.

    Args:
        plan: plan of the calibration.
        components: those of questions and tokens.
        random: probes of random sets.
        belongs: says which samples are probed.
        device: device of the records.

    Returns:
        The networks; None if they explain too little.
    """
    first = learn(random, components, plan.settings.folds, plan.slots, EPOCHS // 2)  # to know good sets is enough
    if first is None:
        return None
    around = ProbingAround(plan, first, belongs, device)
    yield around
    both = random.joined(around.recorder.records.compute())
    return learn(both, components, plan.settings.folds, plan.slots)


def needs_of(plan: Plan) -> Needs:
    """Return the signals to observe before the decoder: those that candidates and fits read, hashes and features."""
    depth = plan.family.depth
    methods = [candidate.method for candidate in all_candidates(plan, Fitted([0.0] * plan.slots))]
    entering = [method.needs for method in methods if not method.scorer.stages(depth)]
    asked: Needs = {Signal.QUESTION: None} if plan.asks else {}
    return join([{Signal.IMAGE_HASH: None, Signal.IMAGE_FEATURES: None}, plan.needs, asked, *entering])


def all_candidates(plan: Plan, fitted: Fitted) -> list[Candidate]:
    """Return all candidates, the fitted ones last."""
    return [*default_candidates(plan), *fitted_candidates(plan, fitted)]


def check_budgets(budgets: Sequence[int | float]) -> None:
    """Raise PolicyError if a budget is not allowed or given twice, or if there is none."""
    for keep in budgets:
        check_keep(keep)
    if not budgets or len({(type(keep), keep) for keep in budgets}) < len(budgets):
        raise PolicyError(f"keep is {list(budgets)}; give one budget or several different ones.")


def _check_amount(learned: Learned) -> None:
    """Raise PolicyError if there are too few images; warn of samples that were left out."""
    left_out = (
        f" {len(learned.not_finite):,} samples were left out, to which the unpruned model's own answer is not a number "
        "(NaN or infinite): look for damaged pixels, broken weights, or too low a precision."
    )
    if not all(learned.parts.values()):
        raise PolicyError(
            f"Calibration needs samples in every part of its split, got {learned.parts}: give some dozens of images."
            f"{left_out if len(learned.not_finite) else ''}"
        )
    if len(learned.not_finite):
        rank_zero_warn(f"Calibration:{left_out}")
