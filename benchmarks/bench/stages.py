"""Parts of a call, its memory, and requests a second: unpruned, as peers get their scores, and pruned."""

import ctypes
import gc
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.bench.floor import PLAIN, Runs, ratio
from benchmarks.bench.machine import most_held
from catp_lightning import PruningPolicy
from catp_lightning.pricing.parts import Parts
from catp_lightning.prompt.caches import cache_in
from catp_lightning.pruning.pruner import applied

EAGER = "eager, output_attentions"
"""The unpruned model with all attention written out: how scores are read where a package does not observe them."""

STEPS = 8
"""Decoding steps of a call, after the token that the prefill gives."""

PARTS = ("vision", "choosing", "reading", "step", "call")
"""What is told of `Parts`."""

METHODS = ("l2-norm", "fastervlm", "divprune", "cdpruner", "coverage (facility location)", "fastv")
CONCURRENT = (1, 2, 4, 8)


@dataclass(frozen=True)
class Measured:
    """One call.

    Attributes:
        parts: seconds of its parts.
        peak: bytes held at most, beyond what was held before it.
        cache: bytes of keys and values that it leaves.
    """

    parts: Parts
    peak: int
    cache: int


def call(runs: Runs, policy: PruningPolicy | None, eager: bool = False) -> Measured:
    """Answer the prompts with `STEPS + 1` tokens, pruned or not; `eager`: with all attention, as tensors."""
    outputs: list[Any] = []
    arguments = {"max_new_tokens": STEPS + 1, "min_new_tokens": STEPS + 1, "do_sample": False}
    with ExitStack() as undo:
        if eager:
            undo.enter_context(eagerly(runs.family.model))
        undo.enter_context(runs.timer.outside())
        pruner = policy and undo.enter_context(applied(runs.family.model, policy))
        undo.enter_context(runs.timer.inside(pruner))
        generate: Any = runs.family.model.generate
        held = Held(runs.family.model.device)
        parts = runs.timer.time(
            lambda: outputs.append(
                generate(**runs.inputs, **arguments, return_dict_in_generate=True, output_attentions=eager)
            )
        )
        peak = held.peak()
    assert parts is not None
    return Measured(parts, peak, cache_bytes(cache_in(outputs[0])))


@contextmanager
def eagerly(model: Any) -> Iterator[None]:
    """Let a model compute its attention eagerly while inside."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


class Held:
    """Most bytes that are held beyond those of now: of the GPU's memory, or of the process's.

    Linux keeps the largest size of a process and lets it be set to the present one; elsewhere the result is 0.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.linux = device, Path("/proc/self/clear_refs").exists()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        elif self.linux:
            gc.collect()
            if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
                trim(0)  # else what was freed is held for later, and used again unseen
            Path("/proc/self/clear_refs").write_text("5")
        self.before = self._most()

    def peak(self) -> int:
        """Return the most bytes held since this was made, beyond those held then."""
        return self._most() - self.before

    def _most(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        if not self.linux:
            return 0
        return most_held()


def cache_bytes(cache: Any) -> int:
    """Return the bytes of a cache's keys and values."""
    held: Sequence[Tensor] = [part for layer in cache.layers for part in (layer.keys, layer.values)]
    return sum(part.numel() * part.element_size() for part in held)


def stages(runs: Runs, methods: dict[str, PruningPolicy], rounds: int) -> list[dict[str, Any]]:
    """Return a row for the unpruned call, the eager one, keep 1.0 and each method: medians, ratios to the unpruned."""
    cases: dict[str, Callable[[], Measured]] = {
        PLAIN: partial(call, runs, None),
        EAGER: partial(call, runs, None, eager=True),
        "keep 1.0": partial(call, runs, PruningPolicy(keep=1.0)),
        **{name: partial(call, runs, policy) for name, policy in methods.items()},
    }
    found = in_turns(cases, rounds)
    plain = found[PLAIN]
    return [
        {
            "case": name,
            "tokens": runs.tokens,
            "batch": runs.batch,
            "rounds": rounds,
            "seconds": {part: statistics.median(getattr(one.parts, part) for one in all_) for part in PARTS},
            "over_plain": {part: _ratio(part, all_, plain) for part in PARTS if part != "choosing"},
            "peak_bytes": statistics.median(one.peak for one in all_),
            "cache_bytes": all_[0].cache,
        }
        for name, all_ in found.items()
    ]


def in_turns(cases: dict[str, Callable[[], Measured]], rounds: int) -> dict[str, list[Measured]]:
    """Return what each case measured in each round.

    All take turns, in an order that differs from round to round; a first round warms up and does not count.
    """
    found: dict[str, list[Measured]] = {name: [] for name in cases}
    order = random.Random(0)
    for number in range(rounds + 1):
        for name in order.sample(list(cases), len(cases)):
            measured = cases[name]()
            if number:
                found[name].append(measured)
    return found


def _ratio(part: str, of: Sequence[Measured], plain: Sequence[Measured]) -> tuple[float, float, float]:
    return ratio([getattr(one.parts, part) for one in of], [getattr(one.parts, part) for one in plain])


def requests(make: Callable[[int], Runs], methods: dict[str, PruningPolicy], rounds: int) -> list[dict[str, Any]]:
    """Return requests a second, unpruned and pruned, of batches of `CONCURRENT` requests that `make` gives."""
    rows = []
    for concurrent in CONCURRENT:
        runs = make(concurrent)
        asked: dict[str, PruningPolicy | None] = {PLAIN: None, **methods}
        cases = {name: partial(call, runs, policy) for name, policy in asked.items()}
        found = in_turns(cases, rounds)
        seconds = {name: [one.parts.call for one in all_] for name, all_ in found.items()}
        for name, all_ in seconds.items():
            rate = concurrent / statistics.median(all_)
            gain = ratio(seconds[PLAIN], all_)
            rows.append({"concurrent": concurrent, "case": name, "a_second": rate, "gain": gain, "tokens": runs.tokens})
    return rows


def largest_batch(answer: Callable[[int], Any], most: int = 4096) -> int:
    """Return the largest power of two of samples, at most `most`, that `answer` can be given before memory is out."""
    fits = 0
    while 2 * fits <= most:
        try:
            answer(max(1, 2 * fits))
        except torch.OutOfMemoryError:
            break
        fits = max(1, 2 * fits)
    return fits
