"""On a full disk every file that is written is the old one or the new one, whole."""

import os
import shutil
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from catp_lightning import PruningPolicy
from catp_lightning.calibration.report.report import report
from catp_lightning.cli.sweep import save_all
from catp_lightning.data.scenes import write_scenes
from catp_lightning.evaluation.sweep.table import ModelTable
from catp_lightning.utils.files import write_bytes
from tests.support.answer_files import many_answers
from tests.support.small_calibrations import calibrate, contents, full_disk

pytestmark = pytest.mark.usefixtures("saving_often")


def _tables(folder: Path, which: int) -> None:
    same = {"control": False, "tokens": 2.0, "agreement_interval": [0.1, 0.9]}
    rows = [{"method": "a", "keep": None, **same, "agreement": 1.0}, {"method": "b", "keep": 1, **same}]
    rows[1] |= {"agreement": 0.5 - which / 4, "reference_ahead": 0.1, "reference_ahead_interval": [0.0, 0.2]}
    save_all([ModelTable("m", "3 questions.", "b", rows)], folder)


def _report(policy: PruningPolicy, folder: Path, which: int) -> None:
    report([policy], [], folder, [], 1.0 + which)


WRITERS: dict[str, Callable[[Path, int], object]] = {
    "a policy": lambda folder, which: PruningPolicy(evidence={"long": [which] * 2000}).save(folder),
    "the tables of a sweep": _tables,
    "scenes": lambda folder, which: write_scenes(folder, "test", 4, seed=which),
    "answers": many_answers,
}


def on_a_disk_that_fills_up(write: Callable[[Path, int], object], folder: Path) -> None:
    """After each failure every file is the old one or the new one, whole, and there is no other."""
    now, then, disk = folder / "now", folder / "then", folder / "disk"
    write(now, 0)
    write(then, 1)
    old, new = contents(now), contents(then)
    failures = 0
    for most in sorted({1, 200, *(len(content) - 1 for content in new.values())}):
        shutil.rmtree(disk, ignore_errors=True)
        shutil.copytree(now, disk)
        with full_disk(most), pytest.raises(OSError, match="File too large, so nothing was written") as told:
            write(disk, 1)
        assert Path(str(told.value.filename)).parent in (disk, disk / "images"), "it names the file"
        for name, content in contents(disk).items():
            assert content in (old.get(name), new.get(name)) or "rank0" in name, name  # answers up to then are kept
        failures += 1
    assert failures >= 2
    write(disk, 1)
    assert {name: content for name, content in contents(disk).items() if name in new} == new


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITERS)
def test_on_a_full_disk_every_file_is_the_old_one_or_the_new_one(name: str, tmp_path: Path) -> None:
    on_a_disk_that_fills_up(WRITERS[name], tmp_path)


@pytest.mark.slow
def test_on_a_full_disk_a_report_is_the_old_one_or_the_new_one(policy: PruningPolicy, tmp_path: Path) -> None:
    on_a_disk_that_fills_up(partial(_report, policy), tmp_path)


@pytest.mark.slow
def test_on_a_file_system_that_is_really_full_nothing_is_damaged_either(tmp_path: Path) -> None:
    """Needs root, to mount one of 64 KiB."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("only root mounts file systems")
    try:
        old = PruningPolicy(evidence={"long": [1] * 1000})
        old.save(tmp_path)
        before = contents(tmp_path)
        with pytest.raises(OSError, match=r"\[Errno 28\] No space left on device, so nothing was written"):
            PruningPolicy(evidence={"long": [2] * 20_000}).save(tmp_path)
        assert contents(tmp_path) == before
        write_bytes(tmp_path / "filling", bytes(40_000))
        with pytest.raises(OSError, match="No space left on device"):
            while True:
                write_bytes(tmp_path / f"filling {len(contents(tmp_path))}", bytes(4096))
        with pytest.raises(OSError, match="No space left on device"):
            calibrate(tmp_path / "new" / "p.json")
        assert PruningPolicy.load(tmp_path) == old
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
