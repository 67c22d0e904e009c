"""Labels of a shortened prompt: a label that is predicted from a dropped row does not count in the loss."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from catp_lightning.prompt.call import CallTracker
from catp_lightning.utils.hooks import hooked
from catp_lightning.utils.on_cpu import on_cpu, on_device


class Labels:
    """Exclude labels from a call's loss, on a copy of the labels.

    Args:
        calls: tracker of the model's calls, whose context is entered first.
        report: called with the number of labels of a call that are excluded: 0 as it begins, and again once it is known
            which rows leave.
    """

    def __init__(self, calls: CallTracker, report: Callable[[int], None]) -> None:
        self.calls, self.report = calls, report

    @contextmanager
    def watching(self) -> Iterator[None]:
        with hooked(self.calls.model, self._see):
            yield

    def _see(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.report(0)
        if kwargs.get("labels") is None:
            return None
        self.calls.outermost.labels = labels = kwargs["labels"].clone()
        return args, {**kwargs, "labels": labels}

    def leave_out(self, keep: Tensor) -> None:
        """Set labels to -100 that would be predicted from dropped rows.

        A label is predicted from the row before it; if that row is dropped, there is nothing to compare.

        Args:
            keep: bool [R, L], columns of the prompt that stay. Labels may be of its last columns only.
        """
        call = self.calls.outermost
        labels, call.labels = call.labels, None
        if labels is None:
            return
        own, values = on_cpu(keep, call.on_cpu("labels"))
        dropped = ~own[:, -labels.shape[1] :][:, :-1]
        self.report(int((dropped & (values[:, 1:] != -100)).sum()))
        labels[:, 1:].masked_fill_(on_device(dropped, labels.device), -100)
