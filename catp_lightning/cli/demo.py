"""The demo: a sweep of fixed methods and a calibration on the shipped BLIP-2, logged to Weights & Biases offline."""

import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import WandbLogger
from rich.console import Console
from rich.text import Text

from catp_lightning.callbacks import CrossAttentionCalibration
from catp_lightning.data import shipped
from catp_lightning.data.scenes import write_scenes
from catp_lightning.data.vqa import VQADataModule, VQASplit
from catp_lightning.evaluation.sweep.flow import sweep_model
from catp_lightning.evaluation.sweep.methods import CALIBRATED
from catp_lightning.evaluation.sweep.reading import Reading
from catp_lightning.modules.vqa import VQAModule
from catp_lightning.policy import PruningPolicy
from catp_lightning.safe_text import rich_text
from catp_lightning.utils.messages import quiet
from catp_lightning.utils.progress import Lines, Preparation, shows_bars
from catp_lightning.utils.threads import at_most

MODEL = "digits_blip2"
BUDGETS = (0.5, 0.25, 0.125)
METHODS = (CALIBRATED, "random", "stride", "l2-norm", "self-attention", "catp", "cross-attention", "divprune")


def run_demo(output: str, questions: int, calibration_questions: int, seed: int, preparation: Preparation) -> None:
    """Calibrate the shipped BLIP-2 on digit scenes and compare it, pruned, with fixed methods.

    Args:
        output: folder for the results: policies, table, plot and an offline Weights & Biases run.
        questions: number of test questions, about digits that neither training nor calibration saw.
        calibration_questions: number of questions the policies are chosen on.
        seed: seed of the scenes.
        preparation: preparation of the command, which is over.
    """
    console, folder, start, model = Console(), Path(output), time.monotonic(), str(shipped(MODEL))
    # One thread: on matrices this small several are hardly faster, and beside other work they wait for each other.
    with at_most(1), quiet(), Lines("writing digit scenes", sys.stdout) as lines:
        console.print(f"Writing {calibration_questions} calibration and {questions} test questions about digit scenes.")
        place = folder / "data"
        data = VQADataModule(
            model,
            calibration=VQASplit.of_scenes(
                write_scenes(place / "calibration", "calibration", calibration_questions, seed)
            ),
            test=VQASplit.of_scenes(write_scenes(place / "test", "test", questions, seed)),
            batch_size=64,
        )
        module = VQAModule(model)
        reading = Reading(
            module,
            data.test_dataloader,
            data.calibration_dataloader,
            partial(predict, module, folder),
            Trainer(logger=False, enable_checkpointing=False).strategy.root_device,
            {},
        )
        table = sweep_model(reading, METHODS, BUDGETS, False, None, folder, lines, preparation)
    for shown in table.console():
        console.print(shown)
    for policy in (PruningPolicy.load(folder / MODEL / "policies" / CALIBRATED, keep) for keep in BUDGETS):
        console.print(f"keep {policy.keep}: calibration chose", rich_text(policy.evidence["chosen"], "bold"))
    console.print(
        Text.assemble(
            f"\nDone in {time.monotonic() - start:.0f} s. Results are in ",
            rich_text(folder / MODEL, "bold"),
            ": table.md, table.json, table.html, accuracy.png, policies/; an offline Weights & Biases run is in ",
            rich_text(folder / "wandb", "bold"),
            ".",
        )
    )


def predict(module: VQAModule, folder: Path, loader: Any, callback: Callback | None) -> Sequence[Any]:
    """Return the answers of `trainer.predict`; a calibration is logged to Weights & Biases, offline, in `folder`."""
    calibrates = isinstance(callback, CrossAttentionCalibration)
    trainer = Trainer(
        devices=1,
        logger=WandbLogger(project="catp-lightning", name="demo", save_dir=folder, offline=True)
        if calibrates
        else False,
        callbacks=callback,
        enable_progress_bar=calibrates and shows_bars(),
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    try:
        return trainer.predict(module, loader, return_predictions=not calibrates) or []
    finally:
        if calibrates:
            import wandb

            wandb.finish()
