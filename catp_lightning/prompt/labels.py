"""Labels of a shortened prompt: a label that is predicted from a dropped row does not count in the loss."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from catp_lightning.utils.hooks import hooked


class Labels:
    """Exclude labels from a call's loss, on a copy of the labels.

    Attributes:
        left_out: number of labels of the last call that were excluded.
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
        """Set labels to -100 that would be predicted from dropped rows.

        A label is predicted from the row before it; if that row is dropped, there is nothing to compare.

        Args:
            keep: bool [R, L], columns of the prompt that stay. Labels may be of its last columns only.
        """
        if self._given is None:
            return
        predicted_from_dropped = ~keep[:, -self._given.shape[1] :][:, :-1].to(self._given.device)
        later = self._given[:, 1:]
        self.left_out = int((predicted_from_dropped & (later != -100)).sum())
        later[predicted_from_dropped] = -100
        self._given = None
