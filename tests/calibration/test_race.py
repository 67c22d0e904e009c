"""Rounds of the competition: losers leave early, and nothing is decided where there is no image."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from catp_lightning.calibration.search.candidate import Candidate
from catp_lightning.calibration.search.ranks import token_ranks
from catp_lightning.calibration.search.routes import COMPLEMENTS
from catp_lightning.calibration.settings import DEFAULTS
from catp_lightning.calibration.split import fold_of, part_of, round_bounds, round_of
from tests.support.calibrations import QUICK, calibrate, data, figures, images_of
from tests.support.models import faint_blip2
from tests.support.modules import Generating
from tests.support.planted import Finished, finished, where

FOLDS = DEFAULTS.folds


SOON = replace(QUICK, first_round=4)
"""Rounds begin with few samples: small data have several."""


@pytest.mark.slow
def test_losers_leave_early_and_controls_are_checked_all_the_same(tmp_path: Path) -> None:
    policy = calibrate(Generating(), data(64, 16), tmp_path / "p.json", calibration=SOON).policies[0]
    rows = policy.evidence["candidates"]
    counts = sorted({row["choose"]["samples"] for row in rows})
    assert len(counts) == len(round_bounds(policy.evidence["samples"]["learn"], 4)) == 3
    full = [row for row in rows if row["choose"]["samples"] == counts[-1]]
    assert counts[-1] == policy.evidence["samples"]["learn"]
    assert len([row for row in rows if row["choose"]["samples"] == counts[0]]) > len(rows) / 2
    assert all(row["check"] for row in rows if row["control"]), "however they do, controls are in the table"
    assert policy.evidence["chosen"] == min(full, key=lambda row: row["choose"]["divergence"])["name"]


def divergences(calibrator: Finished, keep: int) -> tuple[np.ndarray, Tensor]:
    """Of every cross-fitted candidate on every sample of the learning part: [C, N]; and their images."""
    found, images = [], []
    for some in calibrator.samples:
        for fold in range(FOLDS):
            here = some.where((fold_of(some.images) == fold) & (part_of(some.images) == 0))
            if len(here.images):
                rules = calibrator.rounds[0].candidates[fold]
                ranks = token_ranks([rule.method for rule in rules], here.seen, here.visual, 8)
                found.append(here.replay.compare(ranks < keep)[0].clamp(max=3))
                images.append(here.images)
    return torch.cat(found, 1).numpy(), torch.cat(images)


def plainest(candidates: Sequence[Candidate], each: np.ndarray, ranking: Sequence[int]) -> int:
    """Of the candidates in `ranking`, best first, that no paired standard error tells from the best: [C, N]."""
    best = next(n for n in ranking if not candidates[n].reversed)
    lead = each[best] - each[ranking[0]]
    if lead.mean() > 2 * lead.std(ddof=1) / len(lead) ** 0.5:
        best = ranking[0]
    behind = {n: each[n] - each[best] for n in ranking if candidates[best].reversed or not candidates[n].reversed}
    level = [n for n, lost in behind.items() if lost.mean() <= lost.std(ddof=1) / len(lost) ** 0.5 + 1e-12]
    return min(level, key=lambda n: (candidates[n].fitted, ranking.index(n)))


@pytest.mark.slow
def test_in_each_round_the_best_quarter_by_all_divergence_so_far_goes_on() -> None:
    module, batches = Generating(faint_blip2(dtype=torch.float64)), data(60, 30, torch.float64)
    budgets: list[int | float] = [4, 1, 1.0]
    calibrator = finished(module, batches, budgets, settings=SOON)
    policies = calibrator.policies()
    candidates = calibrator.result.candidates
    names = [candidate.name for candidate in candidates]
    differ = 0
    for budget, keep in enumerate((4, 1, 8)):
        with torch.no_grad():
            each, images = divergences(calibrator, keep)
        turn = round_of(images, round_bounds(len(images), 4)).numpy()
        assert sorted(set(turn.tolist())) == [0, 1, 2]
        alive = list(range(len(names)))
        for number in range(3):
            assert calibrator.rounds[number].alive[budget] == alive
            so_far = {n: float(f"{each[n][turn <= number].mean():.9g}") for n in alive}
            alone = {n: float(f"{each[n][turn == number].mean():.9g}") for n in alive}
            ranking, other = (sorted(alive, key=lambda n: (by[n], names[n])) for by in (so_far, alone))
            quarter = -(-len(ranking) // 4)
            differ += number > 0 and set(other[:quarter]) != set(ranking[:quarter])
            choice = plainest(candidates, each[:, turn <= number], ranking)
            unfitted = next(n for n in ranking if not candidates[n].fitted)
            if number < 2:
                alive = list(calibrator.rounds[number + 1].alive[budget])
                more = set(alive) - {*ranking[:quarter], choice, unfitted}
                assert {*ranking[:quarter], choice, unfitted} <= set(alive) <= set(ranking), "and for some questions"
                assert len(more) < COMPLEMENTS
        assert calibrator.result.chosen[budget] == choice
        rows = policies[budget].evidence["candidates"]
        row = figures(policies[budget], names[choice])
        assert row["choose"]["divergence"] == pytest.approx(each[choice].mean(), rel=1e-9)
        assert rows[0] == figures(policies[budget], names[ranking[0]])
        checked = {row["name"] for row in rows if row["check"]}
        references = {candidate.name for candidate in candidates if candidate.reference}
        assert checked == references | {names[choice]} and len(references) == 9
    assert differ, "the last round alone would have chosen others, or this proves nothing"
    everything = policies[2]
    plain = [candidate.name for candidate in candidates if not candidate.fitted]
    assert everything.evidence["chosen"] == min(plain), "where all are equal, the name of a plain rule decides"


@pytest.mark.slow
@pytest.mark.parametrize("empty", [0, 2])
def test_a_round_without_an_image_decides_nothing(empty: int) -> None:
    """Rounds are drawn by image: with few images and many questions one can be empty."""
    bounds = round_bounds(32, 4)
    (some,) = where(data(160, 160, torch.float64), lambda images: round_of(images, bounds) != empty)
    batches = [{name: value[start : start + 28] for name, value in some.items()} for start in (0, 28)]
    calibrator = finished(Generating(faint_blip2(dtype=torch.float64)), batches, [2], settings=SOON)
    images = images_of(batches)
    learn = int((part_of(images) == 0).sum())
    assert round_bounds(learn, 4) == bounds and len(calibrator.rounds) == 3
    assert not calibrator.standings.rounds[empty].sums["count"].any()
    alive = [some.alive[0] for some in calibrator.rounds]
    alive.append(calibrator.standings.ranking(0, alive[-1]))
    if empty < 2:
        assert alive[empty + 1] == alive[empty], "nobody leaves by name"
    policy = calibrator.policies()[0]
    rows = policy.evidence["candidates"]
    assert all(row["choose"]["samples"] for row in rows) and rows[0]["choose"]["samples"] == learn
    assert figures(policy, policy.evidence["chosen"])["choose"]["samples"] == learn
