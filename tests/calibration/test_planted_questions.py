"""Models whose important token depends on the question: calibration finds a rule that knows the question."""

from dataclasses import replace

import pytest
from torch import Tensor

from catp_lightning.calibration import calibrator
from catp_lightning.calibration.search.candidate import Routing
from catp_lightning.calibration.settings import DEFAULTS
from tests.support.planted import AskedPlanted, Planted, agrees, asking, finished, highest_norm, slot_3

SETTINGS = replace(DEFAULTS, probes=8)


def slot_5(outputs: Tensor) -> Tensor:
    return slot_3(outputs).roll(2, 1)


def blind(name: str) -> bool:
    return "by question" not in name and "learned" not in name


def check(module: AskedPlanted, keep: int, count: int, more: float, least: float) -> None:
    batches, fresh = asking(count, 24)
    calibrated = finished(module, batches, [keep], settings=SETTINGS)
    policy = calibrated.policies()[0]
    assert not blind(policy.evidence["chosen"]), policy.evidence["chosen"]
    own = agrees(module, policy, fresh).double().mean()
    by_name = {one.name: one for one in calibrated.result.candidates}
    names = [row["name"] for row in policy.evidence["candidates"] if blind(row["name"])]
    assert len(names) > 20
    best = max(agrees(module, by_name[name].policy(keep), fresh).double().mean() for name in names[:12])
    assert own > best + more and own > least, (own, best)


@pytest.mark.slow
def test_a_network_that_knows_the_question_is_trained_and_beats_every_rule_that_does_not_know_it() -> None:
    check(AskedPlanted(slot_3, slot_5), 1, 72, 0.1, 0.8)


@pytest.mark.slow
def test_questions_are_routed_to_the_rules_that_are_right_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrator, "learn", lambda *_: None)
    module = AskedPlanted(slot_3, highest_norm)
    batches, _ = asking(24, 24)
    check(module, 1, 72, 0.05, 0.9)
    plain = finished(Planted(slot_3), batches, [1], settings=SETTINGS)
    assert not any(isinstance(one, Routing) for one in plain.result.candidates), "where one rule is right for all"
