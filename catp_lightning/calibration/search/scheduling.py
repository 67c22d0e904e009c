"""Search for schedules at prices: rules at the decoder's input, single stages inside it, then both together."""

from collections.abc import Generator, Iterator, Sequence

import numpy as np

from catp_lightning.calibration.passes import Pass
from catp_lightning.calibration.plan import Plan, why_not
from catp_lightning.calibration.search.candidate import Candidate
from catp_lightning.calibration.search.payments import Payments, Stop
from catp_lightning.calibration.search.rounds import Found, Racing, joined, restricted
from catp_lightning.calibration.search.schedules import (
    EXIT,
    NOTHING,
    WIDER,
    Losses,
    Scheduled,
    inner_layers,
    proposals,
    published_schedules,
    scheduled,
    single_stages,
)
from catp_lightning.calibration.split import round_bounds
from catp_lightning.methods.scorers import SCORERS
from catp_lightning.policy import PruningPolicy, Stage


def scheduling(
    racing: Racing,
    payments: Payments,
    cross_fitted: Sequence[Sequence[Candidate]],
    candidates: Sequence[Candidate],
    budgets: Sequence[float],
    keeps: Sequence[float],
) -> Generator[Pass, None, Found]:
    """Yield the passes in turn; return the standings of all candidates and who is left at each price.

    Rules at the decoder's input race at shares that meet the prices alone, and at larger ones. Then each stage inside
    the decoder is measured alone. The schedules of the least predicted loss race at each price against the rules.

    Args:
        racing: what the races share.
        payments: prices on the samples of the calibration.
        cross_fitted: rules at the decoder's input as fitted without each fold.
        candidates: these rules as fitted to all.
        budgets: the prices.
        keeps: for each price, the share that meets it at the decoder's input alone.
    """
    grid = sorted({*keeps, *(share for share in WIDER if share > min(keeps))}, reverse=True)
    own = [grid.index(keep) for keep in keeps]
    family = racing.plan.family
    layers = inner_layers(family)
    # What is left at the end says nothing of what the layers before it read: no schedule is worth tokens kept.
    staged = (
        payments.unit != "tokens"
        and bool(layers)
        and why_not(family, PruningPolicy(EXIT, {"layer": layers[0]})) is None
    )
    entry = yield from racing.run(cross_fitted, candidates, grid if staged else keeps)
    if not staged:
        return entry
    standings, left = entry
    best = [standings.choice(place, left[place]) for place in range(len(grid))]
    sums = standings.sums()
    singles = single_stages(family)
    bounds = round_bounds(racing.parts["learn"], racing.plan.settings.first_round)
    every = [list(range(len(singles)))]
    race = racing.race(f"{len(singles)} stages inside the decoder", [list(singles.values())], [1.0], every, 0, bounds)
    yield race
    alone = _means(race.sums.compute(), 0)
    losses = Losses.of(
        {keep: float(_means(sums, place)[number]) for place, (keep, number) in enumerate(zip(grid, best, strict=True))},
        dict(zip(singles, alone.tolist(), strict=True)),
    )

    plans, alive = list[tuple[Stop, ...] | Candidate](), list[list[int]]()
    for budget in budgets:
        first = len(plans)
        plans += [*proposals(family, losses, payments, budget), *_published(racing.plan, payments, budget)]
        alive.append(list(range(first, len(plans))))

    if not plans:
        return restricted(entry, own)

    def made(of_fold: Sequence[Candidate]) -> list[Candidate]:
        """Return the schedules with rules of one fold: the best at the measured share nearest to a schedule's own."""
        found = []
        for one in plans:
            if isinstance(one, Candidate):
                found.append(one)
            elif one[0].layer:
                found.append(scheduled(one, NOTHING, losses.kinds))
            else:
                nearest = int(np.abs(np.log(grid) - np.log(one[0].keep)).argmin())
                found.append(scheduled(one, of_fold[best[nearest]], losses.kinds))
        return found

    second = yield from racing.run(list(map(made, cross_fitted)), made(candidates), keeps, alive, "schedules")
    return joined(entry, second, own)


def _means(sums: dict[str, np.ndarray], budget: int) -> np.ndarray:
    """Return the mean divergence of each candidate at a budget, in nats."""
    found: np.ndarray = sums["divergence"][budget] / np.maximum(1, sums["count"][budget])
    return found


def _published(plan: Plan, payments: Payments, budget: float) -> Iterator[Candidate]:
    """Yield the published rules of several stages, or of one at a layer of their own, at what a price leaves them."""
    for name in published_schedules(plan):
        share = payments.most_of(lambda keep, name=name: _named_schedule(plan, name, keep), budget)  # type: ignore[misc]
        if share is not None and share < 1.0:
            first, *then = _named_schedule(plan, name, share).stages
            rule = (first.scorer, first.scorer_args, first.selector, first.selector_args)
            yield Scheduled.of(Candidate(name, *rule), float(first.keep), then)
    for name, cls in SCORERS.usable():
        scorer = cls()
        if name in ("fastv", EXIT) or not scorer.stages(plan.family.depth) or scorer.adaptive:
            continue
        if why_not(plan.family, PruningPolicy(name, keep=0.5)) is None:
            keep = payments.most_of(lambda share, name=name: PruningPolicy(name, keep=share), budget)  # type: ignore[misc]
            if keep is not None and keep < 1.0:
                yield Scheduled.of(NOTHING, 1.0, [Stage(name, keep=keep)])


def _named_schedule(plan: Plan, name: str, keep: float) -> PruningPolicy:
    return PruningPolicy.schedule(name, keep, plan.family.depth)
