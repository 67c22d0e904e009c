"""Fixtures of the tests of the command line."""

from pathlib import Path

import pytest
import yaml

from catp_lightning.data.scenes import write_scenes
from tests.support.commands import QUESTIONS, split
from tests.support.reports import unreported
from tests.support.tiny_vqa import opt_config, save_model, scenes


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, scenes for calibration and test, and a configuration that names them."""
    folder = tmp_path_factory.mktemp("made")
    model = save_model(folder / "model", opt_config())
    write_scenes(folder / "calibration", "calibration", 16)
    splits = {"calibration": "calibration", "val": "test", "test": "test"}
    scenes(folder / "test", QUESTIONS)
    data = {name: split(folder / place) for name, place in splits.items()}
    config = {
        "model": {"model": model, "generation": {"max_new_tokens": 4}},
        "data": {"processor": model, "batch_size": 4, **data},
        "trainer": {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False},
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture(autouse=True)
def in_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands write into the folder they are run in."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures of reports are written, but not drawn."""
    monkeypatch.setattr("catp_lightning.calibration.report.report.png", lambda figure: b"\x89PNG")


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibrations write no report, and answer nothing again for its examples."""
    unreported(monkeypatch)
