"""No more threads than there are processors for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from catp_lightning.utils.threads import at_most, processors


def groups(folder: Path, **limits: str) -> tuple[Path, Path]:
    """Control groups with limits, and the file that names the group of this process."""
    for path, limit in limits.items():
        place = folder.joinpath("tree", *path.strip("_").split("_")) if path != "_" else folder / "tree"
        place.mkdir(parents=True, exist_ok=True)
        (place / "cpu.max").write_text(limit + "\n")
    (folder / "own").write_text("1:name=other:/elsewhere\n0::/job/part\n")
    return folder / "tree", folder / "own"


@pytest.mark.parametrize(
    ("limits", "found"),
    [
        ({}, 8),
        ({"_": "max 100000"}, 8),
        ({"_": "150000 100000"}, 2),
        ({"_": "10000 100000"}, 1),
        ({"job": "300000 100000", "job_part": "max 100000"}, 3),
        ({"job": "max 100000", "job_part": "400000 100000"}, 4),
        ({"_": "3200000 100000"}, 8),
        ({"_": "nonsense"}, 8),
    ],
)
def test_processors_are_those_that_affinity_and_quota_give(tmp_path, monkeypatch, limits, found) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    assert processors(*groups(tmp_path, **limits)) == found


def test_threads_are_lowered_for_a_while_unless_the_user_names_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        with at_most(2):
            assert torch.get_num_threads() == 2
        assert torch.get_num_threads() == 3
        with at_most(5):
            assert torch.get_num_threads() == 3
        monkeypatch.setenv("OMP_NUM_THREADS", "3")
        with at_most(1):
            assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
def test_threads_of_the_command_sleep_while_they_wait_for_each_other() -> None:
    code = "import os; from catp_lightning.cli.main import main\ntry: main()\nexcept SystemExit: pass\n"
    code += "print(os.environ['OMP_WAIT_POLICY'], 'torch' in __import__('sys').modules)"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    for given, found in ({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE"):
        done = subprocess.run(
            [sys.executable, "-c", code, "scenes", "--questions", "0"],
            env={**environment, **given}, capture_output=True, text=True, check=True, timeout=900,
        )  # fmt: skip
        assert done.stdout.splitlines()[-1] == f"{found} False"
