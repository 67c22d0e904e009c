"""Sums of parts are the sum of all, whatever the batches."""

import pytest
import torch
from scipy.stats import spearmanr

from catp_lightning.calibration.fit.sums import ImageSet, ProbeSums
from catp_lightning.calibration.search.sums import CandidateSums
from catp_lightning.calibration.settings import DEFAULTS
from catp_lightning.calibration.statistics.rank_correlation import correlations

FOLDS = DEFAULTS.folds


def test_sums_of_parts_are_the_sum_of_all() -> None:
    torch.manual_seed(0)
    diverged, agreed = torch.rand(2, 30), torch.rand(2, 30) > 0.4
    whole, left, right = CandidateSums(2, 3), CandidateSums(2, 3), CandidateSums(2, 3)
    who = torch.tensor([2, 0])
    whole.update(1, who, diverged, agreed)
    left.update(1, who, diverged[:, :11], agreed[:, :11])
    right.update(1, who, diverged[:, 11:], agreed[:, 11:])
    for name, value in whole.compute().items():
        assert left.compute()[name] + right.compute()[name] == pytest.approx(value, rel=1e-12)
    assert whole.compute()["agreed"].tolist() == [[0, 0, 0], [int(agreed[1].sum()), 0, int(agreed[0].sum())]]
    assert whole.compute()["count"].tolist() == [[0, 0, 0], [30, 0, 30]]


def test_probe_sums_are_those_of_rows_centred_by_sample_whatever_the_batches() -> None:
    torch.manual_seed(0)
    fold, rows, gain = torch.randint(0, FOLDS, (9,)), torch.randn(4, 9, 3), torch.randn(4, 9)
    whole, parts = ProbeSums(3), ProbeSums(3)
    whole.update(fold, rows, gain)
    for some in (slice(0, 2), slice(2, 9)):
        parts.update(fold[some], rows[:, some], gain[:, some])
    found, other = whole.compute(), parts.compute()
    for number in range(FOLDS):
        here = (rows - rows.mean(0)).double()[:, fold == number].flatten(0, 1).numpy()
        y = (gain - gain.mean(0)).double()[:, fold == number].flatten().numpy()
        assert found.gram[number] == pytest.approx(here.T @ here, abs=1e-6)
        assert found.moment[number] == pytest.approx(here.T @ y, abs=1e-6)
        assert found.squares[number] == pytest.approx(y @ y, abs=1e-6) and found.rows[number] == len(y)
    assert other.gram == pytest.approx(found.gram, rel=1e-12) and other.moment == pytest.approx(found.moment, rel=1e-12)


def test_images_are_counted_once_and_layers_are_correlated_by_rank() -> None:
    images = ImageSet()
    images.update(torch.tensor([3, -1, 3]))
    images.update(torch.tensor([-1, 8]))
    assert images.compute().tolist() == [-1, 3, 8]
    torch.manual_seed(1)
    scores = torch.randn(6, 3, 9)
    alike = correlations(scores[:2]) + correlations(scores[2:])
    expected = [spearmanr(image.T.numpy()).statistic for image in scores]
    assert alike.numpy() == pytest.approx(sum(expected), abs=1e-11)
