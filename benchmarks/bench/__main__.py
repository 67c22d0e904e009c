"""Measure pruned runs against floor runs, part by part, under load and as prompts grow; write JSON, Markdown, a plot.

    make bench
    python -m benchmarks.bench floor --tokens 576 2880 --batch 1 4 --keep 0.5 0.25 0.1 0.05 --seconds 600
    python -m benchmarks.bench --device cuda --dtype bfloat16 --shape 7b --seconds 30

A floor run is the plain decoder on rows that are as few, layer by layer. Runs take turns; figures are medians of paired
ratios with the 95% bootstrap interval of the median. `--seconds` is for each number of tokens, batch and budget of the
floor runs. The file is written after each table, so what was measured stays if the rest is stopped.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.bench.families import MODELS, build
from benchmarks.bench.families import prompt as family_prompt
from benchmarks.bench.floor import Runs, against_floor, policies
from benchmarks.bench.growth import calibrations, choosing, figure, prefills
from benchmarks.bench.machine import machine
from benchmarks.bench.observing import observing
from benchmarks.bench.page import page
from benchmarks.bench.shapes import GRIDS, SHAPES, llava, prompt
from benchmarks.bench.stages import METHODS, call, largest_batch, requests, stages
from catp_lightning import PruningPolicy
from catp_lightning.utils.files import write_bytes, write_json, write_text
from catp_lightning.utils.plots import png

Found = dict[str, Any]


@torch.inference_mode()
def floor(chosen: argparse.Namespace, found: Found, save: Callable[[], None]) -> None:
    """Add prefills of all methods against their floor runs."""
    found["floor"] = []
    for tokens in chosen.tokens:
        model = llava(chosen.shape, tokens, chosen.device, chosen.dtype)
        for batch in chosen.batch:
            runs = Runs(model, prompt(model, tokens, batch))
            for keep in chosen.keep:
                methods, found["left_out"] = policies(runs.family, keep)
                for name in chosen.methods or ():
                    if name not in methods:
                        reason = found["left_out"].get(name, f"there are {', '.join(methods)}")
                        raise SystemExit(f"{name} cannot be measured here: {reason.rstrip('.')}.")
                methods = {name: methods[name] for name in chosen.methods or methods}
                found["floor"] += against_floor(runs, methods, chosen.seconds, chosen.rounds)
                save()


@torch.inference_mode()
def parts(chosen: argparse.Namespace, found: Found, save: Callable[[], None]) -> None:
    """Add parts of calls with 1/4 of the tokens, observing, requests a second; on a GPU the largest batch."""
    model = llava(chosen.shape, chosen.tokens[0], chosen.device, chosen.dtype)
    make = lambda batch: Runs(model, prompt(model, chosen.tokens[0], batch))  # noqa: E731
    runs = make(chosen.batch[0])
    quarter, half = (policies(runs.family, keep)[0] for keep in (0.25, 0.5))
    found["parts"] = stages(runs, {name: quarter[name] for name in METHODS}, min(5, chosen.rounds))
    save()
    found["observing"] = observing(chosen.quick, min(5, chosen.rounds), chosen.device, chosen.dtype)
    save()
    served = {f"{name}, {keep}": by[name] for name in SERVED for keep, by in (("1/2", half), ("1/4", quarter))}
    found["requests"] = requests(make, served, min(3, chosen.rounds))
    save()
    if chosen.device.type == "cuda":
        cases = {"unpruned": None, "l2-norm, 1/4": quarter["l2-norm"]}
        found["largest_batch"] = {
            name: largest_batch(lambda batch, policy=policy: call(make(batch), policy))  # type: ignore[misc]
            for name, policy in cases.items()
        }


@torch.inference_mode()
def families(chosen: argparse.Namespace, found: Found, save: Callable[[], None]) -> None:
    """Add the parts of calls of models of other families at released shapes; small ones with `--quick`."""
    found["families"] = {}
    for name, (_, _, methods) in MODELS.items():
        model = build(name, chosen.quick, chosen.device, chosen.dtype)
        runs = Runs(model, family_prompt(model, chosen.batch[0], 12 if chosen.quick else 48))
        by_name = {method: PruningPolicy(method, keep=0.25) for method in methods}
        found["families"][name] = stages(runs, by_name, min(5, chosen.rounds))
        save()


def growth(chosen: argparse.Namespace, found: Found, save: Callable[[], None]) -> None:
    """Add times of choices, prefills of a small model and calibrations over what each grows with, and draw them."""
    sizes = tuple(GRIDS)[:2] if chosen.quick else tuple(GRIDS)
    rounds = min(3, chosen.rounds)
    with torch.inference_mode():
        choices = choosing(1 if chosen.quick else 2, chosen.device, sizes)
        grown = prefills("tiny", rounds, chosen.device, chosen.dtype, sizes)
    if not chosen.quick:
        grown["calibration"] = calibrations()
    found["growth"] = {"choosing": choices, "over": grown}
    save()
    write_bytes(chosen.output / "growth.png", png(figure(choices, grown)))


SERVED = ("divprune",)
"""Methods whose requests a second are told."""

TABLES: dict[str, Callable[[argparse.Namespace, Found, Callable[[], None]], None]] = {
    "floor": floor,
    "parts": parts,
    "growth": growth,
    "families": families,
}
ON_CPU = ("floor", "parts", "growth")
"""What is measured there if nothing is named: released shapes take hours."""


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "tables", nargs="*", help=f"{', '.join(TABLES)}; if none is named {', '.join(ON_CPU)}, on a GPU all"
    )
    parser.add_argument("--quick", action="store_true", help="a tiny model and three rounds: does it run at all?")
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--shape", default="small", choices=SHAPES)
    parser.add_argument("--tokens", nargs="+", type=int, default=[576], choices=GRIDS)
    parser.add_argument("--batch", nargs="+", type=int, default=[1])
    parser.add_argument("--keep", nargs="+", type=float, default=[0.25, 0.1])
    parser.add_argument("--methods", nargs="+", help="all that need nothing from outside, if not given")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=200.0)
    parser.add_argument("--output", type=Path, default=Path("runs/bench"))
    chosen = parser.parse_args(args)
    if unknown := set(chosen.tables) - set(TABLES):
        parser.error(f"no table is called {', '.join(sorted(unknown))}; there are {', '.join(TABLES)}")
    if chosen.quick:
        chosen.shape, chosen.tokens, chosen.batch, chosen.rounds, chosen.seconds = "tiny", [144], [2], 3, 0.0
    chosen.dtype = getattr(torch, chosen.dtype)
    found: Found = {"shape": chosen.shape, "machine": machine(chosen.device, chosen.dtype)}
    chosen.output.mkdir(parents=True, exist_ok=True)

    def save() -> None:
        write_json(chosen.output / "bench.json", found)
        write_text(chosen.output / "bench.md", page(found))

    for name in chosen.tables or (ON_CPU if chosen.device.type == "cpu" else TABLES):
        TABLES[name](chosen, found, save)
        save()
    print(page(found))


if __name__ == "__main__":
    main()
