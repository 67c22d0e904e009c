"""Pictures of what a loop keeps of its first samples, for `TokenPruning(log_images=8)`."""

from collections.abc import Iterable, Sequence
from io import BytesIO
from typing import Any

import numpy as np
from lightning.pytorch import Trainer
from PIL import Image

from catp_lightning.pruning.record import Prefill
from catp_lightning.pruning.shown import Shown, Viewer
from catp_lightning.utils.compat import is_lightning_instance
from catp_lightning.utils.loggers import has_wandb_run, log_safely

NAME = "catp/kept_tokens"


class LoopPictures:
    """What one loop keeps of its first samples; later ones are not looked at.

    Args:
        most: number of samples.
        viewer: that of the loop's pruner.

    Attributes:
        shown: the samples so far.
    """

    def __init__(self, most: int, viewer: Viewer) -> None:
        self.shown: list[Shown] = []
        self._most, self._viewer = most, viewer

    def read(self, prefills: Iterable[Prefill]) -> None:
        """Take the samples of a batch that have an image, given its prefills."""
        self.shown += [one for prefill in prefills for one in prefill.shown if one.drawable]
        del self.shown[self._most :]
        self._viewer.active = len(self.shown) < self._most


def log_pictures(trainer: Trainer, shown: Sequence[Shown]) -> None:
    """Log a picture of each sample's kept tokens to those of the trainer's loggers that take pictures."""
    takes = [one for one in trainer.loggers if is_lightning_instance(one, "WandbLogger", "TensorBoardLogger")]
    if not shown or not takes or trainer.sanity_checking:
        return
    from catp_lightning.plots.kept import kept_tokens  # matplotlib is imported where it is used

    images = [Image.open(BytesIO(kept_tokens(one).png())).convert("RGB") for one in shown]
    log_safely(takes, NAME, lambda logger: _log(logger, images, trainer.global_step))


def _log(logger: Any, images: Sequence[Image.Image], step: int) -> None:
    if has_wandb_run(logger):
        logger.log_image(NAME, list(images), step)
    elif is_lightning_instance(logger, "TensorBoardLogger"):
        for number, image in enumerate(images):
            logger.experiment.add_image(f"{NAME}/{number}", np.asarray(image), step, dataformats="HWC")
