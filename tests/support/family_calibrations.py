"""Calibrations of tiny models of any family: their data, and how often a pruned model gives the unpruned answer."""

from functools import cache
from unittest.mock import patch

import torch
from torch import Tensor, nn

from catp_lightning import PruningPolicy, prune
from catp_lightning.calibration.settings import CalibrationSettings
from catp_lightning.calibration.split import part_of
from catp_lightning.methods import Method
from catp_lightning.methods.observation import Observation, Signal
from catp_lightning.methods.scorers.controls import Random
from catp_lightning.methods.selectors import TopK
from catp_lightning.pruning.answers import compare_with_unpruned
from catp_lightning.pruning.pruner import applied
from tests.support.rows import Row

BATCHES, KEEP, CHECKED = 6, 0.4, 0.4
SETTINGS = {"max_new_tokens": 2, "do_sample": False}
QUICK = CalibrationSettings(probes=1, sizes=(0.25,), folds=2, checked=CHECKED)


@cache
def data(row: Row) -> list[dict[str, Tensor]]:
    """Batches of a row's samples, each time with other pixels."""
    found = []
    for number in range(BATCHES):
        inputs = row.inputs(range(len(row.samples())), pads=number % 3)
        generator = torch.Generator().manual_seed(number)
        for name in [name for name in inputs if name.startswith("pixel_values")]:
            noise = torch.randn(inputs[name].shape, generator=generator, dtype=torch.float64)
            inputs[name] = inputs[name] + 0.8 * noise * (inputs[name] != 0)  # zeros that fill up a batch stay so
        found.append(inputs)
    return found


@torch.no_grad()
def agreement(
    row: Row, policy: PruningPolicy, guide: nn.Module | None = None, batches: int = BATCHES
) -> tuple[float, float]:
    """Share of answers as the unpruned model's when it really is pruned, on the learning part and on the other."""
    same, model = [], row.model()
    with applied(model, policy, guide=guide) as pruner, compare_with_unpruned(pruner) as comparison:
        for batch in data(row)[:batches]:
            model.generate(**batch, **SETTINGS)
            same.append(comparison.same.pop())
    together = torch.cat(same).double()
    part = part_of(first_images(row), CHECKED)[: len(together)]
    return together[part == 0].mean().item(), together[part == 1].mean().item()


@cache
def first_images(row: Row) -> Tensor:
    """The fingerprint of each sample's first image, 0 for a sample without one: as a scorer sees them, counted here."""
    found = torch.cat([_first_images(row, batch) for batch in data(row)])
    assert len(found.unique()) > len(found) / 2, "other pixels have other fingerprints"
    return found


def _first_images(row: Row, batch: dict[str, Tensor]) -> Tensor:
    seen: list[Observation] = []

    class Noting(Random):
        def score(self, observation: Observation) -> Tensor:
            seen.append(observation)
            return super().score(observation)

    with (
        patch.object(PruningPolicy, "method", lambda self: Method(Noting(), TopK())),
        prune(row.model(), PruningPolicy("random", keep=0.9)) as pruning,
    ):
        row.model()(**row.oracle.forward_inputs(batch))
    tokens, marks = seen[0].valid.sum(1).tolist(), seen[0][Signal.IMAGE_HASH].tolist()
    first, image = [], 0
    for left in pruning.last.counts.tolist():
        first.append(marks[image] if left else 0)
        end = sum(tokens[:image]) + left
        while sum(tokens[:image]) < end:
            image += 1
    return torch.tensor(first)
