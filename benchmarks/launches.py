"""Count the kernels that a GPU is sent for one choice, and time it: Triton kernels beside the loops they stand for.

    python -m benchmarks.launches --device cuda
    python -m benchmarks.launches --device cuda --tokens 576 --batch 1 8 --keep 0.25 0.1
    python -m benchmarks.launches --tokens 16 --selectors max-min recycle

Tokens are random vectors. A choice is `Selector.select`, what it is given on the device, which tokens there are and how
many stay known on the CPU, as in a pruned run. Kernels, copies and fillings are those that torch.profiler sees on the
device; milliseconds are medians by CUDA events, the kernel compiled before. `same` says whether kernels and loop choose
the same tokens. On the CPU Triton's interpreter stands for the GPU, which says that the script runs and nothing else:
nothing is counted, and hundreds of tokens take minutes. Writes launches.json and launches.md to `--output`.
"""

import argparse
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.bench.machine import machine
from catp_lightning.methods.selection import Selection
from catp_lightning.methods.selectors import (
    SELECTORS,
    Selector,
    determinant,
    facility_location,
    fused,
    max_min,
    prune_similar,
)
from catp_lightning.methods.selectors.dpp import DPP
from catp_lightning.utils.files import write_json, write_text
from catp_lightning.utils.on_cpu import on_device

NAMES = ("dpp", "conditional-dpp", "max-min", "facility-location", "prune-similar", "recycle", "context-merge")


@contextmanager
def chosen_by(kernels: bool, device: torch.device) -> Iterator[None]:
    """Inside, selectors choose by kernels or by loops in torch, on the CPU too."""
    with ExitStack() as inside:
        if not kernels:
            inside.enter_context(patch.object(fused, "for_kernels", lambda like: False))
        elif device.type == "cpu":
            inside.enter_context(patch.object(fused, "for_kernels", lambda like: True))
        for module in (determinant, facility_location, max_min, prune_similar):
            inside.enter_context(patch.object(module, "for_numpy", lambda like: False))
        yield


def launched(choose: Callable[[], Selection], device: torch.device) -> int | None:
    """Return how many kernels, copies and fillings a choice is on the device; None on the CPU."""
    if device.type == "cpu":
        return None
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        choose()
        torch.cuda.synchronize(device)
    return sum(event.device_type == DeviceType.CUDA for event in seen.events())


def milliseconds(choose: Callable[[], Selection], device: torch.device, repeats: int) -> float:
    """Return the median time of a choice."""
    taken = []
    for _ in range(repeats):
        if device.type == "cpu":
            start = time.perf_counter()
            choose()
            taken.append((time.perf_counter() - start) * 1e3)
            continue
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        before.record()
        choose()
        after.record()
        torch.cuda.synchronize(device)
        taken.append(before.elapsed_time(after))
    return median(taken)


def compared(selector: Selector, given: tuple[Tensor, ...], device: torch.device, repeats: int) -> dict[str, Any]:
    """Return a row of the table: a choice by kernels and by loops, and what was warned of."""
    found: dict[str, Any] = {}
    made: list[Selection] = []
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", UserWarning)
        for way in ("kernels", "loops"):
            with chosen_by(way == "kernels", device):
                choose = lambda: selector.select(*given)  # noqa: E731
                made.append(choose())  # compiles what is to be compiled
                found[f"{way}_launches"] = launched(choose, device)
                found[f"{way}_ms"] = milliseconds(choose, device, repeats)
    first, second = made
    both = first.destination is not None and second.destination is not None
    same = torch.equal(first.keep, second.keep)
    found["same"] = same and (not both or torch.equal(first.destination, second.destination))  # type: ignore[arg-type]
    found["warnings"] = [str(warning.message) for warning in warned if "kernel" in str(warning.message)]
    return found


def page(found: dict[str, Any]) -> str:
    """Return the table as Markdown."""
    lines = [
        f"# Launches of a choice\n\n{', '.join(f'{key} {value}' for key, value in found['machine'].items())}\n",
        "| selector | tokens | batch | keep | launches, kernels | launches, loops | ms, kernels | ms, loops | same |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        counts = (
            "not counted" if row[key] is None else str(row[key]) for key in ("kernels_launches", "loops_launches")
        )
        lines.append(
            f"| {row['selector']} | {row['tokens']:,} | {row['batch']} | {row['keep']} | {' | '.join(counts)} "
            f"| {row['kernels_ms']:.2f} | {row['loops_ms']:.2f} | {'yes' if row['same'] else 'NO'} |"
        )
    said = sorted({warning for row in found["rows"] for warning in row["warnings"]})
    return "\n".join(lines) + "\n" + "".join(f"\n- {warning}" for warning in said)


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--selectors", nargs="+", default=NAMES, choices=NAMES)
    parser.add_argument("--tokens", nargs="+", type=int, default=[576, 2880, 6272])
    parser.add_argument("--batch", nargs="+", type=int, default=[1])
    parser.add_argument("--keep", nargs="+", type=float, default=[0.25])
    parser.add_argument("--features", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--output", type=Path, default=Path("runs/launches"))
    chosen = parser.parse_args(args)
    device: torch.device = chosen.device
    if device.type == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, with the first kernel
    found: dict[str, Any] = {"machine": machine(device, torch.float32), "rows": []}
    chosen.output.mkdir(parents=True, exist_ok=True)
    sizes = [(tokens, batch, keep) for tokens in chosen.tokens for batch in chosen.batch for keep in chosen.keep]
    for tokens, batch, keep in sizes:
        generator = torch.Generator().manual_seed(0)
        vectors = torch.randn(batch, tokens, chosen.features, generator=generator).to(device)
        scores = torch.rand(batch, tokens, generator=generator).to(device)
        visual = on_device(torch.ones(batch, tokens, dtype=torch.bool), device)
        counts = on_device(torch.full((batch,), max(1, round(tokens * keep))), device)
        for name in chosen.selectors:
            selector = DPP(similarity="outputs") if name == "dpp" else SELECTORS[name]()
            with torch.inference_mode():
                row = compared(selector, (scores, visual, counts, vectors), device, chosen.repeats)
            found["rows"].append({"selector": name, "tokens": tokens, "batch": batch, "keep": keep, **row})
            write_json(chosen.output / "launches.json", found)
            write_text(chosen.output / "launches.md", page(found))
    print(page(found))


if __name__ == "__main__":
    main()
