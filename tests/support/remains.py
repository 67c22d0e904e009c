"""What pruning could leave in a process: objects, names, memory."""

import contextlib
import ctypes
import gc
import os
import tracemalloc
import types
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

import catp_lightning
from catp_lightning import PruningError, PruningPolicy, prune
from tests.support.families import BY_NAME
from tests.support.guides import small_llava
from tests.support.matrix import PlantedError, fail
from tests.support.oracles import IMAGE, VIDEO, Inputs

LITTLE = 8 * 2**20
"""Bytes by which a process may grow once it is warm; 1,000 cycles that lose 16 KiB each grow by twice as much."""


@dataclass(frozen=True)
class Case:
    """A family and a policy; together they observe and drop in every place there is."""

    row: str
    scorer: str
    args: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        return f"{self.row}-{self.scorer}"

    @property
    def policy(self) -> PruningPolicy:
        return PruningPolicy(self.scorer, dict(self.args), keep=0.5)

    def model(self) -> PreTrainedModel:
        return replace(BY_NAME[self.row], name=f"{self} of the tests of leaks").model(torch.float32)

    def inputs(self) -> Inputs:
        row = BY_NAME[self.row]
        return row.oracle.forward_inputs(row.inputs([0], dtype=torch.float32))

    @property
    def guide(self) -> PreTrainedModel | None:
        return _guide() if self.scorer == "sgl" else None


@cache
def _guide() -> PreTrainedModel:
    return replace(BY_NAME["Llava"], name="guide of the tests of leaks", make=small_llava).model(torch.float32)


CASES = [
    Case("Blip2-OPT", "catp"),
    Case("Blip2-T5", "self-attention"),
    Case("Llava", "fastv"),
    Case("Llava", "visionzip"),
    Case("Llava", "sgl", (("answer_tokens", 2),)),
    Case("Mllama", "trimmed-llama"),
]


def registered() -> list[str]:
    return [*AttentionInterface().valid_keys(), *AttentionMaskInterface().valid_keys()]


def alive() -> Counter[str]:
    """Objects that are reachable, by kind: tensors, functions, threads of execution, and whatever is our own."""
    gc.collect()
    found: Counter[str] = Counter()
    for thing in gc.get_objects():
        kind = type(thing)
        if issubclass(kind, (Tensor, types.FunctionType, types.MethodType, types.GeneratorType, contextlib.ExitStack)):
            found[kind.__name__] += 1
        elif str(kind.__module__).partition(".")[0] == "catp_lightning":
            found[kind.__qualname__] += 1
    return found


def growing(step: Callable[[], Any], times: int) -> dict[str, int]:
    """Kinds of object of which every repetition of a step leaves some, with how many the longer of two runs left.

    A leak grows with the repetitions: it is there in the first run of `times` and in the second, twice as long, which
    leaves at least one for every second repetition. What a library makes once, or has one more of now and then, does
    not.
    """
    alive()  # what the measure itself makes at first
    left = []
    for length in (times, 2 * times):
        before = alive()
        for _ in range(length):
            step()
        left.append(alive() - before)
    first, second = left
    return {kind: count for kind, count in second.items() if count >= times and first[kind] > 0}


def memory() -> int:
    """Bytes that this process has of the machine's memory, once it has given back what it can."""
    gc.collect()
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def ways(case: Case, model: PreTrainedModel, inputs: Inputs) -> list[Callable[[], None]]:
    """What may happen in a context: nothing, a forward, text, an error of the user's, one inside the model."""
    given = {"max_new_tokens": 2, "do_sample": False, "suppress_tokens": [IMAGE, VIDEO]}

    def enter(*calls: Callable[[], Any]) -> None:
        with prune(model, case.policy, guide=case.guide):
            for call in calls:
                call()

    def break_inside() -> None:
        hook = model.get_decoder().register_forward_pre_hook(fail)
        try:
            with pytest.raises(PlantedError):
                enter(lambda: model(**inputs))
        finally:
            hook.remove()

    def break_outside() -> None:
        with pytest.raises(PlantedError):
            enter(lambda: model(**inputs), fail)

    def refused() -> None:
        with pytest.raises(PruningError, match="does not nest"):
            enter(enter)

    return [
        enter,
        lambda: enter(lambda: model(**inputs)),
        lambda: enter(lambda: model.generate(**inputs, **given)),
        break_inside,
        break_outside,
        refused,
    ]


def ours() -> int:
    """Bytes of Python's own memory that was asked for on behalf of our lines and is still held."""
    folder = str(Path(catp_lightning.__file__).parent / "*")
    snapshot = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(True, folder, all_frames=True)])
    return sum(trace.size for trace in snapshot.traces)


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """While inside, what is freed was freed because nothing refers to it: the collector of cycles does not run."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
