"""What each slot is worth is found from sums alone, and calibration builds its sets from it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from torch import Tensor
from torch.utils.data import DataLoader

from catp_lightning import PruningError, PruningPolicy, prune
from catp_lightning.calibration.calibrator import Calibrator
from catp_lightning.calibration.recorder import Recorder
from catp_lightning.calibration.slots import PROBES, SlotSums, random_subset
from catp_lightning.calibration.statistics import part_of
from catp_lightning.callbacks import CrossAttentionCalibration
from catp_lightning.families import find_family
from catp_lightning.fingerprint import fingerprint
from tests.test_calibration import SHORT, Module, data

WORTH = torch.tensor([3.0, 0.0, -1.0, 0.5, 0.0, 2.0])


def probes(samples: int, noise: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Planted: each slot adds its worth, every sample has a level of its own."""
    generator = torch.Generator().manual_seed(seed)
    images, visual = torch.arange(samples), torch.ones(samples, 6, dtype=torch.bool)
    counts = torch.full((samples,), 3)
    kept = torch.stack([random_subset(images, visual, counts, number) for number in range(16)]).double()
    level = 5 * torch.randn(samples, generator=generator)
    gain = kept @ WORTH.double() + level + noise * torch.randn(16, samples, generator=generator)
    return kept, gain


def test_a_planted_worth_is_recovered_and_noise_is_worth_nothing() -> None:
    sums = SlotSums(2, 6)
    kept, gain = probes(300, noise=0.5)
    for start in range(0, 300, 70):
        sums.update(0, torch.zeros_like(kept[:, start : start + 70]), gain[:, start : start + 70])
        sums.update(1, kept[:, start : start + 70], gain[:, start : start + 70])
    weights, samples = sums.compute()
    assert samples == 300
    expected = WORTH - WORTH.mean()  # every probe keeps three: only differences can be told
    torch.testing.assert_close(weights[1] - weights[1].mean(), expected.double(), atol=0.1, rtol=0)
    assert not weights[0].any(), "a budget at which nothing varies teaches nothing"
    blind = SlotSums(1, 6)
    blind.update(0, kept, torch.randn(16, 300, generator=torch.Generator().manual_seed(1)))
    assert blind.compute()[0].abs().max() < 0.1


def test_the_fit_from_sums_is_scikit_learns_ridge_on_all_rows() -> None:
    kept, gain = probes(40, noise=1.0)
    sums = SlotSums(1, 6)
    sums.update(0, kept, gain)
    rows = (kept - kept.mean(0)).flatten(0, 1).numpy()
    target = (gain - gain.mean(0)).flatten().numpy()
    alpha = 0.01 * np.diag(rows.T @ rows).mean()
    ridge = Ridge(alpha=alpha, fit_intercept=False).fit(rows, target)
    np.testing.assert_allclose(sums.compute()[0][0].numpy(), ridge.coef_, rtol=1e-9)


def test_random_subsets_are_fair_and_depend_on_image_and_number_alone() -> None:
    images, visual = torch.arange(4000) * 7919, torch.ones(4000, 8, dtype=torch.bool)
    counts = torch.full((4000,), 3)
    subset = random_subset(images, visual, counts, 5)
    assert subset.sum(1).eq(3).all()
    assert torch.equal(random_subset(images[10:20], visual[10:20], counts[10:20], 5), subset[10:20])
    assert not torch.equal(random_subset(images, visual, counts, 6), subset)
    assert (subset.double().mean(0) - 3 / 8).abs().max() < 0.03
    pairs = subset.double().T @ subset.double() / 4000
    off = pairs[~torch.eye(8, dtype=torch.bool)]
    assert (off - 3 / 8 * 2 / 7).abs().max() < 0.03, "slots are drawn independently of each other"
    visual = torch.arange(8) < torch.tensor([8, 4])[:, None]
    shorter = random_subset(torch.tensor([1, 2]), visual, torch.tensor([3, 3]), 0)
    assert shorter.sum(1).tolist() == [3, 3] and not (shorter & ~visual).any()


def test_a_probe_is_the_answers_log_probability_when_the_model_is_pruned_to_that_subset() -> None:
    module, batch = Module(dtype=torch.float64), data(24, 24, torch.float64)[0]
    family = find_family(module)
    calibrator = Calibrator(family, [3])
    recorder = Recorder(family, calibrator.needs)
    with torch.no_grad():
        with recorder.recording():
            sequences = module.net.generate(**batch, **SHORT)
            with recorder.recorded() as ((replay, seen),):
                calibrator.probe(replay, seen)
        new = sequences.shape[1] - batch["input_ids"].shape[1]
        answer, images = sequences[:, -new:], fingerprint(batch["pixel_values"])
        valid = (answer == 2).long().cumsum(1) - (answer == 2).long() == 0
        grown = {
            "input_ids": sequences,
            "attention_mask": torch.cat([batch["attention_mask"], torch.ones(24, new, dtype=torch.long)], 1),
            "pixel_values": batch["pixel_values"],
        }
        kept, gain = [], []
        for number in range(PROBES):
            subset = random_subset(images, torch.ones(24, 8, dtype=torch.bool), torch.full((24,), 3), number)
            with prune(module, PruningPolicy(), choose=lambda visual: subset):  # noqa: B023
                logits = module.net(**grown).logits[:, -new - 1 : -1].log_softmax(-1)
            each = logits.gather(2, answer[..., None])[..., 0] * valid
            kept.append(subset.double())
            gain.append((each.sum(1) / valid.sum(1)).clamp(min=-10))
    fit = part_of(images) == -1
    assert 4 <= fit.sum() <= 14
    expected = SlotSums(1, 8)
    expected.update(0, torch.stack(kept)[:, fit], torch.stack(gain)[:, fit])
    torch.testing.assert_close(calibrator.slots.gram, expected.gram)
    torch.testing.assert_close(calibrator.slots.moment, expected.moment)
    assert expected.moment.abs().max() > 0.1
    calibrator.fit()
    weights = calibrator.slots.compute()[0][0].tolist()
    slots = next(candidate for candidate in calibrator.candidates[0] if candidate.name == "slots")
    assert slots.scorer_args == {"weights": weights}
    with torch.no_grad(), prune(module, slots.policy(3)) as pruning:
        module.net(**batch)
    best = sorted(range(8), key=lambda slot: -weights[slot])[:3]
    assert pruning.keep.nonzero()[:, 1].view(24, 3).tolist() == [sorted(best)] * 24


def test_a_loader_that_cannot_be_read_twice_is_refused(tmp_path: Path) -> None:
    class Once(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
        def __init__(self) -> None:
            self.left = data(24, 8)

        def __iter__(self) -> Iterator[Any]:
            while self.left:
                yield self.left.pop()

    callback = CrossAttentionCalibration(tmp_path / "p.json")
    trainer = L.Trainer(callbacks=[callback], accelerator="cpu", logger=False, enable_progress_bar=False)
    with pytest.raises(PruningError, match="gave 3 batches at first and 0 when asked again"):
        trainer.predict(Module(), DataLoader(Once(), batch_size=None))
    assert not (tmp_path / "p.json").exists()


@pytest.mark.parametrize("several", [False, True])
def test_the_second_pass_sees_the_batches_of_the_first(tmp_path: Path, several: bool) -> None:
    """Limits, several loaders and a module's own transfer hooks apply to both passes."""

    class Counting(Module):
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
    loader = DataLoader([{"outer": {"inner": batch}} for batch in data(40, 8)], batch_size=None)
    callback = CrossAttentionCalibration(tmp_path / "p.json")
    settings: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    trainer = L.Trainer(callbacks=[callback], limit_predict_batches=4, **settings)
    trainer.predict(module, [loader, loader] if several else loader)
    half = len(module.steps) // 2
    assert half == (8 if several else 4)
    assert module.steps[:half] == module.steps[half:]
    samples = PruningPolicy.load(tmp_path / "p.json").evidence["samples"]
    assert sum(samples.values()) == 32 * (1 + several)
