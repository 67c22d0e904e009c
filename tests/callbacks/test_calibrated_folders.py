"""A folder that was calibrated before: what stays there of the earlier run is told, at once and at each loading."""

import warnings
from pathlib import Path

import pytest

from catp_lightning import PruningPolicy
from tests.support.interrupted_calibrations import calibrate, small, sorted_batches


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch.setattr)


def test_a_folder_that_is_calibrated_anew_for_fewer_budgets_says_what_is_left_of_before(tmp_path: Path) -> None:
    folder = tmp_path / "policies"
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(held keep|different calibrations)")
        calibrate(folder, keep=[0.5, 0.25])
        old = PruningPolicy.load(folder, keep=0.25)
        assert PruningPolicy.load(folder, keep=0.5).evidence["retention"] == old.evidence["retention"]
    with pytest.warns(UserWarning, match=r"held keep-0\.25\.json before, which this calibration did not measure"):
        new = calibrate(folder, batches=sorted_batches()[::-1], keep=[0.5]).policies[0]
    with pytest.warns(UserWarning, match=r"different calibrations: keep-0\.25\.json, which is used, .*keep-0\.5\.json"):
        assert PruningPolicy.load(folder, keep=0.25) == old, "nothing that was measured is deleted"
    with pytest.warns(UserWarning, match=r"different calibrations: keep-0\.5\.json, which is used"):
        assert PruningPolicy.load(folder, keep=0.5) == new
    (folder / "keep-0.25.json").unlink()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*different calibrations")
        assert PruningPolicy.load(folder) == new
