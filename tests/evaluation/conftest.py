"""Fixtures of the tests of evaluation."""

import pytest


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures of a sweep are written, but not drawn."""
    for module in ("evaluation.sweep.flow", "cli.sweep"):
        monkeypatch.setattr(f"catp_lightning.{module}.png", lambda figure, dpi: b"\x89PNG")
