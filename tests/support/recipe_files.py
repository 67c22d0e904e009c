"""Small files in the places that recipes read."""

import shutil
from pathlib import Path

from catp_lightning.data import GRIDS
from catp_lightning.data.scenes import write_scenes
from tests.support.benchmark_files import DATA_SETS

QUESTIONS = 6


def write_data(folder: Path) -> Path:
    """Write a few questions of every data set, and scenes for every shipped model, in the places of the recipes."""
    for name in ("docvqa", "gqa", "mmbench", "mme", "ocrbench", "pope", "scienceqa", "textvqa", "vizwiz"):
        DATA_SETS[name](folder / name)
    copies = {
        "gqa/testdev_balanced_questions.json": ["gqa/train_balanced_questions.json"],
        "pope/coco_pope_random.json": ["pope/coco_pope_popular.json", "pope/coco_pope_adversarial.json"],
        "textvqa/TextVQA_0.5.1_val.json": ["textvqa/TextVQA_0.5.1_train.json"],
        "mmbench/MMBench_DEV_EN.tsv": ["mmbench/mmbench_dev_20230712.tsv"],
    }
    for source, targets in copies.items():
        for target in targets:
            shutil.copy(folder / source, folder / target)
    _vqav2(folder / "vqav2")
    shutil.copytree(folder / "pope/val2014", folder / "vqav2/val2014", dirs_exist_ok=True)
    for model, grids in GRIDS.items():
        write_scenes(folder / model / "calibration", "calibration", QUESTIONS, grids=grids)
        write_scenes(folder / model / "test", "test", QUESTIONS, grids=grids)
    return folder


def _vqav2(folder: Path) -> None:
    for split, name in (("calibration", "train2014"), ("test", "val2014")):
        scenes = write_scenes(folder / split, split, QUESTIONS * 10)  # a tenth is asked
        shutil.move(scenes / "questions.json", folder / f"v2_OpenEnded_mscoco_{name}_questions.json")
        shutil.move(scenes / "annotations.json", folder / f"v2_mscoco_{name}_annotations.json")
        (folder / name).mkdir(parents=True, exist_ok=True)
        for image in (scenes / "images").iterdir():
            shutil.move(image, folder / name / f"COCO_{name}_{image.stem}.jpg")
