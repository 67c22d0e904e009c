"""Several real processes find what one finds."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from catp_lightning import PruningPolicy

PROGRAM = """
import sys, torch, lightning as L
from torch.utils.data import DataLoader
from catp_lightning.callbacks import CrossAttentionCalibration
from tests.test_calibration import Module, data

if __name__ == "__main__":
    processes, folder = int(sys.argv[1]), sys.argv[2]
    strategy = "ddp_spawn" if processes > 1 else "auto"
    trainer = L.Trainer(
        callbacks=[CrossAttentionCalibration(folder, keep=[0.5, 0.25])], accelerator="cpu", devices=processes,
        strategy=strategy, logger=False, enable_progress_bar=False,
    )
    batches = data(35, 5, torch.float64)  # seven batches: 4 and 3, or 3, 2 and 2
    trainer.predict(Module(dtype=torch.float64), DataLoader(batches, batch_size=None), return_predictions=False)
"""


def calibrate(processes: int, folder: Path) -> list[PruningPolicy]:
    program = folder.parent / "program.py"
    program.write_text(PROGRAM)
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(program), str(processes), str(folder)]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return [PruningPolicy.load(folder, keep=keep) for keep in (0.5, 0.25)]


@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_with_uneven_batches_calibrate_to_the_same_policy(
    processes: int, one: list[PruningPolicy], tmp_path: Path
) -> None:
    for alone, together in zip(one, calibrate(processes, tmp_path / "several"), strict=True):
        assert sum(alone.evidence["samples"].values()) == 35
        assert_same(alone.to_dict(), together.to_dict())


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> list[PruningPolicy]:
    return calibrate(1, tmp_path_factory.mktemp("alone") / "one")


def assert_same(one: Any, other: Any, where: str = "policy") -> None:
    """Equal in every decision and count; figures to nine digits: sums were added in another order."""
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert list(one) == list(other), where
        for key in one:
            assert_same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), where
        for number, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{where}[{number}]")
    elif isinstance(one, float):
        assert one == pytest.approx(other, rel=1e-9, abs=1e-12), where
    else:
        assert one == other, where
