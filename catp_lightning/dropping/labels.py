"""Labels of a shortened prompt: one that is predicted from a dropped row counts for nothing."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from catp_lightning.hooks import hooked


class Labels:
    """Takes labels out of a call's loss, on a copy.

    Attributes:
        left_out: how many labels of the last call were left out.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.left_out = model, 0
        self._given: Tensor | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        with hooked(self.model, self._see):
            yield

    def _see(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._given, self.left_out = None, 0
        if kwargs.get("labels") is None:
            return None
        self._given = kwargs["labels"].clone()  # changed in place once it is known which rows go
        return args, {**kwargs, "labels": self._given}

    def leave_out(self, keep: Tensor) -> None:
        """A label is predicted from the row before it; where that row is gone there is nothing to compare.

        Args:
            keep: bool [R, L], which columns of the prompt stay. Labels may be of its last columns only.
        """
        if self._given is None:
            return
        predicted_from_dropped = ~keep[:, -self._given.shape[1] :][:, :-1].to(self._given.device)
        later = self._given[:, 1:]
        self.left_out = int((predicted_from_dropped & (later != -100)).sum())
        later[predicted_from_dropped] = -100
        self._given = None
