"""Fixtures of the tests of callbacks."""

from collections.abc import Iterator

import pytest

from tests.support.sent_signals import calibrate


@pytest.fixture(scope="module")
def no_report() -> Iterator[None]:
    """Calibrations draw no figures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("catp_lightning.callbacks.calibration.report", lambda *_: [])
        yield


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The policy file of a calibration that nothing interrupts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("catp_lightning.callbacks.calibration.report", lambda *_: [])
        calibrate(path := tmp_path_factory.mktemp("undisturbed") / "p.json")
    return path.read_bytes()
