"""Calibrate with Weights & Biases, and run with the policy that it holds.

    python examples/calibrate_with_wandb.py            # offline: the run lies in runs/wandb, `wandb sync` sends it
    python examples/calibrate_with_wandb.py --online   # after `wandb login`

A calibration logs its report, its figures and the policy, as an artifact of type `catp-policy`. Other runs, on other
machines too, load the policy by the artifact's address. An offline run has no address yet: there its file is taken.
"""

import argparse
from pathlib import Path

import wandb
from digits import data, module
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import WandbLogger

from catp_lightning import CrossAttentionCalibration, TokenPruning


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, default=Path("runs/wandb"), help="folder for runs, scenes and policy")
    parser.add_argument("--questions", type=int, default=256, help="to calibrate on")
    parser.add_argument("--keep", type=float, default=0.25, help="share of the visual tokens")
    parser.add_argument("--online", action="store_true", help="send both runs to wandb.ai as they go")
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    reader, scenes = module(), data(given.output / "scenes", calibration=given.questions, test=64)
    scenes.setup()

    logger = logger_of(given.output, "calibration", given.online)
    calibration = CrossAttentionCalibration(given.output / "policy.json", keep=given.keep)
    Trainer(logger=logger, callbacks=[calibration]).predict(reader, scenes.calibration_dataloader())
    run = logger.experiment
    address = f"wandb://{run.entity}/{run.project}/catp-policy:latest" if given.online else given.output / "policy.json"
    wandb.finish()

    logger = logger_of(given.output, "test", given.online)
    pruning = TokenPruning(address, compare=True, log_images=4)  # agreement with the unpruned model, and four pictures
    Trainer(logger=logger, callbacks=[pruning]).test(reader, scenes)
    wandb.finish()


def logger_of(folder: Path, name: str, online: bool) -> WandbLogger:
    """Return the logger of a run of its own."""
    return WandbLogger(project="catp-example", name=name, save_dir=str(folder), offline=not online)


if __name__ == "__main__":
    main()
