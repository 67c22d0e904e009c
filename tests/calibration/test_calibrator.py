"""A calibration chooses what is best on images it was not fitted to."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from catp_lightning import PolicyError, prune
from catp_lightning.calibration.calibrator import needs_of
from catp_lightning.calibration.fit import learning
from catp_lightning.calibration.fit.fitting import fit, fit_without
from catp_lightning.calibration.plan import Plan
from catp_lightning.calibration.search.candidate import Candidate
from catp_lightning.calibration.search.candidates import fitted_candidates
from catp_lightning.calibration.search.race import Race
from catp_lightning.calibration.settings import DEFAULTS, CalibrationSettings
from catp_lightning.calibration.split import fold_of, part_of
from catp_lightning.methods.network import Network
from catp_lightning.methods.observation import join
from catp_lightning.methods.scorers import Learned
from catp_lightning.models import find_family
from catp_lightning.utils.hashing import fingerprint
from tests.support.calibrations import QUICK, calibrate, data, images_of
from tests.support.models import faint_blip2
from tests.support.modules import Generating
from tests.support.planted import Planted, agrees, finished, highest_norm, recorded, slot_3

FOLDS = DEFAULTS.folds


def test_the_one_slot_that_matters_is_found_and_always_kept(tmp_path: Path) -> None:
    module = Planted(slot_3)
    batches = data(64, 32, torch.float64)
    callback = calibrate(module, batches, tmp_path, keep=[2], calibration=CalibrationSettings(probes=24))
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


@pytest.mark.slow
def test_where_a_control_is_truly_best_it_is_the_policy_and_the_evidence_says_so(tmp_path: Path) -> None:
    module = Planted(highest_norm)
    policy = calibrate(module, data(64, 32, torch.float64), tmp_path / "p.json", keep=1, calibration=QUICK).policies[0]
    assert (policy.scorer, policy.selector, policy.evidence["chosen"]) == ("l2-norm", None, "l2-norm")
    assert policy.evidence["control"] and policy.evidence["retention"][0]["control"]
    first, second = policy.evidence["candidates"][:2]
    assert first["name"] == "l2-norm" and first["control"] and not second["control"]
    assert first["choose"]["divergence"] < second["choose"]["divergence"] / 4


@pytest.mark.slow
def test_each_image_is_answered_by_the_candidates_of_its_fold() -> None:
    module, batches = Planted(slot_3), data(24, 8, torch.float64)
    orders = [torch.randperm(8, generator=torch.Generator().manual_seed(fold)).tolist() for fold in range(FOLDS)]
    shared = Candidate("shared", "l2-norm")
    by_fold = [[Candidate("own", "position", {"weights": [float(x) for x in order]}), shared] for order in orders]
    competition = Race(
        "",
        Plan.of(find_family(module)),
        by_fold,
        [3, 5],
        [[0, 1], [0]],
        lambda samples: part_of(samples.images) == 0,
        {},
        None,
    )
    samples = recorded(module, batches)
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


def network_of(candidates: Sequence[Candidate]) -> Network:
    """The network of all candidates that have one."""
    scorers = {one.method.scorer for one in candidates if one.scorer == "learned"}
    (network,) = (scorer.network for scorer in scorers if isinstance(scorer, Learned))
    assert network is not None
    return network


@pytest.mark.slow
def test_a_calibration_cross_fits_and_saves_what_was_fitted_on_all_folds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning, "GATE", -100.0)  # networks compete, however little they explain
    calibrator = finished(Planted(slot_3), data(64, 32, torch.float64), [2])
    probing, plan, ties = calibrator.probing, calibrator.plan, calibrator.standings.ties
    assert probing.pairs is not None
    sums, pairs, columns = probing.sums.compute(), probing.pairs.compute(), probing.columns
    fitted = fit(sums, pairs, columns, ties)
    whole = fitted_candidates(plan, replace(fitted, network=network_of(calibrator.result.candidates)))
    assert calibrator.result.candidates[-len(whole) :] == whole
    networks = {network_of(whole)}
    for fold, first in enumerate(calibrator.rounds[0].candidates):
        found = fit_without(fold, sums, pairs, columns, fitted, ties)
        own = fitted_candidates(plan, replace(found, network=network_of(first)))
        assert first[-len(own) :] == own
        assert own != whole, "a fold's rules are not those of all"
        networks.add(network_of(first))
    assert len(networks) == FOLDS + 1, "each network has seen other samples"
    policy = calibrator.policies()[0]
    assert policy.scorer_args == next(c for c in whole if c.name == policy.evidence["chosen"]).scorer_args
    assert policy.evidence["fitted"]["slots"] == fitted.slots


@pytest.mark.slow
@pytest.mark.parametrize(("count", "enough"), [(1, False), (2, True), (4, False), (6, True)])
def test_a_handful_of_images_is_enough_or_refused(count: int, enough: bool) -> None:
    module, batches = Generating(faint_blip2(dtype=torch.float64)), data(count, count, torch.float64)
    parts = torch.bincount(part_of(images_of(batches)), minlength=2).tolist()
    assert all(parts) == enough
    if not enough:
        with pytest.raises(PolicyError, match=rf"got \{{'learn': {parts[0]}, 'check': {parts[1]}\}}: give some dozens"):
            finished(module, batches, [4], settings=QUICK)
    else:
        policy = finished(module, batches, [4], settings=QUICK).policies()[0]
        assert agrees(module, policy, batches).shape == (count,) and policy.keep == 4


@pytest.mark.slow
def test_nothing_is_decided_on_the_checking_part() -> None:
    """Other questions about its images change its own figures alone."""
    batches = data(40, 20, torch.float64)
    other = [{name: value.clone() for name, value in batch.items()} for batch in batches]
    for batch in other:
        checked = part_of(fingerprint(batch["pixel_values"])) == 1
        batch["input_ids"][checked, -1] = batch["input_ids"][checked, -1] % 90 + 4
    assert any((a["input_ids"] != b["input_ids"]).any() for a, b in zip(batches, other, strict=True))
    found = [
        finished(Generating(faint_blip2(dtype=torch.float64)), some, [2], settings=QUICK).policies()
        for some in (batches, other)
    ]
    for one, two in zip(*found, strict=True):
        assert (one.scorer, one.scorer_args, one.selector_args) == (two.scorer, two.scorer_args, two.selector_args)
        for key in ("chosen", "samples", "images", "fitted", "rank_correlation"):
            assert one.evidence[key] == two.evidence[key]
        pairs = list(zip(one.evidence["candidates"], two.evidence["candidates"], strict=True))
        assert all(a["name"] == b["name"] and a["choose"] == b["choose"] for a, b in pairs)
        assert any(a["check"] != b["check"] for a, b in pairs), "the check did change"


@pytest.mark.slow
def test_what_is_observed_serves_every_candidate_that_can_be_fitted() -> None:
    calibrator = finished(Planted(slot_3), data(32, 16, torch.float64), [2], settings=QUICK)
    rules = [candidate.policy(1.0) for candidate in calibrator.result.candidates]
    observed, needs = needs_of(calibrator.plan), join(rule.method().needs for rule in rules)
    assert join([observed, needs]) == dict(observed)
