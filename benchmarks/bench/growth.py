"""How times grow with visual tokens, text, batch and layers, with the exponents of what is measured."""

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from benchmarks.answers import scenes_split
from benchmarks.bench.floor import PLAIN, Runs
from benchmarks.bench.shapes import GRIDS, llava, prompt
from benchmarks.calibration import Setting
from catp_lightning import PruningPolicy
from catp_lightning.data import GRIDS as GRIDS_OF
from catp_lightning.methods.selectors import SELECTORS

FEATURES = 512
KEEP = 0.25
SETS = ("dpp", "facility-location", "max-min", "prune-similar", "recycle", "context-merge")
VARIED: dict[str, Sequence[int]] = {"text": (40, 160, 640), "batch": (1, 2, 4, 8), "layers": (4, 8, 16)}
EXPECTED = {"text": 1, "batch": 1, "layers": 1, "calibration": 1}
"""Exponent that a prefill's time should have at most; of visual tokens it comes to 2 where attention is all."""

Times = dict[str, list[tuple[int, float]]]


def choosing(rounds: int, device: torch.device, tokens: Sequence[int] = tuple(GRIDS)) -> Times:
    """Return the seconds of one choice of a quarter of the tokens, for each selector of sets and number of tokens.

    Features are random, which is the slowest case of a DPP: all tokens gain nearly alike. The least of the rounds.
    """
    found: Times = {name: [] for name in SETS}
    for count in tokens:
        generator = torch.Generator().manual_seed(0)
        vectors = torch.randn(1, count, FEATURES, generator=generator).to(device)
        scores = torch.rand(1, count, generator=generator).to(device)
        visual = torch.ones(1, count, dtype=torch.bool, device=device)
        keep = torch.full((1,), int(KEEP * count), device="cpu", dtype=torch.int64)
        for name in SETS:
            selector = SELECTORS[name]()
            run = lambda: selector.select(scores, visual, keep.to(device), vectors)  # noqa: B023, E731
            found[name].append((count, _least(run, rounds, device)))
    return found


def prefills(
    shape: str, rounds: int, device: torch.device, dtype: torch.dtype, tokens: Sequence[int] = tuple(GRIDS)
) -> dict[str, Times]:
    """Return the seconds of a prefill, unpruned and with a quarter of the tokens, over each of `VARIED` and tokens."""
    policies = {PLAIN: None, "l2-norm": PruningPolicy("l2-norm", keep=KEEP)}
    found: dict[str, Times] = {}
    for varied, sizes in {"tokens": tokens, **VARIED}.items():
        found[varied] = {name: [] for name in policies}
        for size in sizes:
            visual, given = (size if varied == "tokens" else 576), {varied: size}
            model = llava(shape, visual, device, dtype, layers=given.get("layers"))
            runs = Runs(model, prompt(model, visual, given.get("batch", 1), given.get("text", 40)))
            for name, policy in policies.items():
                runs.parts(policy)
                least = min(runs.parts(policy).reading for _ in range(rounds))
                found[varied][name].append((size, least))
    return found


def calibrations(questions: Sequence[int] = (64, 128)) -> Times:
    """Return the seconds of a whole calibration of the shipped BLIP-2, with the prediction pass it is made in."""
    found: list[tuple[int, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        for count in questions:
            split = scenes_split(Path(folder, str(count)), "calibration", count, 0, GRIDS_OF["digits_blip2"])
            setting = Setting("digits_blip2", split, 64)
            start = time.perf_counter()
            setting.calibrate()
            found.append((count, time.perf_counter() - start))
    return {"calibration": found}


def _least(run: Callable[[], Any], rounds: int, device: torch.device) -> float:
    seconds = []
    for _ in range(rounds):
        _wait(device)
        start = time.perf_counter()
        run()
        _wait(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def exponent(points: Sequence[tuple[int, float]]) -> float:
    """Return the exponent between the last two points."""
    (size, seconds), (larger, longer) = points[-2:]
    return math.log(longer / seconds) / math.log(larger / size)


def figure(choices: Times, grown: dict[str, Times]) -> Figure:
    """Draw all on logarithmic axes, with the expected order as a dashed line through the first point."""
    drawing = Figure(figsize=(13, 7), layout="constrained", facecolor="white")
    panels = drawing.subplots(2, 3).flat
    _panel(next(panels), "one choice of 1/4 of the tokens", "visual tokens", choices, 2)
    for varied, times in grown.items():
        title = "a whole calibration" if varied == "calibration" else "prefill"
        label = {"tokens": "visual tokens", "calibration": "questions"}.get(varied, varied)
        _panel(next(panels), title, label, times, EXPECTED.get(varied, 2))
    for axes in panels:
        axes.set_axis_off()
    return drawing


def _panel(axes: Any, title: str, label: str, times: Times, order: int) -> None:
    ends = []
    for number, (name, points) in enumerate(times.items()):
        sizes, seconds = zip(*points, strict=True)
        axes.plot(sizes, seconds, marker="o", markersize=4, color=f"C{number}")
        ends.append((seconds[-1], f"{name}, {exponent(points):.1f}", f"C{number}"))
    first = min(points[0][1] for points in times.values())
    size = next(iter(times.values()))[0][0]
    axes.plot(sizes, [first * (one / size) ** order for one in sizes], "--", color="0.6")
    axes.set(xscale="log", yscale="log", title=title, xlabel=f"{label}, logarithmic", ylabel="seconds, logarithmic")
    axes.set_xticks(sizes, [str(one) for one in sizes])
    axes.minorticks_off()
    least, most = axes.get_ylim()
    axes.set_ylim(least / 1.5, max(most, 15 * least))  # two powers of ten at least, which are labelled
    _label_ends(axes, sizes[-1], [*ends, (first * (sizes[-1] / size) ** order, f"order {order}", "0.4")])
    axes.grid(alpha=0.3)


def _label_ends(axes: Any, at: float, ends: Sequence[tuple[float, str, str]]) -> None:
    """Name lines at their right ends, moved apart so that no name covers another."""
    low, high = (math.log(limit) for limit in axes.get_ylim())
    above = 1.07
    for value, name, colour in sorted(ends, reverse=True):
        above = min((math.log(value) - low) / (high - low), above - 0.07)
        axes.annotate(name, (1.01, above), xycoords="axes fraction", color=colour, fontsize=8, va="center")
