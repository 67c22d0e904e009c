"""The user's predict step: recorded apart from other model calls while a loop runs, and run again on each batch."""

from collections import UserDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from itertools import islice
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import Strategy

from catp_lightning.calibration.replay.recorder import Recorder

StepFunction = Callable[..., Any]


class _Steps:
    """Replacement of a strategy's `predict_step` while one or several calibrations record the user's steps.

    Args:
        step: the `predict_step` that is replaced.
        own: the `predict_step` set on this strategy object itself, if any, to be put back at the end.
    """

    def __init__(self, step: StepFunction, own: StepFunction | None) -> None:
        self.step, self.own = step, own
        self.recorders: list[Recorder] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _heard(self.recorders, self.step)(*args, **kwargs)


@contextmanager
def recorded_steps(strategy: Strategy, recorder: Recorder) -> Iterator[tuple[StepFunction, StepFunction]]:
    """Context in which `recorder` records the model calls of the user's steps, and not those of other callbacks.

    Yields:
        The strategy's `predict_step` for a batch that is read again: recorded by this recorder alone, and by none.
    """
    steps = own = strategy.__dict__.get("predict_step")
    if not isinstance(steps, _Steps):
        strategy.__dict__["predict_step"] = steps = _Steps(strategy.predict_step, own)
    recorder.active = False
    steps.recorders.append(recorder)
    try:
        yield _heard([recorder], steps.step), steps.step
    finally:
        steps.recorders.remove(recorder)
        if not steps.recorders:
            del strategy.__dict__["predict_step"]
            if steps.own is not None:  # set on this strategy object by other code
                strategy.__dict__["predict_step"] = steps.own


def _heard(recorders: list[Recorder], step: StepFunction) -> StepFunction:
    """Wrap a step so that the recorders are active while it runs, and keep its arguments if it will be run again."""

    def call(*args: Any, **kwargs: Any) -> Any:
        for recorder in recorders:
            recorder.again = (unshared(args), unshared(kwargs)) if recorder.plan.perturbations else None
            recorder.active = True
        try:
            return step(*args, **kwargs)
        finally:
            for recorder in recorders:
                recorder.active = False

    return call


def batches_again(trainer: Trainer) -> Iterator[tuple[Any, ...]]:
    """Arguments of `predict_step` for every batch of this process, prepared as the predict loop prepares them."""
    loaders = trainer.predict_dataloaders
    loaders = loaders if isinstance(loaders, list) else [loaders]
    for index, (loader, most) in enumerate(zip(loaders, trainer.predict_loop.max_batches, strict=True)):
        for number, batch in enumerate(islice(loader, most if isinstance(most, int) else None)):
            converted = trainer.precision_plugin.convert_input(batch)
            prepared = trainer.lightning_module._on_before_batch_transfer(converted, dataloader_idx=index)
            moved = trainer.strategy.batch_to_device(prepared, dataloader_idx=index)
            yield (moved, number, index) if len(loaders) > 1 else (moved, number)


def unshared(value: Any) -> Any:
    """Return new dictionaries, lists and tuples, nested alike, with the same values.

    What a step takes out of its batch, or puts into it, is then no matter when it runs again.
    """
    if isinstance(value, tuple):
        own = map(unshared, value)
        return type(value)._make(own) if hasattr(value, "_make") else tuple(own)
    if isinstance(value, dict | UserDict | list):
        value = copy(value)
        for key in list(value) if not isinstance(value, list) else range(len(value)):
            value[key] = unshared(value[key])
    return value
