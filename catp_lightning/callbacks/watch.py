"""What a command learns from the Trainer's loop: that it has begun, and how far it is."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from catp_lightning.progress import Lines, Preparation, batch_of


class Watch(Callback):
    """Ends the preparation of a command when a loop begins, and says how far the loop is where no bar can be drawn.

    Args:
        preparation: of the command.
        says: whether lines are wanted.
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

    # After every callback's `on_..._start`: what is refused there was asked for wrongly.
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
    """The command: validate, test or predict."""
    return "" if trainer.state.fn is None else trainer.state.fn.value
