"""A user's program for several processes: `ddp_program.py FOLDER STRATEGY PROCESSES FAILING`.

Fits with pruned validation that stops early, keeps what it found in FOLDER, and predicts; the process FAILING raises
there.
"""

import sys
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping

from catp_lightning import AnswerWriter, TokenPruning
from tests.support.several_processes import POLICY, Failing, Trained, loader
from tests.support.trainers import QUIET


def fit(processes: int) -> dict[str, object]:
    module, pruning = Trained(), TokenPruning(POLICY, compare=True)
    stop = EarlyStopping("catp/agreement", mode="max", patience=2)  # no step changes anything: after three epochs
    several = {"devices": processes, "strategy": "ddp_find_unused_parameters_true"} if processes > 1 else {"devices": 1}
    trainer = Trainer(callbacks=[pruning, stop], max_epochs=9, num_sanity_val_steps=1, **{**QUIET, **several})
    trainer.fit(module, loader(4), loader(12))
    return {"figures": pruning.figures, "epochs": trainer.current_epoch, "rank": trainer.global_rank}


def main(folder: Path, strategy: str, processes: int, failing: int) -> None:
    if strategy != "ddp_spawn":  # only its children would have what fit found
        found = fit(processes)
        torch.save(found, folder / f"{found['rank']}.pt")
    callbacks = [TokenPruning(POLICY, compare=True), AnswerWriter(str(folder / "answers.jsonl"))]
    trainer = Trainer(callbacks=callbacks, devices=processes, strategy=strategy, **QUIET)
    trainer.predict(Failing(failing), loader(12), return_predictions=False)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
