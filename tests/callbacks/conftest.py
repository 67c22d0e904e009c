"""Fixtures of the tests of callbacks."""

from collections.abc import Iterator
from io import BytesIO
from itertools import count
from typing import Any

import pytest
from PIL import Image

from tests.support.reports import unreported
from tests.support.sent_signals import calibrate


@pytest.fixture(scope="module")
def no_report() -> Iterator[None]:
    """Calibrations write no report, and answer nothing again for its examples."""
    with pytest.MonkeyPatch.context() as patch:
        unreported(patch)
        yield


@pytest.fixture(scope="module")
def one_pixel() -> Iterator[None]:
    """Figures of reports are images of one pixel, each of another colour: drawing takes longer than calibrating."""
    colours = count()

    def pixel(figure: Any) -> bytes:
        buffer = BytesIO()
        Image.new("L", (1, 1), next(colours) % 256).save(buffer, "PNG")
        return buffer.getvalue()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("catp_lightning.calibration.report.report.png", pixel)
        yield


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The policy file of a calibration that nothing interrupts."""
    with pytest.MonkeyPatch.context() as patch:
        unreported(patch)
        calibrate(path := tmp_path_factory.mktemp("undisturbed") / "p.json")
    return path.read_bytes()
