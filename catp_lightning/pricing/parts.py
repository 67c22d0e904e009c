"""Seconds of the parts of a model's call: vision, choosing, prefill and decoding steps, as they run."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from catp_lightning.models import Family
from catp_lightning.pruning.pruner import Pruner
from catp_lightning.utils.hooks import hooked


class Clock:
    """Clock of the devices that a model is on.

    On one CUDA device its marks are events, for which no work has to wait. On the CPU they are times; on any other
    device, or on several, times at which all work that was given to them is done.
    """

    def __init__(self, model: nn.Module) -> None:
        devices = {tensor.device for tensor in model.parameters()}
        self._others = sorted((device for device in devices if device.type not in ("cpu", "meta")), key=str)
        self._events = len(devices) == 1 and [device.type for device in self._others] == ["cuda"]

    def mark(self) -> Any:
        """Return a mark of this moment in the work of the devices."""
        if self._events:
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._others[0]))
            return event
        for device in self._others:
            torch.accelerator.synchronize(device)
        return time.perf_counter()

    def seconds(self, start: Any, end: Any) -> float:
        """Return the seconds between two marks, once the work before the later one is done."""
        if not self._events:
            return float(end - start)
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000


@dataclass(frozen=True)
class Parts:
    """Seconds of one call.

    Attributes:
        vision: before the part of the language model that reads visual tokens, observing signals included.
        choosing: scores and selections, wherever tokens leave.
        prefill: the first call of that part, without choosing: rows that leave, masks, layers, the cache.
        decoding: all that follows: the head, and in `generate` the decoding steps.
        steps: number of decoding steps.
        stepping: seconds of these, from the end of the prefill to the end of the last.
    """

    vision: float
    choosing: float
    prefill: float
    decoding: float
    steps: int
    stepping: float

    @property
    def step(self) -> float:
        """Seconds of a decoding step, with what `generate` does between two; not a number where there was none."""
        return self.stepping / self.steps if self.steps else float("nan")

    @property
    def reading(self) -> float:
        """Seconds of the prefill, choosing included."""
        return self.choosing + self.prefill

    @property
    def call(self) -> float:
        """Seconds of the whole call."""
        return self.vision + self.reading + self.decoding


@dataclass
class _Marks:
    entered: list[Any] = field(default_factory=list)  # of the part that reads visual tokens: its first call
    left: list[Any] = field(default_factory=list)
    chosen: list[tuple[Any, Any]] = field(default_factory=list)
    steps: list[Any] = field(default_factory=list)  # ends of decoding steps


class PartTimer:
    """Timer of the parts of one model's calls; calls that it does not make itself run as ever.

    `outside` is entered before the model is pruned and `inside` after, so that all that pruning does is counted.

    Args:
        family: family of the model.
    """

    def __init__(self, family: Family) -> None:
        self.family, self.clock = family, Clock(family.model)
        text: Any = family.language_model
        self._stepper: nn.Module = text.decoder if family.reads == "encoder" else family.decoder
        self._marks: _Marks | None = None

    @contextmanager
    def outside(self) -> Iterator[None]:
        """Mark when the language model begins to read a prompt, while inside."""
        with hooked(self.family.decoder, before=self._enter):
            yield

    @contextmanager
    def inside(self, pruner: Pruner | None = None) -> Iterator[None]:
        """Mark when it has read it, each decoding step and each choice of a pruner, while inside."""
        with ExitStack() as undo:
            undo.enter_context(hooked(self.family.decoder, after=self._leave))
            if self._stepper is not self.family.decoder:
                undo.enter_context(hooked(self._stepper, after=self._step))
            if pruner is not None:
                decide = pruner.site.decide
                undo.callback(setattr, pruner.site, "decide", decide)
                pruner.site.decide = lambda prompt: self._choose(decide, prompt)
            yield

    def time(self, call: Callable[[], Any]) -> Parts | None:
        """Return the seconds of a call's parts; None if it did not reach the language model."""
        self._marks = marks = _Marks()
        start = self.clock.mark()
        try:
            call()
        finally:
            self._marks = None
        end = self.clock.mark()
        if not marks.left:
            return None
        between, entered, left = self.clock.seconds, marks.entered[0], marks.left[0]
        choosing = sum(between(*both) for both in marks.chosen)
        return Parts(
            vision=between(start, entered),
            choosing=choosing,
            prefill=between(entered, left) - choosing,
            decoding=between(left, end),
            steps=len(marks.steps),
            stepping=between(left, marks.steps[-1]) if marks.steps else 0.0,
        )

    def _enter(self, *_: Any) -> None:
        if self._marks is not None and not self._marks.entered:
            self._marks.entered.append(self.clock.mark())

    def _leave(self, *_: Any) -> None:
        if self._marks is not None:
            ends = self._marks.steps if self._marks.left else self._marks.left
            ends.append(self.clock.mark())

    def _step(self, *_: Any) -> None:
        if self._marks is not None:
            self._marks.steps.append(self.clock.mark())

    def _choose(self, decide: Callable[[Any], Any], prompt: Any) -> Any:
        if self._marks is None:
            return decide(prompt)
        start = self.clock.mark()
        selection = decide(prompt)
        self._marks.chosen.append((start, self.clock.mark()))
        return selection
