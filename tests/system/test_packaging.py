"""What a user installs: the wheel holds everything, an editable install too, and importing changes nothing global."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from catp_lightning.data import SHIPPED
from tests.support.paths import ROOT

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
    configs = [*folder.glob("configs/*.py"), *folder.glob("configs/*.yaml")]
    names = {path.relative_to(folder).as_posix() for path in package}
    return names | {f"catp_lightning/configs/{path.name}" for path in configs} | {"catp_lightning/py.typed"}


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


def test_the_wheel_holds_every_module_configuration_and_asset_and_nothing_else(
    source: Path, wheel: zipfile.ZipFile
) -> None:
    assert {name for name in wheel.namelist() if ".dist-info/" not in name} == shipped(source)


def test_the_wheel_names_its_license_its_python_and_the_catp_command(wheel: zipfile.ZipFile) -> None:
    files = {Path(name).name: wheel.read(name).decode() for name in wheel.namelist() if ".dist-info/" in name}
    assert "License-Expression: Apache-2.0\n" in files["METADATA"]
    assert "Requires-Python: >=3.11\n" in files["METADATA"]
    assert files["LICENSE"] == (ROOT / "LICENSE").read_text()
    assert files["entry_points.txt"].split() == ["[console_scripts]", "catp", "=", "catp_lightning.cli.main:main"]


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


def test_importing_the_package_changes_nothing_global() -> None:
    code = """
sys.path.insert(0, sys.argv[1])
import logging, os, random, signal, threading, warnings
import lightning.pytorch, numpy, torch, torchmetrics, transformers
import transformers.masking_utils, transformers.modeling_utils
from torch.nn.modules import module

def state():
    names = ("transformers", "lightning", "lightning.pytorch", "catp_lightning")
    loggers = [logging.root, *map(logging.getLogger, names)]
    return {
        "attention implementations": sorted(transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS.keys()),
        "mask implementations": sorted(transformers.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS.keys()),
        "dtype, device": (torch.get_default_dtype(), torch.get_default_device()),
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "threads": (torch.get_num_threads(), threading.active_count()),
        "determinism": (torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()),
        "global hooks": (len(module._global_forward_hooks), len(module._global_forward_pre_hooks)),
        "random states": (random.getstate(), torch.get_rng_state().tolist(), numpy.random.get_state()[1].tolist()),
        "loggers": [(log.name, log.level, log.propagate, list(log.handlers)) for log in loggers],
        "warning filters": [str(entry) for entry in warnings.filters],
        "environment": dict(os.environ),
        "interpreter hooks": (sys.excepthook, sys.displayhook, signal.getsignal(signal.SIGINT)),
    }

before = state()
import catp_lightning
for name in catp_lightning.__all__:  # imported when they are asked for
    getattr(catp_lightning, name)
after = state()
changed = {key: (before[key], after[key]) for key in before if before[key] != after[key]}
assert not changed, changed
print(catp_lightning.__file__)
"""
    assert python(code, ROOT, cwd=ROOT) == str(ROOT / "catp_lightning/__init__.py")
