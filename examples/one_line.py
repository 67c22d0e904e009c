"""One line in an existing project: only the import and the callback are new.

    python examples/one_line.py

prints the project's own metric, and how many visual tokens were read, unpruned and with a quarter of them.
"""

import argparse
from pathlib import Path
from typing import Any

from digits import MODEL, data
from lightning.pytorch import LightningModule, Trainer
from transformers import AutoModelForImageTextToText, AutoProcessor

from catp_lightning import PruningPolicy, TokenPruning


class Reader(LightningModule):
    """The project's module: a model in some attribute, a step that generates, a metric of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.vlm = AutoModelForImageTextToText.from_pretrained(MODEL)
        self.processor = AutoProcessor.from_pretrained(MODEL)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        inputs = batch["inputs"]
        ids = self.vlm.generate(**inputs, max_new_tokens=5, do_sample=False)
        texts = self.processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right = [text.strip() == answers[0] for text, answers in zip(texts, batch["answers"], strict=True)]
        self.log("accuracy", sum(right) / len(right), batch_size=len(right))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, default=Path("runs/one_line"), help="folder for the scenes")
    parser.add_argument("--questions", type=int, default=200)
    given = parser.parse_args()
    reader, scenes = Reader(), data(given.output, calibration=1, test=given.questions)
    Trainer(logger=False).test(reader, scenes)
    pruning = TokenPruning(PruningPolicy("fastervlm", keep=0.25))  # the one line
    Trainer(logger=False, callbacks=[pruning]).test(reader, scenes)


if __name__ == "__main__":
    main()
