"""Fixtures of the tests of evaluation."""

from pathlib import Path

import pytest

from tests.support.sweeps import ARGS, sweep


@pytest.fixture(scope="session")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a sweep."""
    return sweep(tmp_path_factory.mktemp("swept"), *ARGS)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures of a sweep are written, but not drawn."""
    for module in ("evaluation.sweep.flow", "cli.sweep"):
        monkeypatch.setattr(f"catp_lightning.{module}.png", lambda figure, dpi: b"\x89PNG")
