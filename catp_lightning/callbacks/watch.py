"""`Watch`: tells a command that the Trainer's loop has begun, and writes progress lines."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from catp_lightning.utils.progress import Lines, Preparation, batch_of


class Watch(Callback):
    """Ends the preparation of a command when a loop begins, and writes progress lines where no bar can be drawn.

    Args:
        preparation: preparation phase of the command.
        says: True to write progress lines.
    """

    def __init__(self, preparation: Preparation, says: bool) -> None:
        self._preparation, self._says = preparation, says
        self._lines: Lines | None = None
        self._seen = 0

    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._preparation.end()
        if self._says and self._lines is None and trainer.is_global_zero:
            self._lines = Lines(f"{_name(trainer)}: no batch yet").__enter__()

    def _advance(self, trainer: Trainer, counts: list[int | float]) -> None:
        self._seen += 1
        if self._lines is not None:
            self._lines.now = f"{_name(trainer)}: {batch_of(self._seen, counts)}"

    def _end(self, *args: Any) -> None:
        if self._lines is not None:
            self._lines.close()

    # Called after every callback's `on_..._start`: an error raised there still counts as wrong usage.
    on_validation_epoch_start = on_test_epoch_start = on_predict_epoch_start = _begin

    def on_validation_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self._advance(trainer, trainer.num_val_batches)

    def on_test_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self._advance(trainer, trainer.num_test_batches)

    def on_predict_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self._advance(trainer, trainer.num_predict_batches)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._end()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._end()


def _name(trainer: Trainer) -> str:
    """Name of the command: validate, test or predict; empty if the trainer runs none."""
    return "" if trainer.state.fn is None else trainer.state.fn.value
