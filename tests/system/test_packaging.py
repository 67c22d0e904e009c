"""What a user installs: the wheel holds everything, an editable install too, and importing changes nothing global."""

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from catp_lightning.data import SHIPPED
from tests.support.global_state import changed_by_importing
from tests.support.paths import ROOT
from tests.support.processes import in_fork

SOURCES = ["pyproject.toml", "setup.py", "README.md", "LICENSE", "catp_lightning", "configs"]
LIBRARIES = [path for path in sys.path if path.endswith("-packages")]
PRINT_CONFIGS = """
from importlib.resources import files
print(*(file.name for file in files("catp_lightning.configs").iterdir()))
"""


def python(code: str, *arguments: object, cwd: Path) -> str:
    """Standard output of a fresh interpreter that has this environment's libraries, but no installed catp_lightning."""
    code = f"import sys; sys.path += {LIBRARIES!r}\n{code}"
    command = [sys.executable, "-I", "-S", "-c", code, *map(str, arguments)]  # -S: .pth files are not read
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def shipped(folder: Path) -> set[str]:
    """What the sources say a wheel must hold, by its path in the wheel."""
    package = [*folder.glob("catp_lightning/**/*.py"), *folder.glob("catp_lightning/data/digits_*/*")]
    package += folder.glob("catp_lightning/pages/page.*")
    configs = [*folder.glob("configs/*.py"), *folder.glob("configs/*.yaml")]
    names = {path.relative_to(folder).as_posix() for path in package}
    configs += folder.glob("configs/recipes/*.yaml")
    names |= {f"catp_lightning/{path.relative_to(folder).as_posix()}" for path in configs}
    return names | {"catp_lightning/py.typed"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is built, with one more configuration, and a few bytes in place of the model's weights."""
    folder = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
        else:
            shutil.copy(ROOT / name, folder / name)
    (folder / "configs/added.yaml").write_text("keep: 0.5\n")
    for name in SHIPPED:
        (folder / "catp_lightning/data" / name / "model.safetensors").write_bytes(b"weights")
    return folder


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    python("from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])", folder, cwd=source)
    return zipfile.ZipFile(next(folder.glob("*.whl")))


@pytest.mark.slow
def test_the_wheel_holds_every_module_configuration_and_asset_and_nothing_else(
    source: Path, wheel: zipfile.ZipFile
) -> None:
    assert {name for name in wheel.namelist() if ".dist-info/" not in name} == shipped(source)


def test_the_wheel_names_its_license_its_python_and_its_entry_points(
    wheel: zipfile.ZipFile,
) -> None:
    files = {Path(name).name: wheel.read(name).decode() for name in wheel.namelist() if ".dist-info/" in name}
    assert "License-Expression: Apache-2.0\n" in files["METADATA"]
    assert "Requires-Python: >=3.11\n" in files["METADATA"]
    assert files["LICENSE"] == (ROOT / "LICENSE").read_text()
    assert files["entry_points.txt"].split() == [
        *("[console_scripts]", "catp", "=", "catp_lightning.cli.main:main"),
        *("[lmms_eval.models]", "catp", "=", "catp_lightning.integrations.lmms_eval:manifest"),
        *("[vllm.general_plugins]", "catp_lightning", "=", "catp_lightning.serving.vllm_plugin:register"),
    ]


@pytest.mark.slow
def test_an_unpacked_wheel_offers_at_most_20_names_and_its_configurations(
    tmp_path: Path, wheel: zipfile.ZipFile
) -> None:
    wheel.extractall(tmp_path)
    print_names = """
sys.path.insert(0, sys.argv[1])
import catp_lightning
assert catp_lightning.__file__.startswith(sys.argv[1]), catp_lightning.__file__
missing = [name for name in catp_lightning.__all__ if not hasattr(catp_lightning, name)]
assert not missing, missing
print(*catp_lightning.__all__)
"""
    names, configs = python(print_names + PRINT_CONFIGS, tmp_path, cwd=tmp_path).splitlines()
    assert {"PruningPolicy", "prune", "CrossAttentionCalibration", "TokenPruning", "PrunedModule"} <= set(names.split())
    assert len(names.split()) <= 20
    assert "added.yaml" in configs.split()


def test_an_editable_install_finds_configurations_where_they_are_edited(source: Path, tmp_path: Path) -> None:
    python("from setuptools import build_meta; build_meta.build_editable(sys.argv[1])", tmp_path, cwd=source)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as editable:
        editable.extractall(tmp_path / "site")
    # First on the path: this environment's own editable install has a finder of the same name.
    install = "sys.path.insert(0, sys.argv[1]); import site; site.addsitedir(sys.argv[1])"
    later = source / "configs/later.yaml"
    later.write_text("keep: 0.25\n")
    try:
        found = python(install + PRINT_CONFIGS, tmp_path / "site", cwd=tmp_path)
    finally:
        later.unlink()
    assert later.name in found.split()


@pytest.mark.slow
def test_importing_the_package_changes_nothing_global() -> None:
    """In a process of its own, in which the package was not imported yet, and nobody else set what it could set."""
    (ended,) = in_fork(lambda: print(json.dumps(changed_by_importing())))
    assert json.loads(ended.said) == [], ended.said


@pytest.mark.slow
def test_importing_the_package_first_changes_nothing_global_either() -> None:
    """In a new interpreter: libraries that the package imports are new to it too."""
    code = "sys.path.insert(0, sys.argv[1]); from tests.support import global_state as found"
    assert python(f"{code}; print(found.changed_by_importing())", ROOT, cwd=ROOT) == "[]"
