"""Models whose important token depends on the question: calibration finds a rule that knows the question."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from catp_lightning.calibration import calibrator
from catp_lightning.calibration.search.candidate import Routing
from catp_lightning.calibration.settings import DEFAULTS
from tests.support.calibrations import data
from tests.support.modules import Batch
from tests.support.planted import Planted, agrees, finished, highest_norm, slot_3

SETTINGS = replace(DEFAULTS, probes=8)


def slot_5(outputs: Tensor) -> Tensor:
    return slot_3(outputs).roll(2, 1)


class AskedPlanted(Planted):
    """A question that ends with the word 50 is answered from one token, any other from another."""

    def __init__(self, one: object, other: object) -> None:
        self.asked = torch.zeros(0, dtype=torch.bool)

        def gate(outputs: Tensor) -> Tensor:
            return one(outputs).where(self.asked[:, None], other(outputs))  # type: ignore[operator]

        super().__init__(gate)

    def predict_step(self, batch: Batch, batch_idx: int = 0) -> Tensor:
        self.asked = batch["input_ids"][:, -1] == 50
        return super().predict_step(batch, batch_idx)


def asking(count: int, batch: int) -> tuple[list[Batch], list[Batch]]:
    """Two kinds of questions, about images to calibrate on and about as many others."""
    (everything,) = data(2 * count, 2 * count, torch.float64)
    everything["input_ids"][:, -4:] = torch.tensor([10, 11, 12, 13])
    everything["input_ids"][::2, -4:] = torch.tensor([53, 52, 51, 50])
    starts = range(0, 2 * count, batch)
    batches = [{name: value[start : start + batch] for name, value in everything.items()} for start in starts]
    return batches[: len(batches) // 2], batches[len(batches) // 2 :]


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
