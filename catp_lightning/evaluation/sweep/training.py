"""Training of compressors on a part of the calibration split, for the prices or budgets of a sweep."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from catp_lightning.errors import PolicyError, PruningError
from catp_lightning.evaluation.sweep.calibrations import begun, refuse
from catp_lightning.evaluation.sweep.jobs import data_fingerprint
from catp_lightning.evaluation.sweep.reading import Reading
from catp_lightning.methods.budget import keep_count
from catp_lightning.methods.scorers import SCORERS, Compressor, Trained
from catp_lightning.modules.compressor import CompressorTraining
from catp_lightning.policy import PruningPolicy
from catp_lightning.policy.locations import budget_file_name

EPOCHS, BATCH = 4, 32
QUIET: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_model_summary": False,
    "enable_progress_bar": False,
}


def is_trained(name: str) -> bool:
    """Return True if a scorer of this name is a network that is trained before it can prune."""
    return name in SCORERS and issubclass(SCORERS[name], Trained)


def trained(
    reading: Reading,
    loader: Any,
    name: str,
    keeps: Sequence[float],
    tokens: float,
    settings: Mapping[str, Any],
    folder: Path,
) -> list[PruningPolicy] | str:
    """Return the policy of a compressor for each share of the tokens, an earlier run's if nothing has changed.

    The module's model stays what it is. "dyvte" is trained once; the others once for each number of tokens.

    Args:
        reading: the model.
        loader: DataLoader of the questions to train on; it is read in another order, in batches of 32.
        name: "quecc", "flashsloth" or "dyvte".
        keeps: shares of the tokens, for "dyvte" those that layers read on average.
        tokens: mean number of visual tokens of an image, of which the shares are.
        settings: settings of the sweep that answers depend on.
        folder: folder for the policies.

    Returns:
        The policies; or the reason why none can be trained for this model.
    """
    now = {**settings, "data": data_fingerprint(loader), "keep": [repr(keep) for keep in keeps], "epochs": EPOCHS}
    if (refused := begun(folder, now)) is not None:
        return refused
    files = [folder / budget_file_name(keep) for keep in keeps]
    try:
        return [PruningPolicy.load(file) for file in files]
    except PolicyError:  # not yet
        pass
    try:
        if not issubclass(SCORERS[name], Compressor):
            training = _training(reading, loader, name, None)
            policies = [training.policy(keep) for keep in keeps]
        else:
            counts = [keep_count(keep, round(tokens)) for keep in keeps]
            policies = [_training(reading, loader, name, count).policy() for count in counts]
    except (PruningError, PolicyError) as error:
        return refuse(folder, now, str(error))
    for policy, file in zip(policies, files, strict=True):
        policy.save(file)
    return policies


def _training(reading: Reading, loader: Any, name: str, tokens: int | None) -> CompressorTraining:
    """Return a compressor that was trained for a number of tokens."""
    training = CompressorTraining(reading.module, name, tokens)
    order = torch.Generator(device="cpu").manual_seed(0)
    questions: DataLoader[Any] = DataLoader(
        loader.dataset, batch_size=BATCH, shuffle=True, generator=order, collate_fn=loader.collate_fn
    )
    device = reading.device
    devices: Any = 1 if device.index is None else [device.index]
    accelerator = "gpu" if device.type == "cuda" else device.type
    Trainer(**QUIET, max_epochs=EPOCHS, accelerator=accelerator, devices=devices).fit(training, questions)
    return training
