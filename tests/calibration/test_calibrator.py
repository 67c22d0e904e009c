"""A calibration chooses what is best on images it was not fitted to."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor

from catp_lightning import PolicyError, PruningError, prune
from catp_lightning.calibration import split
from catp_lightning.calibration.calibrator import Calibrator
from catp_lightning.calibration.fit.fitting import fit, fit_without
from catp_lightning.calibration.plan import Plan
from catp_lightning.calibration.replay.samples import Samples
from catp_lightning.calibration.search.candidates import Candidate, fitted_candidates
from catp_lightning.calibration.search.race import Race
from catp_lightning.calibration.search.ranks import token_ranks
from catp_lightning.calibration.split import FOLDS, fold_of, part_of, round_bounds, round_of
from catp_lightning.callbacks import CrossAttentionCalibration
from catp_lightning.methods.observation import join
from catp_lightning.models import find_family
from catp_lightning.utils.hashing import fingerprint
from tests.support.calibrations import calibrate, data, figures, images_of
from tests.support.models import faint_blip2
from tests.support.modules import Generating
from tests.support.planted import Planted, agrees, finished, highest_norm, recorded, slot_3, where
from tests.support.trainers import QUIET, loading


def test_the_one_slot_that_matters_is_found_and_always_kept(tmp_path: Path) -> None:
    module = Planted(slot_3)
    batches = data(64, 32, torch.float64)
    callback = calibrate(module, batches, tmp_path, keep=[2, 1])
    for policy in callback.policies:
        slots = policy.evidence["fitted"]["slots"]
        others = [abs(worth) for slot, worth in enumerate(slots) if slot != 3]
        assert slots[3] > 4 * max(others)
        assert not policy.evidence["control"]
        with torch.no_grad(), prune(module, policy) as pruning:
            module.net(**data(20, 20, torch.float64)[0])
        assert pruning.keep is not None and pruning.keep[:, 3].all() and pruning.keep.sum(1).eq(policy.keep).all()
        best = policy.evidence["candidates"][0]["choose"]
        worst_control = max(row["choose"]["divergence"] for row in policy.evidence["candidates"] if row["control"])
        assert best["divergence"] < worst_control / 10 and best["agreement"] > 0.7


def test_where_a_control_is_truly_best_it_is_the_policy_and_the_evidence_says_so(tmp_path: Path) -> None:
    module = Planted(highest_norm)
    policy = calibrate(module, data(64, 32, torch.float64), tmp_path / "p.json", keep=1).policies[0]
    assert (policy.scorer, policy.selector, policy.evidence["chosen"]) == ("l2-norm", None, "l2-norm")
    assert policy.evidence["control"] and policy.evidence["retention"][0]["control"]
    first, second = policy.evidence["candidates"][:2]
    assert first["name"] == "l2-norm" and first["control"] and not second["control"]
    assert first["choose"]["divergence"] < second["choose"]["divergence"] / 4


def test_each_image_is_answered_by_the_candidates_of_its_fold() -> None:
    module, batches = Planted(slot_3), data(24, 8, torch.float64)
    orders = [torch.randperm(8, generator=torch.Generator().manual_seed(fold)).tolist() for fold in range(FOLDS)]
    shared = Candidate("shared", "l2-norm")
    by_fold = [[Candidate("own", "position", {"weights": [float(x) for x in order]}), shared] for order in orders]
    competition = Race(
        "", Plan.of(find_family(module)), by_fold, [3, 5], [[0, 1], [0]], lambda images: part_of(images) == 0, None
    )
    samples = recorded(module, batches, Calibrator(Plan.of(find_family(module)), [0.5]))
    with torch.no_grad():
        for some in samples:
            competition.see(some)
    found, images = competition.sums.compute(), images_of(batches)
    learn, fold = part_of(images) == 0, fold_of(images)
    assert fold[learn].unique().tolist() == list(range(FOLDS)), "or this proves nothing"
    for budget, keep in enumerate((3, 5)):
        own = torch.stack([agrees(module, some[0].policy(keep), batches) for some in by_fold])
        expected = own[fold, torch.arange(24)][learn].sum()
        assert found["agreed"][budget, 0] == expected and found["count"][budget, 0] == learn.sum()
        assert not (own[:, learn] == own[:1, learn]).all(), "the folds' candidates differ"
    assert found["agreed"][0, 1] == agrees(module, shared.policy(3), batches)[learn].sum()
    assert found["count"][1, 1] == 0, "who is not alive at a budget does not answer there"


def test_a_calibration_cross_fits_and_saves_what_was_fitted_on_all_folds() -> None:
    calibrator = finished(Planted(slot_3), data(64, 32, torch.float64), [2])
    probing, plan = calibrator._probing, calibrator.plan
    assert probing.pairs is not None
    sums, pairs, columns = probing.sums.compute(), probing.pairs.compute(), probing.columns
    fitted = fit(sums, pairs, columns, calibrator.ties)
    whole = fitted_candidates(plan, fitted)
    assert calibrator.candidates[-len(whole) :] == whole
    first = calibrator._rounds[0].rules
    for fold in range(FOLDS):
        own = [
            one.policy(1.0)
            for one in fitted_candidates(plan, fit_without(fold, sums, pairs, columns, fitted, calibrator.ties))
        ]
        assert first[fold][-len(own) :] == own
        assert own != [one.policy(1.0) for one in whole], "a fold's rules are not those of all"
    policy = calibrator.policies()[0]
    assert policy.scorer_args == next(c for c in whole if c.name == policy.evidence["chosen"]).scorer_args
    assert policy.evidence["fitted"]["slots"] == fitted.slots


def divergences(calibrator: Calibrator, samples: list[Samples], keep: int) -> tuple[np.ndarray, Tensor]:
    """Of every cross-fitted candidate on every sample of the learning part: [C, N]; and their images."""
    found, images = [], []
    for some in samples:
        for fold in range(FOLDS):
            here = some.where((fold_of(some.images) == fold) & (part_of(some.images) == 0))
            if len(here.images):
                rules = [candidate.policy(1.0) for candidate in calibrator._cross_fitted[fold]]
                ranks = token_ranks(rules, here.seen, here.visual, 8)
                found.append(here.replay.compare(ranks < keep)[0].clamp(max=3))
                images.append(here.images)
    return torch.cat(found, 1).numpy(), torch.cat(images)


def test_in_each_round_the_best_quarter_by_all_divergence_so_far_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split, "FIRST_ROUND", 4)
    module, batches = Generating(faint_blip2(dtype=torch.float64)), data(60, 30, torch.float64)
    budgets: list[int | float] = [4, 1, 1.0]
    calibrator = finished(module, batches, budgets)
    samples = recorded(module, batches, calibrator)
    names = [candidate.name for candidate in calibrator.candidates]
    differ = 0
    for budget, keep in enumerate((4, 1, 8)):
        with torch.no_grad():
            each, images = divergences(calibrator, samples, keep)
        turn = round_of(images, round_bounds(len(images))).numpy()
        assert sorted(set(turn.tolist())) == [0, 1, 2]
        alive = list(range(len(names)))
        for number in range(3):
            assert calibrator._rounds[number].alive[budget] == alive
            so_far = {n: float(f"{each[n][turn <= number].mean():.9g}") for n in alive}
            alone = {n: float(f"{each[n][turn == number].mean():.9g}") for n in alive}
            ranking, other = (sorted(alive, key=lambda n: (by[n], names[n])) for by in (so_far, alone))
            alive = sorted(ranking[: -(-len(ranking) // 4)])
            differ += number > 0 and set(other[: len(alive)]) != set(alive)
        assert calibrator.chosen[budget] == ranking[0]
        rows = calibrator.policies()[budget].evidence["candidates"]
        row = figures(calibrator.policies()[budget], names[ranking[0]])
        assert row["choose"]["divergence"] == pytest.approx(each[ranking[0]].mean(), rel=1e-9)
        assert rows[0] == row
        checked = {row["name"] for row in rows if row["check"]}
        references = {candidate.name for candidate in calibrator.candidates if candidate.reference}
        assert checked == references | {names[ranking[0]]} and len(references) == 9
    assert differ, "the last round alone would have chosen others, or this proves nothing"
    everything = calibrator.policies()[2]
    assert everything.evidence["chosen"] == min(names), "where all are equal, the name decides"


@pytest.mark.parametrize("empty", [0, 1, 2])
def test_a_round_without_an_image_decides_nothing(empty: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds are drawn by image: with few images and many questions one can be empty."""
    monkeypatch.setattr(split, "FIRST_ROUND", 4)
    bounds = round_bounds(32)
    (some,) = where(data(160, 160, torch.float64), lambda images: round_of(images, bounds) != empty)
    batches = [{name: value[start : start + 28] for name, value in some.items()} for start in (0, 28)]
    calibrator = finished(Generating(faint_blip2(dtype=torch.float64)), batches, [2])
    images = images_of(batches)
    learn = int((part_of(images) == 0).sum())
    assert round_bounds(learn) == bounds and len(calibrator._rounds) == 3
    assert not calibrator._reduced[empty]["count"].any()
    alive = [*(some.alive[0] for some in calibrator._rounds), [*calibrator._ranking(0)]]
    if empty < 2:
        assert alive[empty + 1] == alive[empty], "nobody leaves by name"
    policy = calibrator.policies()[0]
    rows = policy.evidence["candidates"]
    assert all(row["choose"]["samples"] for row in rows) and rows[0]["choose"]["samples"] == learn
    assert rows[0]["name"] == policy.evidence["chosen"]


@pytest.mark.parametrize(("count", "enough"), [(1, False), (2, True), (4, False), (6, True)])
def test_a_handful_of_images_is_enough_or_refused(count: int, enough: bool) -> None:
    module, batches = Generating(faint_blip2(dtype=torch.float64)), data(count, count, torch.float64)
    parts = torch.bincount(part_of(images_of(batches)), minlength=2).tolist()
    assert all(parts) == enough
    if not enough:
        with pytest.raises(PolicyError, match=rf"got \{{'learn': {parts[0]}, 'check': {parts[1]}\}}: give some dozens"):
            finished(module, batches, [4])
    else:
        policy = finished(module, batches, [4]).policies()[0]
        assert agrees(module, policy, batches).shape == (count,) and policy.keep == 4


def test_nothing_is_decided_on_the_checking_part() -> None:
    """Other questions about its images change its own figures alone."""
    batches = data(40, 20, torch.float64)
    other = [{name: value.clone() for name, value in batch.items()} for batch in batches]
    for batch in other:
        checked = part_of(fingerprint(batch["pixel_values"])) == 1
        batch["input_ids"][checked, -1] = batch["input_ids"][checked, -1] % 90 + 4
    assert any((a["input_ids"] != b["input_ids"]).any() for a, b in zip(batches, other, strict=True))
    found = [finished(Generating(faint_blip2(dtype=torch.float64)), some, [2]).policies() for some in (batches, other)]
    for one, two in zip(*found, strict=True):
        assert (one.scorer, one.scorer_args, one.selector_args) == (two.scorer, two.scorer_args, two.selector_args)
        for key in ("chosen", "samples", "images", "fitted", "rank_correlation"):
            assert one.evidence[key] == two.evidence[key]
        pairs = list(zip(one.evidence["candidates"], two.evidence["candidates"], strict=True))
        assert all(a["name"] == b["name"] and a["choose"] == b["choose"] for a, b in pairs)
        assert any(a["check"] != b["check"] for a, b in pairs), "the check did change"


def test_what_is_observed_serves_every_candidate_that_can_be_fitted() -> None:
    calibrator = finished(Planted(slot_3), data(32, 16, torch.float64), [2])
    rules = [candidate.policy(1.0) for candidate in calibrator.candidates]
    needs = join(need for rule in rules for need in (rule.build_scorer().needs, rule.build_selector().needs))
    assert join([calibrator.needs, needs]) == dict(calibrator.needs)


def test_a_loader_that_cannot_be_read_twice_is_refused(tmp_path: Path) -> None:
    class Once(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
        def __init__(self) -> None:
            self.left = data(24, 8)

        def __iter__(self) -> Iterator[Any]:
            while self.left:
                yield self.left.pop()

    trainer = L.Trainer(callbacks=[CrossAttentionCalibration(tmp_path / "p.json")], **QUIET)
    with pytest.raises(PruningError, match="gave 3 batches at first and 0 when asked again"):
        trainer.predict(Generating(), loading(Once()))
    assert not (tmp_path / "p.json").exists()


@pytest.mark.parametrize("several", [False, True])
def test_every_pass_sees_the_batches_of_the_first(tmp_path: Path, several: bool) -> None:
    """Limits, several loaders and a module's own transfer hooks apply to all passes."""

    class Counting(Generating):
        def __init__(self) -> None:
            super().__init__()
            self.steps: list[tuple[int, ...]] = []

        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch["outer"]

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch["inner"]

        def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
            self.steps.append((dataloader_idx, batch_idx))
            return super().predict_step(batch, batch_idx)

    module = Counting()
    loader = loading([{"outer": {"inner": batch}} for batch in data(40, 8)])
    callback = CrossAttentionCalibration(tmp_path / "p.json")
    trainer = L.Trainer(callbacks=[callback], limit_predict_batches=3, **QUIET)
    trainer.predict(module, [loader, loader] if several else loader)
    samples = callback.policies[0].evidence["samples"]
    assert sum(samples.values()) == 24 * (1 + several)
    passes, each = 2 + len(round_bounds(samples["learn"])), 6 if several else 3
    assert len(module.steps) == passes * each
    assert module.steps == module.steps[:each] * passes
