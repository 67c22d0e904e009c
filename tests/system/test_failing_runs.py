"""Wherever a run fails, and by whatever, the model is afterwards what it was, and the next run works."""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

from catp_lightning import prune
from tests.support.failing_runs import Runs, every_place
from tests.support.footprints import footprint
from tests.support.models import TINY, random_blip2
from tests.support.policies import HALF

pytestmark = pytest.mark.usefixtures("undrawn")
KINDS = [
    *((kind, stage) for kind in ("callback", "wrapper") for stage in ("fit", "validate", "test", "predict")),
    ("calibration", "predict"),
]


@pytest.fixture(autouse=True)
def _interrupts() -> Iterator[None]:
    """Lightning ignores further interrupts after one, for good."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


QUICK = (("callback", "predict"), ("wrapper", "predict"), ("calibration", "predict"))


@pytest.mark.parametrize(
    ("kind", "stage"), [pytest.param(*each, marks=() if each in QUICK else pytest.mark.slow) for each in KINDS]
)
def test_a_failure_in_any_hook_leaves_the_model_as_it_was(kind: str, stage: str, tmp_path: Path) -> None:
    every_place(Runs(kind, stage, tmp_path), by_every_fault=False, every=3 if kind == "calibration" else 2)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "stage"), KINDS)
def test_every_failure_in_any_hook_leaves_the_model_as_it_was(kind: str, stage: str, tmp_path: Path) -> None:
    every_place(Runs(kind, stage, tmp_path), by_every_fault=True)


class Interrupting:
    """Raises at the n-th line of this package that runs while it traces."""

    def __init__(self, number: int | None = None) -> None:
        self.number, self.lines = number, list[tuple[str, int]]()

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Any:
        return self._line if PACKAGE in frame.f_code.co_filename else None

    def _line(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            self.lines.append((frame.f_code.co_filename, frame.f_lineno))
            if len(self.lines) == self.number:
                raise KeyboardInterrupt
        return self._line


PACKAGE = os.sep + "catp_lightning" + os.sep


def entered(model: nn.Module, number: int | None = None) -> list[tuple[str, int]]:
    """Enter prune and leave it again, interrupted at a line of entering: the lines."""
    tracing, before = Interrupting(number), sys.gettrace()
    try:
        sys.settrace(tracing)
        with prune(model, HALF):
            sys.settrace(before)
        assert number is None
    except KeyboardInterrupt:
        assert number is not None
    finally:
        sys.settrace(before)
    return tracing.lines


@pytest.mark.slow
def test_an_interrupt_at_any_line_of_entering_leaves_the_model_as_it_was() -> None:
    """A person's comes when it comes; each line is tried the last time that it runs."""
    model, inputs = random_blip2(shape=TINY)
    before, logits = footprint(model), model(**inputs).logits
    entered(model)  # what is done once in a process is done
    last = {line: number for number, line in enumerate(entered(model), 1)}
    assert len({file for file, _ in last}) > 10 and footprint(model) == before
    for line, number in last.items():
        assert entered(model, number)[number - 1] == line
        assert footprint(model) == before, line
    assert torch.equal(model(**inputs).logits, logits)
