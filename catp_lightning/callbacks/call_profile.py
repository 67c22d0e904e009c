"""Times of a loop's first model calls, pruned and unpruned side by side, for `TokenPruning(profile=True)`."""

import math
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torchmetrics import MeanMetric

from catp_lightning.models import Family
from catp_lightning.pricing.parts import Parts, PartTimer
from catp_lightning.pruning.answers import from_the_beginning, goes_on
from catp_lightning.pruning.pruner import Pruner
from catp_lightning.pruning.record import Prefill
from catp_lightning.utils.hooks import hooked, replaced
from catp_lightning.utils.markdown import markdown_table
from catp_lightning.utils.messages import rank_zero_warn
from catp_lightning.utils.signatures import parameters_of

CALLS = 8
"""Number of calls that are timed, after one that warms up."""

PARTS: Mapping[str, Callable[[Parts], float]] = {
    "vision": lambda parts: parts.vision,
    "choosing": lambda parts: parts.choosing,
    "prefill": lambda parts: parts.reading,
    "step": lambda parts: parts.step,
    "call": lambda parts: parts.call,
}
"""What is logged of a call; the prefill has the choosing in it."""

TITLES = {
    "vision": "vision",
    "choosing": "choosing, of the prefill",
    "prefill": "prefill",
    "step": "a decoding step",
    "call": "the whole call",
}


class CallProfile:
    """Times of one model's calls; each of the first is made twice more, unpruned and pruned, before it is made itself.

    Text-only calls and those that go on with a filled cache are not timed. Which of the two comes first changes from
    call to call. The calls made for the times count in no other figure, take no random numbers from the user's, and
    have caches of their own.

    Args:
        family: family of the model.
        device: device of the sums over processes.
    """

    def __init__(self, family: Family, device: torch.device) -> None:
        self.family, self.timer = family, PartTimer(family)
        model: Any = family.model
        self._names = {name: parameters_of(getattr(model, name)) for name in ("generate", "forward")}
        self._pruner: Pruner | None = None
        self._pairs: list[tuple[Parts, Parts]] = []  # of each call, unpruned and pruned
        self._samples: list[int] = []
        self._made, self._busy = 0, False
        self._device = device

    @contextmanager
    def outside(self) -> Iterator[None]:
        """Context that is entered before the model is pruned."""
        with hooked(self.family.model, before=self._before_forward), self.timer.outside():
            yield

    @contextmanager
    def inside(self, pruner: Pruner) -> Iterator[None]:
        """Context that is entered after the model is pruned, by `pruner`."""
        self._pruner = pruner
        try:
            with replaced(self.family.model, "generate", self._generate), self.timer.inside(pruner):
                yield
        finally:
            self._pruner = None

    def _generate(self, generate: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._busy:
            return generate(*args, **kwargs)
        self._measure(generate, self._names["generate"], args, kwargs)
        self._busy = True  # its forwards are its own steps
        try:
            return generate(*args, **kwargs)
        finally:
            self._busy = False

    def _before_forward(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._busy:
            self._measure(module, self._names["forward"], args, kwargs)

    def _measure(
        self, call: Callable[..., Any], names: list[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        """Time a call, unpruned and pruned, if it is one of the first; `names` are those of its arguments in order."""
        given, pruner = {**dict(zip(names, args, strict=False)), **kwargs}, self._pruner
        if pruner is None or self._made > CALLS or goes_on(given):
            return
        again = from_the_beginning(given)
        found: dict[bool, Parts | None] = {}
        prefills: list[Prefill] = []
        on_prefill, pruner.on_prefill, self._busy = pruner.on_prefill, prefills.append, True
        devices = [self.family.model.device] if self.family.model.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices):
                for pruned in ((False, True), (True, False))[self._made % 2]:
                    found[pruned] = self._timed(pruner, pruned, lambda: call(**again))
        finally:
            pruner.on_prefill, self._busy = on_prefill, False
        plain, short = found[False], found[True]
        if plain is None or short is None or not any(bool(prefill.counts.any()) for prefill in prefills):
            return  # no image was read
        self._made += 1
        if self._made > 1:
            self._pairs.append((plain, short))
            self._samples.append(sum(len(prefill.counts) for prefill in prefills))

    def _timed(self, pruner: Pruner, pruned: bool, call: Callable[[], Any]) -> Parts | None:
        if pruned:
            return self.timer.time(call)
        with pruner.suspended():
            return self.timer.time(call)

    def figures(self) -> dict[str, float]:
        """Figures of the calls so far, by name: the median of each, the mean of those over processes.

        Empty, with a warning, if no call was timed. Every process must call this at the end of the epoch.
        """
        own = self._own()
        names = [f"{kind}seconds_{part}" for kind in ("", "unpruned_") for part in PARTS]
        names += ["speedup_prefill", "speedup_step", "speedup", "samples_per_second", "unpruned_samples_per_second"]
        found = {}
        for name in (*names, "profiled_calls"):
            mean = MeanMetric(nan_strategy="ignore").to(self._device)
            values = torch.tensor([own.get(name, float("nan")), 0.0], dtype=torch.float32, device=self._device)
            mean.update(values, torch.tensor([1.0, 0.0], dtype=torch.float32, device=self._device))  # never empty
            if not math.isnan(value := float(mean.compute())):
                found[f"catp/{name}"] = value
        if not found:
            rank_zero_warn(
                f"TokenPruning(profile=True) timed nothing: {type(self.family.model).__name__} was given an image in "
                "one call or in none, and the first only warms up. Give at least two batches with images."
            )
        return found

    def _own(self) -> dict[str, float]:
        """Return the figures of this process."""
        if not self._pairs:
            return {}
        found: dict[str, float] = {}
        for number, kind in enumerate(("unpruned_", "")):
            for part, of in PARTS.items():
                found[f"{kind}seconds_{part}"] = _median([of(pair[number]) for pair in self._pairs])
            each = [count / pair[number].call for count, pair in zip(self._samples, self._pairs, strict=True)]
            found[f"{kind}samples_per_second"] = _median(each)
        for name, part in (("speedup_prefill", "prefill"), ("speedup_step", "step"), ("speedup", "call")):
            of = PARTS[part]
            found[name] = _median([of(plain) / of(pruned) for plain, pruned in self._pairs])
        return {**found, "profiled_calls": float(len(self._pairs))}


def _median(values: list[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return statistics.median(known) if known else float("nan")


def _milliseconds(figures: Mapping[str, float], part: str) -> tuple[float, float]:
    """Return the milliseconds of a part of a call, unpruned and pruned."""
    return 1000 * figures[f"catp/unpruned_seconds_{part}"], 1000 * figures[f"catp/seconds_{part}"]


def profile_table(figures: Mapping[str, float]) -> str:
    """Return the figures of a `CallProfile` as a Markdown table; empty if nothing was timed."""
    rows = []
    for part, title in TITLES.items():
        if f"catp/seconds_{part}" in figures:
            plain, pruned = _milliseconds(figures, part)
            rows.append([title, f"{plain:.4g}", f"{pruned:.4g}", f"{plain / pruned:.2f}" if plain and pruned else ""])
    if not rows:
        return ""
    plain, pruned = (figures[f"catp/{kind}samples_per_second"] for kind in ("unpruned_", ""))
    rows.append(["samples per second", f"{plain:.4g}", f"{pruned:.4g}", f"{pruned / plain:.2f}"])
    return markdown_table(["ms, medians", "unpruned", "pruned", "times as fast"], rows)


def profile_line(figures: Mapping[str, float]) -> str:
    """Return the figures of a `CallProfile` in a line."""
    speedups = {"prefill": "speedup_prefill", "step": "speedup_step", "call": "speedup"}
    said = []
    for part, name in speedups.items():
        if f"catp/{name}" in figures:
            plain, pruned = _milliseconds(figures, part)
            said.append(f"{TITLES[part]} {figures[f'catp/{name}']:.2f} times as fast ({pruned:.4g} of {plain:.4g} ms)")
    rates = (figures[f"catp/{kind}samples_per_second"] for kind in ("", "unpruned_"))
    many = f"{next(rates):.4g} samples/s, unpruned {next(rates):.4g}"
    return f"catp: profile of {figures['catp/profiled_calls']:g} calls: {', '.join(said)}; {many}"
