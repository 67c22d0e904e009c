"""Fixtures of the tests of calibration."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from catp_lightning import PruningPolicy
from catp_lightning.calibration.fit.fitting import fit
from catp_lightning.calibration.fit.probes import Columns
from catp_lightning.calibration.plan import Plan
from catp_lightning.calibration.report import report
from catp_lightning.calibration.search.candidate import Candidate
from catp_lightning.calibration.search.candidates import default_candidates, fitted_candidates
from catp_lightning.callbacks import calibration
from catp_lightning.models import Family, find_family
from tests.support.interrupted_calibrations import PARTIAL, Breaking, calibrate, small
from tests.support.killed_calibrations import run
from tests.support.models import random_blip2
from tests.support.planted_fits import COLUMNS, TIES, probes
from tests.support.reports import calibrated


@pytest.fixture(scope="package", autouse=True)
def _undrawn() -> Iterator[None]:
    """Reports have no examples, and figures are not rendered: each costs as much as a small calibration."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "png", lambda figure: b"")
        patch.setattr(calibration, "examples_of", lambda *_: [])
        yield


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Its folder, and what it noted."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return folder, run(folder, None)[0]


@pytest.fixture
def small_calibrations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Savings every two batches, and no report."""
    small(monkeypatch.setattr)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the partial file of a calibration that an exception ended, with four batches saved."""
    folder = tmp_path_factory.mktemp("interrupted")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="planted"):
        small(patch.setattr)
        calibrate(folder / "p.json", Breaking())
    return folder


@pytest.fixture
def path(interrupted: Path, tmp_path: Path) -> Path:
    """Where that calibration would write its policy; its partial file is there."""
    shutil.copy(interrupted / PARTIAL, tmp_path)
    return tmp_path / "p.json"


@pytest.fixture(scope="package")
def policies(tmp_path_factory: pytest.TempPathFactory) -> list[PruningPolicy]:
    """Those of a real calibration for three budgets."""
    return calibrated(tmp_path_factory.mktemp("several"), keep=[0.75, 0.5, 2])


@pytest.fixture(scope="module")
def family() -> Family:
    found = find_family(random_blip2()[0])
    assert Columns.of(Plan.of(found)) == COLUMNS
    return found


@pytest.fixture(scope="module")
def planted() -> Any:
    """Sums of probes with planted heads and slots, and the rows themselves."""
    return probes()


@pytest.fixture(scope="module")
def candidates(family: Family, planted: Any) -> list[Candidate]:
    """All rules of a BLIP-2: those that are given and those that were fitted."""
    fitted = fit(planted[0], planted[1], COLUMNS, TIES)
    assert all(found.selected for found in fitted.scorers.values()), "every kind of candidate is there"
    return [*default_candidates(Plan.of(family)), *fitted_candidates(Plan.of(family), fitted)]
