"""Two real processes find what one finds."""

import os
import subprocess
import sys
from pathlib import Path

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
    batches = data(35, 5, torch.float64)  # seven batches: one process has four, the other three
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


def test_two_processes_with_uneven_batches_calibrate_to_the_same_policy(tmp_path: Path) -> None:
    one, two = calibrate(1, tmp_path / "one"), calibrate(2, tmp_path / "two")
    for alone, together in zip(one, two, strict=True):
        assert (alone.scorer, alone.selector, alone.selector_args) == (
            together.scorer,
            together.selector,
            together.selector_args,
        )
        assert alone.scorer_args.get("weights", []) == pytest.approx(together.scorer_args.get("weights", []), rel=1e-9)
        assert alone.evidence["chosen"] == together.evidence["chosen"]
        assert alone.evidence["samples"] == together.evidence["samples"]
        assert sum(alone.evidence["samples"].values()) == 35
        rows = {row["name"]: row for row in together.evidence["candidates"]}
        for row in alone.evidence["candidates"]:
            for part in ("choose", "check"):
                other = rows[row["name"]][part]
                assert row[part]["agreement"] == other["agreement"]
                assert row[part]["divergence"] == pytest.approx(other["divergence"], rel=1e-9)
