"""Measure pruned prefills against floor runs, and write JSON and Markdown.

    make bench
    OMP_NUM_THREADS=1 python -m benchmarks.bench --tokens 576 2880 --batch 1 4 --keep 0.5 0.25 0.1 0.05 --seconds 600
    python -m benchmarks.bench --device cuda --dtype bfloat16 --shape 7b --tokens 576 2880 --batch 1 4 --seconds 30

A floor run is the plain decoder on rows that are as few, layer by layer. Runs take turns; figures are medians of paired
ratios with the 95% bootstrap interval of the median. `--seconds` is for each number of tokens, batch and budget. The
file is written after each of these, so what was measured stays if the rest is stopped.
"""

import argparse
from pathlib import Path
from typing import Any

import torch

from benchmarks.bench.floor import Runs, against_floor, policies
from benchmarks.bench.machine import machine
from benchmarks.bench.shapes import GRIDS, SHAPES, llava, prompt
from catp_lightning.utils.files import write_json, write_text
from catp_lightning.utils.markdown import markdown_table

HEADER = [
    "tokens",
    "batch",
    "keep",
    "method",
    "ms",
    "of unpruned",
    "over floor",
    "choosing, of unpruned",
    "FLOPs",
    "pairs",
]


def page(found: dict[str, Any]) -> str:
    """Return the Markdown page of a measurement."""
    about = ", ".join(f"{name} {value}" for name, value in found["machine"].items())
    table = [
        [
            *(str(row[name]) for name in ("tokens", "batch", "keep", "method")),
            f"{1000 * row['pruned_s']:.4g}",
            f"{row['over_plain'][0]:.3f}",
            "{:.3f} ({:.3f} to {:.3f})".format(*row["over_floor"]),
            f"{row['choosing_share'][0]:.2%}",
            f"{row['flops_share']:.3f}",
            str(row["rounds"]),
        ]
        for row in found["rows"]
    ]
    left = "".join(f"- {name}: {why}\n" for name, why in found["left_out"].items())
    return f"{found['shape']}: {about}\n\n{markdown_table(HEADER, table)}\nNot measured:\n\n{left}"


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model and three rounds: does it run at all?")
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--shape", default="small", choices=SHAPES)
    parser.add_argument("--tokens", nargs="+", type=int, default=[576], choices=GRIDS)
    parser.add_argument("--batch", nargs="+", type=int, default=[1])
    parser.add_argument("--keep", nargs="+", type=float, default=[0.25, 0.1])
    parser.add_argument("--methods", nargs="+", help="all that need nothing from outside, if not given")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=360.0)
    parser.add_argument("--output", type=Path, default=Path("runs/bench"))
    chosen = parser.parse_args(args)
    if chosen.quick:
        chosen.shape, chosen.tokens, chosen.batch, chosen.rounds, chosen.seconds = "tiny", [144], [2], 3, 0.0
    dtype = getattr(torch, chosen.dtype)
    found: dict[str, Any] = {
        "shape": chosen.shape,
        "machine": machine(chosen.device, dtype),
        "rows": [],
        "left_out": {},
    }
    chosen.output.mkdir(parents=True, exist_ok=True)
    with torch.inference_mode():
        for tokens in chosen.tokens:
            model = llava(chosen.shape, tokens, chosen.device, dtype)
            for batch in chosen.batch:
                runs = Runs(model, prompt(model, tokens, batch))
                for keep in chosen.keep:
                    methods, found["left_out"] = policies(runs.family, keep)
                    if chosen.methods:
                        methods = {name: methods[name] for name in chosen.methods}
                    found["rows"] += against_floor(runs, methods, chosen.seconds, chosen.rounds)
                    write_json(chosen.output / "floor.json", found)
                    write_text(chosen.output / "floor.md", page(found))
    print(page(found))


if __name__ == "__main__":
    main()
