"""Stands for your model and data in these examples: the small LLaVA and the digit scenes that come with the package."""

from pathlib import Path

from catp_lightning import VQAModule
from catp_lightning.data import GRIDS, PROMPTS, shipped
from catp_lightning.data.scenes import Split, write_scenes
from catp_lightning.data.vqa import VQADataModule, VQASplit

NAME = "digits_llava"
MODEL = str(shipped(NAME))


def module() -> VQAModule:
    """Return a LightningModule that answers questions about pictures."""
    return VQAModule(MODEL)


def data(folder: Path, calibration: int, test: int, a_scene: int = 2) -> VQADataModule:
    """Return questions about scenes of digits; no scene is in two splits.

    Args:
        folder: gets the pictures and the questions, in the layout of VQAv2.
        calibration: number of questions to calibrate on.
        test: number of questions to test on.
        a_scene: number of questions that share a scene.
    """
    sizes: dict[Split, int] = {"calibration": calibration, "test": test}
    splits = {name: _split(folder / name, name, size, a_scene) for name, size in sizes.items()}
    return VQADataModule(MODEL, **splits, prompt=PROMPTS[NAME], batch_size=16)


def _split(folder: Path, name: Split, questions: int, a_scene: int) -> VQASplit:
    return VQASplit.of_scenes(write_scenes(folder, name, questions, questions_per_image=a_scene, grids=GRIDS[NAME]))
