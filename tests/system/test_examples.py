"""The scripts and the notebook in examples/ run as they are, on fewer questions where they take a number."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from catp_lightning import PruningPolicy
from tests.support.notebooks import cells, run
from tests.support.paths import ROOT

EXAMPLES = ROOT / "examples"
TOUR = EXAMPLES / "tour.ipynb"


def main(name: str, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr("sys.argv", [name, *arguments])
    importlib.import_module(name).main()


def kinds(outputs: list[dict[str, Any]]) -> list[list[str]]:
    """What a cell shows: "stream", or the MIME types of its value."""
    return [sorted(one["data"]) if "data" in one else [one["name"]] for one in outputs]


@pytest.mark.slow
def test_one_line_prunes_the_project_and_its_metric_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main("one_line", monkeypatch, "--output", str(tmp_path), "--questions", "32")
    rows = [line for line in capsys.readouterr().out.splitlines() if "accuracy" in line or "keep_share" in line]
    unpruned, pruned, share = [float(row.strip(" │").split()[-1]) for row in rows]
    assert unpruned > 0.9 and pruned > 0.8 and share == 0.25


@pytest.mark.slow
def test_a_calibration_is_logged_offline_and_its_policy_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    main("calibrate_with_wandb", monkeypatch, "--output", str(tmp_path), "--questions", "48", "--keep", "0.5")
    assert PruningPolicy.load(tmp_path / "policy.json").keep == 0.5
    first, second = sorted(tmp_path.glob("wandb/offline-run-*"), key=lambda folder: folder.stat().st_mtime_ns)
    names = {path.name for one in (first, second) for path in one.rglob("*")}
    assert {"policy.json", "report.md"} <= names and any(name.startswith("kept_tokens") for name in names)


@pytest.mark.slow
def test_a_promise_is_made_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main("promise", monkeypatch, "--output", str(tmp_path), "--questions", "64", "--most", "0.3")
    said = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("keep ") for line in said) >= 2
    assert any(line.startswith("promised: at most 30%") for line in said)
    assert PruningPolicy.load(tmp_path / "policy.json").evidence["promise"]["max_disagreement"] == 0.3


@pytest.mark.slow
def test_the_notebook_shows_what_is_stored_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for cell, outputs in zip(cells(TOUR), run(TOUR), strict=True):
        assert kinds(cell["outputs"]) == kinds(outputs), "".join(cell["source"])


def test_the_notebook_can_be_read_without_running_it() -> None:
    stored = [kind for cell in cells(TOUR) for kind in kinds(cell["outputs"])]
    assert sum("image/png" in kind for kind in stored) >= 3 and sum(kind == ["stdout"] for kind in stored) >= 3
    assert [cell["execution_count"] for cell in cells(TOUR)] == list(range(1, len(cells(TOUR)) + 1))
    assert json.loads(TOUR.read_text(encoding="utf-8"))["nbformat"] == 4
    assert TOUR.stat().st_size < 1_000_000
