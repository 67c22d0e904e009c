"""A callback that is inside a context manager while evaluation loops run, and outside at every other time."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

Stage = Literal["validate", "test", "predict"]


class LoopContext(Callback, ABC):
    """Enters `loop_context` when an evaluation loop starts and always leaves it: at its end, or after any exception.

    Args:
        stages: the loops to be active in; "validate" includes validation inside fit.
        sanity_check: whether to be active in the sanity check before fit as well.

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
        """The context of one loop; entered outside inference mode, so that tensors made in it can be used later."""

    def _enter(self, trainer: Trainer, pl_module: LightningModule, stage: Stage) -> None:
        if stage not in self.stages or (trainer.sanity_checking and not self.sanity_check):
            return
        with ExitStack() as stack, torch.inference_mode(False):
            stack.enter_context(self.loop_context(trainer, pl_module, stage))
            self._entered = stack.pop_all()

    def _leave(self) -> None:
        entered, self._entered = self._entered, None
        if entered is not None:
            entered.close()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._leave()  # of a run that died before it could leave

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._enter(trainer, pl_module, "validate")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._enter(trainer, pl_module, "test")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._enter(trainer, pl_module, "predict")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._leave()

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._leave()

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._leave()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._leave()  # the only hook that Lightning calls when a loop raises

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._leave()  # after the Tuner's early exit

    def __getstate__(self) -> dict[str, Any]:
        """A copy, for another process or by deepcopy, is outside: it must not leave what it never entered."""
        return {**self.__dict__, "_entered": None}
