"""Train: python -m reading.train --out runs"""

import argparse
from pathlib import Path

from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint

from .data import ReadingData
from .extras import LineLogger
from .module import ReadingModule


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    seed_everything(3)
    callbacks = [
        ModelCheckpoint(out, save_last=True),
        LearningRateMonitor(),
    ]
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=LineLogger(out / "train.jsonl"),
        callbacks=callbacks,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    trainer.fit(ReadingModule(), datamodule=ReadingData())


if __name__ == "__main__":
    main()
