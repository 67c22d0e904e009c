"""Settings that hold for every test, doctests included; set on import, before any library reads them."""

import gc
import os
import signal
from collections.abc import Iterator
from functools import cache
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # a test that needs the hub fails at once instead of waiting for it
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"
os.environ["MPLBACKEND"] = "Agg"
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # otherwise tokenizers warns after every fork

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, if it is there: its kernels run on the CPU

pytest.register_assert_rewrite("tests.support")

collect_ignore = [
    "existing_project",  # somebody else's project: test_existing_project.py runs a copy of it
    "support/compiled_kernels.py",  # a program of its own; it imports Triton
]

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what it runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)

torch.set_num_threads(1)  # the same sums in the same order with any number of workers

# A busy machine is slow, not wrong. The fast tests try fewer examples than `make test-all` does.
settings.register_profile("fast", deadline=None, derandomize=True, max_examples=30)
settings.register_profile("all", deadline=None, derandomize=True)


def pytest_configure(config: pytest.Config) -> None:
    settings.load_profile("fast" if config.getoption("markexpr") == "not slow" else "all")


def pytest_collection_finish() -> None:
    """What is imported stays: the collector would look at it again and again, for a tenth of the time of all tests."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Seed torch, so that a test draws the same numbers alone or after others."""
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _looked_up_once() -> Iterator[None]:
    """Lightning looks for callbacks of installed packages for each Trainer, which takes as long as to make it."""
    from lightning.fabric.utilities import registry  # brings Triton, which has read TRITON_INTERPRET by now

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "entry_points", cache(registry.entry_points))
        yield


@pytest.fixture
def no_grad() -> Iterator[None]:
    """Run a test without gradients."""
    with torch.no_grad():
        yield


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    """A folder that exists once code from a file was run."""
    place = tmp_path / "canary"
    yield place
    assert not place.exists(), "code from a file was run"
