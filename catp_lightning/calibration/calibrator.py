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
from catp_lightning.calibration.search.counts import allocate
from catp_lightning.calibration.search.payments import Payments
from catp_lightning.calibration.search.promise import Promise
from catp_lightning.calibration.search.promised import PromisedGroups
from catp_lightning.calibration.search.race import Check
from catp_lightning.calibration.search.rounds import Racing
from catp_lightning.calibration.search.schedules import published_schedules
from catp_lightning.calibration.search.scheduling import scheduling
from catp_lightning.calibration.split import part_of
from catp_lightning.errors import PolicyError
from catp_lightning.methods.components import Features, Question
from catp_lightning.methods.observation import Needs, Signal, join
from catp_lightning.policy import PruningPolicy, check_keep
from catp_lightning.utils.messages import rank_zero_warn


def calibrate(
    plan: Plan, budgets: Sequence[int | float], promise: Promise | None = None, device: torch.device | None = None
) -> Generator[Pass, None, CalibrationResult]:
    """Yield each pass over the split in turn, and return what was measured.

    The caller gives every batch of the split to a pass before it asks for the next one. All processes must do so: the
    sums are reduced over them in between.

    Args:
        plan: model family, what is fitted and chosen among for it, and with which settings.
        budgets: shares or numbers of tokens; or, if the plan has a unit of prices, shares of what the unpruned model
            pays. A candidate is chosen for each. With a promise in descending order.
        promise: promise that the chosen budget has to keep; None: none.
        device: device of the sums.

    Raises:
        PolicyError: a budget is not allowed, given twice or cannot be met, there is none, or there are too few images
            for a choice or for the promise.
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
    learned, columns = probing.learned(), probing.columns
    _check_amount(learned)
    plan = replace(plan, largest=learned.largest)
    promised = None
    if promise is not None and learned.asked is not None:
        promised = PromisedGroups(promise, learned.asked, learned.groups)
        promised.refuse_too_few(part(torch.from_numpy(learned.asked.images)).numpy() == 1)

    def belongs(to: int, samples: Samples) -> Tensor:
        """Return which samples are of a part, bool [B], without those that the unpruned model gives no number for."""
        return (part(samples.images) == to) & ~torch.isin(samples.keys, learned.not_finite)

    payments = None if learned.sizes is None else Payments.of_samples(plan, learned.sizes)
    paid, keeps = _keeps(plan, payments, budgets, promise is not None)

    fitted, without, records = _fits(probing, ties)
    del probing  # its sums take more memory than whatever a later pass holds
    networks = None
    if components is not None and records is not None:
        networks = yield from _train(plan, components, records, partial(belongs, 0), device)
    del records
    if networks is not None:
        fitted = replace(fitted, network=networks.whole)
        without = [replace(found, network=own) for found, own in zip(without, networks.by_fold, strict=True)]
    candidates = all_candidates(plan, fitted)
    cross_fitted = [all_candidates(plan, found) for found in without]
    question = None if components is None else components[0]
    racing = Racing(plan, ties, partial(belongs, 0), learned.parts, device, question)
    if payments is None or plan.method is not None:
        standings, alive = yield from racing.run(cross_fitted, candidates, keeps)
    else:
        standings, alive = yield from scheduling(racing, payments, cross_fitted, candidates, paid, keeps)

    final = standings.final(alive, settings.folds)
    if settings.counts and question is not None and payments is None:
        each, learning = round(learned.tokens), partial(belongs, 0)
        final = yield from allocate(plan, final, cross_fitted, keeps, each, learning, learned.parts, question, device)
    candidates, chosen = list(final.candidates), final.chosen
    references = [n for n, candidate in enumerate(candidates) if candidate.reference or n in final.compared]
    checked = [
        list(dict.fromkeys([first, *references, *standings.best_alone(budget)])) for budget, first in enumerate(chosen)
    ]
    check = Check(plan, candidates, keeps, checked, partial(belongs, 1), learned.parts, device)
    yield check  # decides nothing

    return CalibrationResult(
        model=plan.family.describe(),
        tokens=learned.tokens,
        budgets=keeps,
        promised=promised,
        candidates=candidates,
        chosen=chosen,
        choosing=final.sums,
        checking=check.sums.compute(),
        asked=check.asked.compute(),
        answered=check.answers.first(),
        alive=checked,
        by_image=check.by_image.compute(),
        perturbed={name: sums.compute() for name, sums in check.perturbed.items()},
        parts=learned.parts,
        images=learned.images,
        fitted=fitted.evidence(columns) | ({} if networks is None else {"learned": networks.evidence()}),
        components=described,
        statistics=learned.statistics,
        payments=payments,
        paid=paid,
    )


def _fits(probing: Probing, ties: Tolerance) -> tuple[Fitted, list[Fitted], Recorded | None]:
    """Return the fit to all probes, the fits without each fold, and the probes of each sample if they were recorded.

    Sums are reduced over all processes, so each must call this.
    """
    sums, columns, recorder = probing.sums.compute(), probing.columns, probing.recorder
    pairs = None if probing.pairs is None else probing.pairs.compute()
    fitted = fit(sums, pairs, columns, ties)
    without = [fit_without(fold, sums, pairs, columns, fitted, ties) for fold in range(len(sums.rows))]
    return fitted, without, None if recorder is None else recorder.records.compute()


def _keeps(
    plan: Plan, payments: Payments | None, budgets: Sequence[int | float], some: bool
) -> tuple[Sequence[int | float], Sequence[int | float]]:
    """Return the budgets that can be met, and for each what stays at the decoder's input, or under a plan's method.

    Args:
        plan: plan of the calibration.
        payments: what policies cost; None: budgets are what stays.
        budgets: the budgets.
        some: True if it is enough that some prices can be met.
    """
    if payments is None:
        return budgets, budgets
    rule = PruningPolicy("position") if plan.method is None else plan.method
    return payments.reachable(rule.with_keep, budgets, some)


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
    named = (PruningPolicy.schedule(name, 0.5, depth).method() for name in published_schedules(plan))
    entering += [method.needs for method in named]
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
