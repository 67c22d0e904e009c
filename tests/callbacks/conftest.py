"""Fixtures of the tests of callbacks."""

import pytest

from tests.support.interrupted_calibrations import calibrate, small


@pytest.fixture
def small_calibrations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few samples, no report, and hardly a saving that nobody asked for."""
    small(monkeypatch.setattr)
    monkeypatch.setattr("catp_lightning.calibration.checkpoint.EVERY", 100)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The policy file of such a calibration that nothing interrupts."""
    with pytest.MonkeyPatch.context() as patch:
        small(patch.setattr)
        calibrate(path := tmp_path_factory.mktemp("undisturbed") / "p.json")
    return path.read_bytes()
