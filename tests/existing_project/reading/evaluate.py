"""Evaluate: python -m reading.evaluate --out runs --ckpt runs/last.ckpt"""

import argparse
from pathlib import Path

import torch
from lightning.pytorch import Trainer, seed_everything

from .data import ReadingData
from .extras import LineLogger, Logits, WordWriter
from .module import ReadingModule


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--ckpt", type=Path, required=True)
    arguments = parser.parse_args()
    out = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    seed_everything(3)
    module, data, logits = ReadingModule(), ReadingData(), Logits()
    trainer = Trainer(
        accelerator="cpu",
        logger=LineLogger(out / "evaluate.jsonl"),
        callbacks=[
            logits,
            WordWriter(out / "words.pt"),
        ],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.test(module, datamodule=data, ckpt_path=arguments.ckpt, verbose=False)
    trainer.predict(module, datamodule=data, ckpt_path=arguments.ckpt)
    torch.save(logits.logits, out / "logits.pt")


if __name__ == "__main__":
    main()
