"""The built wheel in an environment of its own: pip installs it there, and its demo runs where no source is."""

import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest

from catp_lightning.data import SHIPPED
from catp_lightning.evaluation.recipes import names
from tests.support.paths import ROOT

CONSTRAINTS = ROOT / "constraints.txt"
SOURCES = ["pyproject.toml", "setup.py", "README.md", "LICENSE", "catp_lightning", "configs"]
PAGES = {"digits_blip2/table.html", "digits_blip2/policies/calibrated/report/report.html"}


def ran(folder: Path, *command: object) -> "subprocess.CompletedProcess[str]":
    """Run a command in a folder, with nothing of this environment's Python but its cache of packages."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    own |= {"PYTHONNOUSERSITE": "1", "OMP_NUM_THREADS": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    return subprocess.run(
        [str(part) for part in command], cwd=folder, env=own, capture_output=True, text=True, check=False, timeout=2400
    )


def pinned(name: str) -> str:
    """The line of the constraints that pins a package."""
    return next(line for line in CONSTRAINTS.read_text().splitlines() if line.startswith(f"{name}=="))


def built(folder: Path) -> Path:
    """Wheel of a copy of the sources: building leaves files beside them."""
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / "source" / name)  # type: ignore[operator]
    made = ran(folder, sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, "source")
    assert made.returncode == 0, made.stderr[-4000:]
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    shutil.rmtree(tmp_path / "environment", ignore_errors=True)  # 1.5 GB, and pytest keeps folders of the last runs


@pytest.mark.slow
def test_a_wheel_that_pip_installs_into_an_empty_environment_runs_its_demo_where_no_source_is(folder: Path) -> None:
    (folder / "source").mkdir()
    wheel = built(folder)
    venv.create(folder / "environment", with_pip=True)
    programs = folder / "environment/bin"
    install = (programs / "pip", "install", "--no-compile", "-c", CONSTRAINTS)
    if ran(folder, *install, pinned("filelock")).returncode:
        pytest.skip("no package index can be reached")
    # torch first: a pinned version without local tag takes a CPU build where one is offered.
    for wanted in (pinned("torch"), wheel):
        installed = ran(folder, *install, wanted)
        assert installed.returncode == 0, (installed.stdout + installed.stderr)[-4000:]
    checked = ran(folder, programs / "pip", "check")
    assert checked.returncode == 0, checked.stdout

    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    shutil.rmtree(folder / "source")
    where = "import catp_lightning; print(catp_lightning.__file__)"
    found = ran(elsewhere, programs / "python", "-c", where).stdout.strip()
    assert Path(found).is_relative_to(folder / "environment"), found

    demo = ran(elsewhere, programs / "catp", "demo", "--questions", "60", "--calibration_questions", "128")
    assert demo.returncode == 0, demo.stderr[-4000:]
    assert "Done in" in demo.stdout
    results = elsewhere / "runs/demo"
    assert {str(page.relative_to(results)) for page in results.rglob("*.html")} == PAGES
    for page in PAGES:
        text = (results / page).read_text()
        assert "<table" in text and "new Bokeh.FixedTicker" in text and "default-src 'none'" in text

    for name in SHIPPED:  # its configurations are found by name
        shown = ran(elsewhere, programs / "catp", "test", "--config", f"{name}.yaml", "--print_config")
        assert shown.returncode == 0 and name in shown.stdout, shown.stderr[-4000:]
    recipes = ran(elsewhere, programs / "catp", "recipe", "list")
    assert recipes.returncode == 0 and all(name in recipes.stdout for name in names()), recipes.stderr[-4000:]
    script = ran(elsewhere, programs / "catp", "completion", "bash")
    assert script.returncode == 0 and "complete -o bashdefault" in script.stdout, script.stderr[-4000:]
