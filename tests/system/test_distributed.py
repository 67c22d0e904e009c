"""Several processes find what one finds: every decision is the same, and figures differ by rounding alone."""

import math
from pathlib import Path
from typing import Any

import pytest

from catp_lightning import PruningPolicy
from tests.support.processes import finished

SAMPLES, BUDGETS = 31, (0.5, 0.25)
CLOSE = {"float64": 1e-9, "float32": 1e-4}
"""By the model's dtype: how far figures of other processes may be, relative to their size."""

SMALL = """
import sys, torch, lightning as L
from pathlib import Path
from torch.utils.data import DataLoader
from catp_lightning.callbacks import CrossAttentionCalibration
from tests.support.calibrations import data
from tests.support.models import faint_blip2
from tests.support.modules import Generating

if __name__ == "__main__":
    processes, folder = int(sys.argv[1]), Path(sys.argv[2])
    for dtype in (torch.float64, torch.float32):
        trainer = L.Trainer(
            callbacks=[CrossAttentionCalibration(folder / str(dtype)[6:], keep=[0.5, 0.25])], accelerator="cpu",
            devices=processes, strategy="ddp" if processes > 1 else "auto", logger=False, enable_progress_bar=False,
        )
        (samples,) = data(31, 31, dtype)
        # 16 and 15 samples in four batches and three, or 11, 10 and 10 in three, two and two: no batch is one of before
        samples = [{name: value[number] for name, value in samples.items()} for number in range(31)]
        module = Generating(faint_blip2(dtype=dtype))
        trainer.predict(module, DataLoader(samples, batch_size=5), return_predictions=False)
"""

SHIPPED = """
import sys, lightning as L
from pathlib import Path
from catp_lightning.callbacks import CrossAttentionCalibration
from catp_lightning.data import PROMPTS, shipped
from catp_lightning.data.vqa import VQADataModule, VQASplit
from catp_lightning.modules.vqa import VQAModule

if __name__ == "__main__":
    processes, folder, name = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    scenes, model = folder.parent / "scenes", str(shipped(name))
    split = VQASplit(str(scenes / "questions.json"), str(scenes / "images"), image_name="{image_id:012d}.png")
    data = VQADataModule(model, calibration=split, batch_size=16, prompt=PROMPTS[name])
    trainer = L.Trainer(
        callbacks=[CrossAttentionCalibration(folder / "float32", keep=[0.5, 0.25])], accelerator="cpu", logger=False,
        devices=processes, strategy="ddp" if processes > 1 else "auto", enable_progress_bar=False,
    )
    trainer.predict(VQAModule(model), data.calibration_dataloader(), return_predictions=False)
"""


def calibrate(program: str, processes: int, folder: Path, *arguments: str) -> Path:
    """A folder of policies for each dtype."""
    file = folder / f"program{processes}.py"
    file.write_text(program)
    place = folder / str(processes)
    finished(file, processes, place, *arguments)
    return place


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return calibrate(SMALL, 1, tmp_path_factory.mktemp("alone"))


@pytest.mark.slow  # test_strategies has a quick one: two machines, forked
@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_with_uneven_batches_calibrate_to_the_same_policy(
    processes: int, one: Path, tmp_path: Path
) -> None:
    together = calibrate(SMALL, processes, tmp_path)
    for dtype in CLOSE:
        assert_same_policies(one, together, dtype, SAMPLES)
    paths = {file.relative_to(together).as_posix() for file in together.rglob("*.json")}
    assert paths == {file.relative_to(one).as_posix() for file in one.rglob("*.json")}, "each file is written once"


@pytest.mark.slow
@pytest.mark.parametrize("model", ["digits_blip2", "digits_llava", "digits_mllama"])
def test_several_processes_calibrate_the_shipped_models_to_the_same_policies(model: str, tmp_path: Path) -> None:
    from catp_lightning.data import GRIDS
    from catp_lightning.data.scenes import write_scenes

    write_scenes(tmp_path / "scenes", "calibration", 120, grids=GRIDS[model])
    alone, *others = (calibrate(SHIPPED, processes, tmp_path, model) for processes in (1, 2, 3))
    for together in others:
        assert_same_policies(alone, together, "float32", 120)


def assert_same_policies(alone: Path, together: Path, dtype: str, samples: int) -> None:
    for keep in BUDGETS:
        first, second = (PruningPolicy.load(place / dtype, keep=keep).to_dict() for place in (alone, together))
        assert sum(first["evidence"]["samples"].values()) == samples
        assert_same(first, second, CLOSE[dtype])


def assert_same(one: Any, other: Any, close: float, where: str = "policy", scale: float = 0.0) -> None:
    """Equal in every decision and count; weights and figures relative to the largest they stand beside."""
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert list(one) == list(other), where
        for key in one:
            if key not in ("learned", "network") or close == CLOSE["float64"]:
                assert_same(one[key], other[key], close, f"{where}.{key}", scale)
    elif isinstance(one, list):
        if close > CLOSE["float64"]:  # training, and drawing sets by what was trained, make more of the last digits
            one, other = ([value for value in values if not is_trained(value)] for values in (one, other))
        assert len(one) == len(other), where
        beside = max([scale, *(abs(value) for value in one if isinstance(value, float))])
        for number, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, close, f"{where}[{number}]", beside)
    elif isinstance(one, float):
        # What is nothing but rounding, a divergence of 1e-8 nats for example, has no digit to compare.
        assert math.isclose(one, other, rel_tol=close, abs_tol=close * max(scale, 0.01)), (where, one, other)
    else:
        assert one == other, where


def is_trained(value: Any) -> bool:
    """True for the row of a candidate whose scorer is a network."""
    return isinstance(value, dict) and "learned" in str(value.get("name"))
