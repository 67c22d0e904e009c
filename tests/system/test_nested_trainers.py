"""Trainers beside each other and inside each other: each finds what it would have found alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback

from catp_lightning import CrossAttentionCalibration, PruningError, TokenPruning, prune
from tests.support.calibrations import calibrate, data
from tests.support.footprints import everything_of
from tests.support.models import random_blip2
from tests.support.modules import Answering, Generating, by_hand, same
from tests.support.policies import HALF, QUARTER
from tests.support.small_calibrations import QUICKEST
from tests.support.trainers import loading, trainer

pytestmark = pytest.mark.usefixtures("undrawn")


class Inside(Callback):
    """Runs something once inside a loop of another trainer; what it raises is kept."""

    def __init__(self, run: Callable[[], Any], hook: str = "on_validation_batch_end") -> None:
        self.found: list[Any] = []
        setattr(self, hook, lambda *args, **kwargs: self._once(run))

    def _once(self, run: Callable[[], Any]) -> None:
        if not self.found:
            try:
                self.found.append(run())
            except PruningError as error:
                self.found.append(error)


def test_one_callback_serves_two_trainers_one_after_the_other_and_by_turns() -> None:
    one, two, callback = Answering(), Answering(random_blip2(seed=1)), TokenPruning(HALF)
    before = [everything_of(module.model) for module in (one, two)]
    expected = [by_hand(one), by_hand(two)]
    assert not same(*expected)
    first, second = trainer(callback), trainer(callback)
    for _ in range(2):
        assert same(first.predict(one, one.loader()), expected[0])
        assert same(second.predict(two, two.loader()), expected[1])
    assert [everything_of(module.model) for module in (one, two)] == before


@pytest.mark.parametrize("hook", ["on_validation_start", "on_validation_batch_end", "on_validation_epoch_end"])
def test_a_prediction_inside_anothers_validation_leaves_both_what_they_are_alone(hook: str) -> None:
    outer, inner = Answering(), Answering(random_blip2(seed=1))
    expected = by_hand(outer), by_hand(inner, QUARTER)
    inside = Inside(lambda: trainer(TokenPruning(QUARTER)).predict(inner, inner.loader()), hook)
    pruning = TokenPruning(HALF)
    trainer(pruning, inside).validate(outer, outer.loader())
    assert same(outer.seen, expected[0]) and same(inside.found[0], expected[1])
    assert pruning.figures["catp/keep_share"] == 0.5


def test_pruning_the_same_model_inside_is_refused_and_the_outer_loop_goes_on() -> None:
    module = Answering()
    before, expected = everything_of(module.model), by_hand(module)
    sharing = Answering((module.model, module.inputs))
    inside = Inside(lambda: trainer(TokenPruning(QUARTER)).predict(sharing, module.loader()))
    pruning = TokenPruning(HALF)
    trainer(pruning, inside).validate(module, module.loader())
    assert isinstance(inside.found[0], PruningError) and "being pruned already" in str(inside.found[0])
    assert same(module.seen, expected) and pruning.figures["catp/tokens_kept"] == 4
    assert everything_of(module.model) == before


@pytest.mark.parametrize("stages", [("validate", "test", "predict"), ("validate",)])
def test_one_callback_in_a_trainer_inside_anothers_loop_is_refused_and_the_outer_loop_goes_on(stages: Any) -> None:
    """Its end would be the outer one's end: the rest of that loop would run unpruned, without a word."""
    outer, inner, pruning = Answering(), Answering(random_blip2(seed=1)), TokenPruning(HALF, stages=stages)
    before, expected = [everything_of(module.model) for module in (outer, inner)], by_hand(outer)
    inside = Inside(lambda: trainer(pruning).predict(inner, inner.loader()))
    trainer(pruning, inside).validate(outer, outer.loader())
    assert isinstance(inside.found[0], PruningError)
    assert "This TokenPruning is at work in another Trainer" in str(inside.found[0])
    assert same(outer.seen, expected) and pruning.figures["catp/keep_share"] == 0.5
    assert [everything_of(module.model) for module in (outer, inner)] == before
    assert same(trainer(pruning).validate(inner, inner.loader()) and inner.seen, by_hand(inner)), "then it serves"


@pytest.mark.slow
def test_a_model_that_is_calibrated_cannot_be_pruned_meanwhile_and_the_policy_is_that_of_a_calibration_alone(
    tmp_path: Path,
) -> None:
    """Calibration would take pruned answers for those of the whole model."""
    batches = data(24, 12)
    alone = calibrate(Generating(), batches, tmp_path / "alone.json", calibration=QUICKEST).policies
    module, other = Generating(), Answering()
    before, loader = everything_of(module.net), loading(batches)

    def meddle() -> list[str]:
        found = []
        for run in (
            lambda: prune(module, HALF).__enter__(),
            lambda: trainer(CrossAttentionCalibration(tmp_path / "inner.json")).predict(Generating(module.net), loader),
        ):
            with pytest.raises(PruningError) as raised:
                run()
            found.append(str(raised.value))
        trainer(TokenPruning(HALF)).validate(other, other.loader())  # another model may be
        return found

    inside = Inside(meddle, "on_predict_batch_start")
    calibration = CrossAttentionCalibration(tmp_path / "p.json", settings=QUICKEST)
    trainer(calibration, inside).predict(module, loader)
    assert all("being pruned already, or calibrated" in said for said in inside.found[0])
    assert [policy.to_dict() for policy in calibration.policies] == [policy.to_dict() for policy in alone]
    assert same(other.seen, by_hand(other)) and everything_of(module.net) == before


def test_a_calibration_that_fails_while_entering_is_as_if_it_had_not_begun(tmp_path: Path) -> None:
    module, batches = Generating(), data(24, 12)
    before = everything_of(module.net)
    calibration = CrossAttentionCalibration(tmp_path / "p.json", scorer="stride", settings=QUICKEST)
    loader = loading(batches)
    with prune(module, HALF), pytest.raises(PruningError, match="being pruned already"):
        trainer(calibration).predict(module, loader)
    assert calibration._run is None and everything_of(module.net) == before
    trainer(calibration).predict(module, loader)
    assert len(calibration.policies) == 1
