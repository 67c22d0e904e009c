"""`LoopContext`: base class of callbacks that are inside a context manager while an evaluation loop runs."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from catp_lightning.callbacks.signals import end_if_told, ended_by_signals
from catp_lightning.callbacks.strategies import loop_was_skipped
from catp_lightning.errors import PruningError

Stage = Literal["validate", "test", "predict"]


Failed = Callable[[BaseException], None]


class _LeavesFirst(Callback):
    """Callback that calls `failed` when a run fails, and ends the run before a batch if a signal has come."""

    def __init__(self, failed: Failed) -> None:
        self._failed = failed

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._failed(exception)

    def on_validation_batch_start(self, *args: Any, **kwargs: Any) -> None:
        end_if_told()

    def on_test_batch_start(self, *args: Any, **kwargs: Any) -> None:
        end_if_told()

    def on_predict_batch_start(self, *args: Any, **kwargs: Any) -> None:
        end_if_told()


@contextmanager
def _leave_before_other_callbacks(trainer: Trainer, failed: Failed) -> Iterator[None]:
    """Context in which `failed` is called before any callback's `on_exception`.

    Were it called later, a callback that raises there would keep it from being called at all.
    """
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # Lightning does not declare it
    first = _LeavesFirst(failed)
    trainer.callbacks = [first, *callbacks]  # type: ignore[attr-defined]  # a new list: Lightning may be iterating over the old one
    try:
        yield
    finally:
        left = [callback for callback in trainer.callbacks if callback is not first]  # type: ignore[attr-defined]
        trainer.callbacks = left  # type: ignore[attr-defined]


class LoopContext(Callback, ABC):
    """Base class of callbacks that enter `loop_context` when an evaluation loop starts and always leave it again.

    The context is left at the end of the loop, or after any exception, before any other callback's `on_exception`.
    SIGTERM and SIGINT raise such an exception, SystemExit with code 143 and 130, except in fit, where Lightning waits
    until a checkpoint can be saved.

    Args:
        stages: the loops to be active in; "validate" includes validation inside fit.
        sanity_check: True to be active in the sanity check before fit as well.

    Raises:
        ValueError: a stage is none of "validate", "test" and "predict".
    """

    def __init__(self, stages: Sequence[Stage], sanity_check: bool = False) -> None:
        super().__init__()
        if unknown := [stage for stage in stages if stage not in get_args(Stage)]:
            raise ValueError(f"stages has {unknown}; allowed are {list(get_args(Stage))}.")
        self.stages, self.sanity_check = tuple(stages), sanity_check
        self._entered: ExitStack | None = None

    @abstractmethod
    def loop_context(self, trainer: Trainer, pl_module: LightningModule, stage: Stage) -> AbstractContextManager[Any]:
        """Return the context of one loop; it is entered outside inference mode, so that its tensors stay usable."""

    @abstractmethod
    def take_part(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take part, in a process that had no batch, in what all processes do at the end of an epoch.

        Called inside `loop_context`.
        """

    def _enter(self, trainer: Trainer, pl_module: LightningModule, stage: Stage) -> None:
        if stage not in self.stages or (trainer.sanity_checking and not self.sanity_check):
            return
        if self.__dict__.setdefault("_trainer", trainer) is not trainer:  # in one step: others may run in threads
            raise self._elsewhere()
        with ExitStack() as stack, torch.inference_mode(False):
            stack.callback(self.__dict__.pop, "_trainer", None)
            if trainer.state.fn != "fit":
                stack.enter_context(ended_by_signals(trainer))
            stack.enter_context(self.loop_context(trainer, pl_module, stage))
            stack.enter_context(_leave_before_other_callbacks(trainer, lambda error: self._fail(trainer, error)))
            self._entered = stack.pop_all()

    def save_what_was_done(self, trainer: Trainer, error: BaseException) -> None:
        """Save the work done so far, when the loop failed or was ended; does nothing unless overridden.

        Called inside `loop_context`, before any other callback's `on_exception`.
        """

    def _fail(self, trainer: Trainer, error: BaseException) -> None:
        try:
            self.save_what_was_done(trainer, error)
        finally:
            self._leave()

    def _leave(self) -> None:
        if self._entered is not None:
            self._entered.close()  # may be called again after an interrupt: what has been left is not left twice
            self._entered = None

    def _leave_loop_of(self, trainer: Trainer) -> None:
        if trainer is self.__dict__.get("_trainer"):  # not if `trainer` was refused: the loop of another one goes on
            self._leave()

    def _elsewhere(self) -> PruningError:
        """Error for a callback used in a second trainer while a loop of the first runs: one's end would end both."""
        name = type(self).__name__
        return PruningError(
            f"This {name} is at work in another Trainer, whose loop has not ended: give each Trainer that runs at the "
            f"same time, or inside another's loop, a {name} of its own."
        )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        inside: Trainer | None = self.__dict__.get("_trainer")
        if inside is not None and inside is not trainer and inside.state.status == "running":
            raise self._elsewhere()
        if inside is not None:
            self._leave()  # left over from a run that died before it could leave
            self.__dict__.pop("_trainer", None)  # or before it had entered

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._enter(trainer, pl_module, "validate")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._enter(trainer, pl_module, "test")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._enter(trainer, pl_module, "predict")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._leave_loop_of(trainer)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._leave_loop_of(trainer)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._leave_loop_of(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._leave_loop_of(trainer)  # the only hook that Lightning calls when a loop raises

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._leave_loop_of(trainer)  # after the Tuner's early exit
        if stage in self.stages and loop_was_skipped(trainer, stage):
            self._enter(trainer, pl_module, stage)
            try:
                self.take_part(trainer, pl_module)
            finally:
                self._leave_loop_of(trainer)

    def __getstate__(self) -> dict[str, Any]:
        """State without the entered context: a copy, by pickle or deepcopy, must not leave what it never entered."""
        others = ("log", "log_dict", "_trainer")  # Lightning puts the module's methods here, and with them the model
        return {**{name: value for name, value in self.__dict__.items() if name not in others}, "_entered": None}
