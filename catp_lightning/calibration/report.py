"""What people see of a calibration: a line, a table, a figure; the same in Weights & Biases."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, WandbLogger
from matplotlib.figure import Figure

from catp_lightning.policy import PruningPolicy

COLUMNS = ("candidate", "control", "divergence", "agreement", "checked divergence", "checked agreement", "low", "high")


HEAD = r"cross-attention layer (\d+) head (\d+)"


def summary_line(policy: PruningPolicy) -> str:
    """One budget in one line."""
    evidence = policy.evidence
    check, samples = _checked(policy), evidence["samples"]["check"]
    low, high = check["interval"]
    control = ", a control: no finding of this calibration beats it" if evidence["control"] else ""
    return (
        f"keep {policy.keep}: {evidence['chosen']}{control}; answers as the unpruned model on {check['agreement']:.1%} "
        f"({low:.1%} to {high:.1%}) of {samples} samples it was not chosen on."
    )


def _checked(policy: PruningPolicy) -> dict[str, Any]:
    """The chosen candidate's figures on the part of the split it was not chosen on."""
    return next(row["check"] for row in policy.evidence["candidates"] if row["name"] == policy.evidence["chosen"])


def candidate_rows(policy: PruningPolicy) -> list[list[Any]]:
    """A row for each candidate, best first, under `COLUMNS`."""
    return [
        [
            row["name"],
            row["control"],
            row["choose"]["divergence"],
            row["choose"]["agreement"],
            row["check"]["divergence"],
            row["check"]["agreement"],
            *row["check"]["interval"],
        ]
        for row in policy.evidence["candidates"]
    ]


def layer_figure(policies: Sequence[PruningPolicy]) -> Figure:
    """Agreement when one cross-attention layer votes alone; figure 5 of 2404.08567, for the user's own model."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for policy in policies:
        found = {int(match[1]): row["check"] for match, row in _matching(policy, r"catp layer (\d+)")}
        numbers = sorted(found)
        agreed = [found[n]["agreement"] for n in numbers]
        errors = [[abs(found[n]["agreement"] - found[n]["interval"][end]) for n in numbers] for end in (0, 1)]
        axes.errorbar(numbers, agreed, yerr=errors, marker="o", capsize=3, label=f"keep {policy.keep}")
        axes.set_xticks(numbers)
    axes.set(
        xlabel="cross-attention layer that votes alone", ylabel="agreement with the unpruned model", ylim=(0, 1.02)
    )
    axes.legend()
    return figure


def head_figure(policies: Sequence[PruningPolicy]) -> Figure:
    """Agreement when one cross-attention head votes alone: a heatmap of layers and heads for each budget."""
    figure = Figure(figsize=(1 + 3.2 * len(policies), 3.6), layout="constrained")
    grid = figure.subplots(1, len(policies), squeeze=False)[0]
    for axes, policy in zip(grid, policies, strict=True):
        found = {(int(m[1]), int(m[2])): row["check"]["agreement"] for m, row in _matching(policy, HEAD)}
        layers, heads = (max(key[axis] for key in found) + 1 for axis in (0, 1))
        shown = axes.imshow([[found[layer, head] for head in range(heads)] for layer in range(layers)], vmin=0, vmax=1)
        axes.set(title=f"keep {policy.keep}", xlabel="head", ylabel="cross-attention layer")
        axes.set_xticks(range(heads))
        axes.set_yticks(range(layers))
    figure.colorbar(shown, ax=list(grid), label="agreement, head alone")
    return figure


def _matching(policy: PruningPolicy, pattern: str) -> Iterator[tuple[re.Match[str], dict[str, Any]]]:
    for row in policy.evidence["candidates"]:
        if match := re.fullmatch(pattern, row["name"]):
            yield match, row


def log_calibration(loggers: Sequence[Logger], policies: Sequence[PruningPolicy], files: Sequence[Path]) -> None:
    """Log a calibration wherever the trainer logs; to a WandbLogger also tables, figures and an artifact."""
    metrics = {}
    for policy in policies:
        checked = _checked(policy)
        metrics[f"catp/keep-{policy.keep}/agreement"] = checked["agreement"]
        metrics[f"catp/keep-{policy.keep}/divergence"] = checked["divergence"]
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            _log_to_wandb(logger, policies, files, metrics)
        else:
            logger.log_metrics(metrics)


def _log_to_wandb(
    logger: WandbLogger, policies: Sequence[PruningPolicy], files: Sequence[Path], metrics: dict[str, float]
) -> None:
    import wandb

    first = policies[0].evidence
    config = {
        "budgets": [policy.keep for policy in policies],
        "candidates": len(first["candidates"]),
        "samples": first["samples"],
        "model": dict(policies[0].model or {}),
        "chosen": {str(policy.keep): policy.evidence["chosen"] for policy in policies},
    }
    run = logger.experiment
    run.config.update({"catp": config}, allow_val_change=True)
    shown: dict[str, Any] = dict(metrics)
    for policy in policies:
        shown[f"catp/keep-{policy.keep}/candidates"] = wandb.Table(columns=list(COLUMNS), data=candidate_rows(policy))
    shown["catp/layers"] = wandb.Image(layer_figure(policies))
    shown["catp/heads"] = wandb.Image(head_figure(policies))
    run.log(shown)  # one dictionary: each call is a step of its own
    artifact = wandb.Artifact("catp-policy", type="catp-policy", metadata=config)
    for policy, file in zip(policies, files, strict=True):
        artifact.add_file(str(file))
        policy.save(Path(run.dir) / file.name)  # beside the run: an offline artifact lies in a staging folder
    run.log_artifact(artifact)
