"""Fixtures of the tests of the whole project."""

import gc
from collections.abc import Iterator

import pytest

from catp_lightning import PruningPolicy
from catp_lightning.calibration import checkpoint as resume
from tests.support.reports import unreported
from tests.support.small_calibrations import calibrate


@pytest.fixture(scope="module")
def undrawn() -> Iterator[None]:
    """Figures of reports are written, but not drawn, and examples left out: both take longer than a calibration."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("catp_lightning.calibration.report.report.png", lambda figure: b"\x89PNG" * 200)
        patch.setattr("catp_lightning.callbacks.calibration.examples_of", lambda *_: [])
        yield


@pytest.fixture(scope="module")
def saving_often(undrawn: None) -> Iterator[None]:
    """A calibration saves after every batch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resume, "EVERY", 1)
        yield


@pytest.fixture(scope="session")
def policy(tmp_path_factory: pytest.TempPathFactory) -> PruningPolicy:
    """Of a calibration that nothing disturbs."""
    with pytest.MonkeyPatch.context() as patch:
        unreported(patch)
        return calibrate(tmp_path_factory.mktemp("undisturbed") / "p.json").policies[0]


@pytest.fixture(scope="module")
def frozen() -> None:
    """What was there before is looked at no more: the collector has only to do with what is made here."""
    gc.collect()
    gc.freeze()
