"""How far agreement spreads over calibration draws of several sizes, for `benchmarks.agreement --stability`."""

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import t as student

from benchmarks.agreement_verdicts import BUDGETS, yes
from catp_lightning.utils.markdown import markdown_table

SIZES = (64, 256, 512)
CLOSE = 0.01  # how far 256 calibration questions may stay behind 512


def spread(agreement: np.ndarray) -> str:
    """Return tables of agreement [draws, sizes, budgets]: spread over draws, and lag of 256 questions behind 512."""
    head = [f"keep {keep}" for keep in BUDGETS]
    lines = []
    for number, size in enumerate(SIZES):
        values = agreement[:, number]
        figures = zip(values.mean(0), values.std(0, ddof=1), values.min(0), values.max(0), strict=True)
        lines.append([str(size), *(f"{m:.3f}, {s:.3f} ({low:.3f} to {high:.3f})" for m, s, low, high in figures)])
    behind = agreement[:, SIZES.index(512)] - agreement[:, SIZES.index(256)]
    low, high = paired_interval(behind)
    means = behind.mean(0)
    cells = [f"{m:+.4f} ({a:+.4f} to {b:+.4f})" for m, a, b in zip(means, low, high, strict=True)]
    close = [["mean", *map(yes, means <= CLOSE)], ["upper end", *map(yes, high <= CLOSE)]]
    return (
        "Mean over draws, standard deviation (lowest to highest):\n\n"
        + markdown_table(["calibration questions", *head], lines)
        + "\nHow far 256 questions stay behind 512 of the same draw, 95% t interval over draws, and whether that is at "
        f"most {CLOSE}:\n\n" + markdown_table(["", *head], [["512 - 256", *cells], *close])
    )


def paired_interval(differences: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the 95% Student interval of the mean over the first axis: [draws, ...] -> lower and upper end, [...]."""
    count = len(differences)
    half = student.ppf(0.975, count - 1) * differences.std(0, ddof=1) / count**0.5
    return differences.mean(0) - half, differences.mean(0) + half


def spread_figure(agreement: np.ndarray) -> Figure:
    """Plot agreement [draws, sizes, budgets] over calibration questions: a line of means a budget, a point a draw."""
    drawing = Figure(figsize=(7, 5), layout="constrained")
    axes = drawing.subplots()
    for number, keep in enumerate(BUDGETS):
        (line,) = axes.plot(SIZES, agreement[:, :, number].mean(0), marker="o", label=f"keep {keep}")
        for values in agreement[:, :, number]:
            axes.scatter(SIZES, values, s=12, alpha=0.5, color=line.get_color())
    axes.set_xscale("log", base=2)
    axes.set_xticks(SIZES, [str(size) for size in SIZES])
    axes.set(xlabel="calibration questions, on a logarithmic scale", ylabel="agreement with the unpruned model")
    axes.legend()
    return drawing
