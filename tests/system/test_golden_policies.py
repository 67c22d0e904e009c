"""What calibrations of the shipped models write is what tests/golden holds."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from catp_lightning import VQAModule
from catp_lightning.data import shipped
from tests.support.golden_policies import DEMO, FOLDER, MACHINE, Case, calibrated, cases, demo_table

module_of = cache(lambda model: VQAModule(str(shipped(model))))


def decision(policies: str) -> list[Any]:
    """What a policy does, without what was measured."""
    return [{key: value for key, value in policy.items() if key != "evidence"} for policy in json.loads(policies)]


@pytest.mark.slow
@pytest.mark.parametrize("case", cases(), ids=lambda case: case.file.stem)
def test_a_calibration_writes_the_golden_policy(case: Case, tmp_path: Path) -> None:
    found, golden = calibrated(case, module_of(case.model), tmp_path), case.file.read_text()
    if json.loads((FOLDER / "machine.json").read_text()) == MACHINE:
        assert found == golden
    else:
        assert decision(found) == decision(golden)


@pytest.mark.slow
@pytest.mark.skipif(json.loads((FOLDER / "machine.json").read_text()) != MACHINE, reason="its figures may differ here")
def test_the_demo_writes_the_golden_table(tmp_path: Path) -> None:
    assert demo_table(tmp_path) == DEMO.read_text()
