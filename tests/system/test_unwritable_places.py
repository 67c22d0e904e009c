"""Places that cannot be written are refused before the first batch."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer

from catp_lightning import AnswerWriter, CrossAttentionCalibration, PruningPolicy
from catp_lightning.utils.files import check_writable
from tests.support.small_calibrations import Counting, calibrate, data, full_disk
from tests.support.trainers import loading

pytestmark = pytest.mark.usefixtures("saving_often")


NOBODY = 65534


def places(folder: Path) -> dict[str, tuple[Path, type[OSError]]]:
    (folder / "file").write_text("")
    (folder / "folder.json").mkdir()
    (folder / "closed").mkdir(mode=0o555)
    return {
        "below a file": (folder / "file" / "new" / "p.json", NotADirectoryError),
        "a folder": (folder / "folder.json", IsADirectoryError),
        "/proc": (Path("/proc/new/p.json"), FileNotFoundError),
        "read-only": (folder / "closed" / "new" / "p.json", PermissionError),
    }


@contextmanager
def as_nobody() -> Iterator[None]:
    """Root may write anywhere."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if before == 0:
            os.seteuid(0)


PLACES = ["below a file", "a folder", "/proc", "read-only"]


def re_said(place: str) -> str:
    return "is a folder|Is a directory" if place == "a folder" else "so nothing was written; free space, or give a path"


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("writer", [CrossAttentionCalibration, AnswerWriter])
def test_a_place_that_cannot_be_written_is_refused_before_the_first_batch(writer: Any, place: str) -> None:
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to others
        os.chmod(name, 0o755)
        path, kind = places(Path(name))[place]
        before = sorted(Path(name).rglob("*"))
        module = Counting()
        run = Trainer(
            accelerator="cpu", callbacks=[writer(str(path))], logger=False, enable_progress_bar=False,
            enable_checkpointing=False, default_root_dir=name,
        )  # fmt: skip
        with as_nobody(), pytest.raises(kind, match=re_said(place)):
            run.predict(module, loading(data()))
        assert module.steps == 0 and sorted(Path(name).rglob("*")) == before


def test_a_full_disk_and_a_report_that_is_a_file_are_found_before_the_first_batch_too(tmp_path: Path) -> None:
    with full_disk(0), pytest.raises(OSError, match="File too large"):
        check_writable(tmp_path / "new" / "p.json")
    (tmp_path / "p-report").write_text("")
    with pytest.raises(NotADirectoryError, match="p-report"):
        calibrate(tmp_path / "p.json")
    check_writable(tmp_path / "new" / "p.json")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["p-report"], "asking leaves nothing"


@pytest.mark.parametrize("place", PLACES)
def test_a_policy_that_cannot_be_saved_says_where_and_what_to_do(place: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        path, _ = places(Path(name))[place]
        with as_nobody(), pytest.raises(OSError, match="so nothing was written; free space, or give a path") as told:
            PruningPolicy().save(path)
        assert told.value.filename == str(path)
        assert not list(Path(name).rglob("*.tmp"))
