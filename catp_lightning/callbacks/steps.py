"""The user's predict step: told apart from whatever else asks the model while a loop runs, and repeated."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import Strategy

from catp_lightning.calibration.recorder import Recorder

StepFunction = Callable[..., Any]


class _Steps:
    """A strategy's `predict_step`, on the strategy itself while steps are recorded, by one calibration or several."""

    def __init__(self, step: StepFunction, own: StepFunction | None) -> None:
        self.step, self.own = step, own
        self.recorders: list[Recorder] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _heard(self.recorders, self.step)(*args, **kwargs)


@contextmanager
def recorded_steps(strategy: Strategy, recorder: Recorder) -> Iterator[StepFunction]:
    """While inside, `recorder` hears what the user's steps ask the model, and not what other callbacks ask between.

    Yields:
        The strategy's `predict_step`, heard by this recorder alone: for a batch that is read once more.
    """
    steps = own = strategy.__dict__.get("predict_step")
    if not isinstance(steps, _Steps):
        strategy.__dict__["predict_step"] = steps = _Steps(strategy.predict_step, own)
    recorder.active = False
    steps.recorders.append(recorder)
    try:
        yield _heard([recorder], steps.step)
    finally:
        steps.recorders.remove(recorder)
        if not steps.recorders:
            del strategy.__dict__["predict_step"]
            if steps.own is not None:  # somebody else's, who set it on this very strategy
                strategy.__dict__["predict_step"] = steps.own


def _heard(recorders: list[Recorder], step: StepFunction) -> StepFunction:
    """A step that these recorders hear."""

    def call(*args: Any, **kwargs: Any) -> Any:
        for recorder in recorders:
            recorder.active = True
        try:
            return step(*args, **kwargs)
        finally:
            for recorder in recorders:
                recorder.active = False

    return call


def batches_again(trainer: Trainer) -> Iterator[tuple[Any, ...]]:
    """The arguments of `predict_step` for every batch of this process, prepared as the predict loop prepares them."""
    loaders = trainer.predict_dataloaders
    loaders = loaders if isinstance(loaders, list) else [loaders]
    for index, (loader, most) in enumerate(zip(loaders, trainer.predict_loop.max_batches, strict=True)):
        for number, batch in enumerate(islice(loader, most if isinstance(most, int) else None)):
            converted = trainer.precision_plugin.convert_input(batch)
            prepared = trainer.lightning_module._on_before_batch_transfer(converted, dataloader_idx=index)
            moved = trainer.strategy.batch_to_device(prepared, dataloader_idx=index)
            yield (moved, number, index) if len(loaders) > 1 else (moved, number)
