"""Plot of `benchmarks.shift`: agreement over tokens kept, calibrated against the rules that matter.

python -m benchmarks.shift_figure runs/shift/shift.json docs/calibrated.png
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.shift_tables import TITLES
from catp_lightning.evaluation.sweep.methods import CALIBRATED
from catp_lightning.utils.files import write_bytes
from catp_lightning.utils.plots import png

SHOWN = ("random (3 seeds)", "divprune", "l2-norm", "stride", "grid", "catp", "fastervlm", "trimmed-llama, top-k")
"""Rules that are named beside `CALIBRATED`; all others are grey."""


def figure(measured: Mapping[str, Any]) -> Figure:
    """Plot agreement on scenes as calibrated, a panel for each model; `measured` is what `shift.json` holds."""
    drawing = Figure(figsize=(13, 4.5), layout="constrained")
    panels = drawing.subplots(1, len(measured), sharey=True, squeeze=False)[0]
    for axes, (model, found) in zip(panels, measured.items(), strict=True):
        lines: dict[str, list[dict[str, Any]]] = {}
        for row in found["settings"]["as calibrated"]["rows"]:
            lines.setdefault(row["method"], []).append(row)
        for name in sorted(lines, key=lambda name: (name == CALIBRATED, name in SHOWN)):
            rows = sorted(lines[name], key=lambda row: row["keep"])
            keeps, means = [row["keep"] for row in rows], [row["agreement"] for row in rows]
            if name == CALIBRATED:
                low, high = zip(*(row["agreement_interval"] for row in rows), strict=True)
                axes.fill_between(keeps, low, high, color="C3", alpha=0.2, linewidth=0)
                axes.plot(keeps, means, color="C3", linewidth=3, marker="o", label=CALIBRATED)
            elif name in SHOWN:
                axes.plot(keeps, means, color=f"C{(0, 1, 2, 4, 5, 6, 8, 9)[SHOWN.index(name)]}", marker=".", label=name)
            else:
                axes.plot(keeps, means, color="0.82", linewidth=0.8, zorder=0)
        axes.set_xscale("log", base=2)
        axes.set_xticks(keeps, [f"1/{round(1 / keep)}" for keep in keeps])
        axes.minorticks_off()
        axes.set(title=TITLES.get(model, model), xlabel="visual tokens kept, logarithmic")
        axes.legend(fontsize=8, loc="lower right")
        axes.grid(alpha=0.3)
    panels[0].set(ylabel="agreement with the unpruned model", ylim=(0.25, 1.01))
    return drawing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="shift.json of one or several runs")
    parser.add_argument("picture", type=Path, help="file to write")
    arguments = parser.parse_args()
    measured: dict[str, Any] = {}
    for file in arguments.results:
        measured |= json.loads(file.read_text())
    write_bytes(arguments.picture, png(figure({name: measured[name] for name in TITLES if name in measured}), dpi=110))


if __name__ == "__main__":
    main()
