"""What the model itself was called with: seen before its own code turns it into something else."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from catp_lightning.hooks import hooked, untraced


class Call(dict[str, Any]):
    """Arguments of one call, by name. It stands for the call: what is known of it is kept as long as it lasts."""

    __hash__ = object.__hash__  # type: ignore[assignment]
    __eq__ = object.__eq__


class Watching:
    """Follows the calls of one model.

    Attributes:
        arguments: by name, what `outer` was called with, while it runs.
        given: what the user called: generate's arguments while it runs, else `arguments`. Newer versions of generate
            read pixels before they expand beams and hand on features alone.
        samples: how many samples `generate`, where one is running, was given; later tensors have a row for each beam.

    Args:
        model: whose `generate` is followed.
        outer: the module below the head, which turns ids and pixels into the decoder's input.
    """

    def __init__(self, model: PreTrainedModel, outer: nn.Module) -> None:
        self.model, self.outer = model, outer
        self._calls: list[Call] = []  # those that are running; a hook may call the model again
        self.samples: int | None = None
        self._generating: Call | None = None
        self._length: int | None = None
        self._names = list(inspect.signature(outer.forward).parameters)
        kind: Any = type(model)
        self._generates = list(inspect.signature(kind.generate).parameters)[1:]

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Hooks are in place only while inside."""
        with ExitStack() as undo:
            undo.callback(self._calls.clear)
            undo.enter_context(hooked(self.outer, self._call, self._called, always=True))
            undo.enter_context(replaced(self.model, "generate", self._generate))
            yield

    @property
    def arguments(self) -> Call:
        return self._calls[-1] if self._calls else Call()

    @property
    def given(self) -> Call:
        return self.arguments if self._generating is None else self._generating

    def beams(self, rows: int) -> int:
        """How many of `rows` belong to each sample."""
        return rows // self.samples if self.samples and rows % self.samples == 0 else 1

    def prompt_length(self, columns: int) -> int | None:
        """Of the running `generate`, where a call has so many columns; what it has generated counts for nothing.

        None outside of `generate`: where a prompt ends and its answer begins is not known there.
        """
        if self._generating is None:
            return None
        self._length = columns if self._length is None else self._length  # its first call has the prompt alone
        return self._length

    def _call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._calls.append(Call({**dict(zip(self._names, args, strict=False)), **kwargs}))

    def _called(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        del self._calls[-1:]  # arguments are not held longer than the call lasts

    def _generate(self, generate: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        prompt = kwargs.get("input_ids", args[0] if args else kwargs.get("inputs"))
        before = self.samples, self._generating, self._length
        self.samples = len(prompt) if isinstance(prompt, Tensor) else None
        self._generating, self._length = Call({**dict(zip(self._generates, args, strict=False)), **kwargs}), None
        try:
            return generate(*args, **kwargs)
        finally:
            self.samples, self._generating, self._length = before


@contextmanager
def replaced(model: nn.Module, name: str, call: Callable[..., Any]) -> Iterator[None]:
    """While inside, `model.<name>(...)` is `call(original, ...)`; only this very object is touched."""
    original, own = getattr(model, name), model.__dict__.get(name)
    seen = untraced(call)
    try:  # from here on: an interrupt may come at any line
        model.__dict__[name] = lambda *args, **kwargs: seen(original, *args, **kwargs)
        yield
    finally:
        model.__dict__.pop(name, None)
        if own is not None:  # somebody else's, who set it on this very model
            model.__dict__[name] = own
