"""Report a calibration: three lines for the terminal, a page with figures, and both wherever the trainer logs."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from matplotlib.figure import Figure

from catp_lightning.calibration import statistics
from catp_lightning.calibration.report.controls import against
from catp_lightning.calibration.report.evidence import amount, budget_name, evidence_of, unit, visual_tokens
from catp_lightning.calibration.report.figures import head_figure, layer_figure, retention_figure, slot_figure
from catp_lightning.calibration.report.front import front_figure
from catp_lightning.calibration.report.page import interval, page, percent, worst_perturbed
from catp_lightning.calibration.report.promise import promise_broken, promise_kept
from catp_lightning.calibration.statistics.base import Statistic
from catp_lightning.pages import Example, html_page
from catp_lightning.policy import PruningPolicy
from catp_lightning.safe_text import one_line
from catp_lightning.utils.files import write_bytes, write_text
from catp_lightning.utils.loggers import has_wandb_run, log_safely
from catp_lightning.utils.plots import png

EXAMPLES = """\
Questions of the samples that nothing was decided on, asked again: what the policy keeps of the image, and both answers.
They are picked to show both kinds, so their number says nothing of how often answers differ.\
"""
COLUMNS = (
    "candidate",
    "control",
    "samples",
    "divergence",
    "agreement",
    "checked divergence",
    "checked agreement",
    "low",
    "high",
)
"""Columns of the logged table of candidates."""


def _statistic(statistic: type[Statistic], policies: Sequence[PruningPolicy]) -> Figure | None:
    """Draw a statistic's entry in the evidence; None for policies of a calibration that did not have it."""
    entry = policies[0].evidence.get(statistic.name)
    return None if entry is None else statistic.figure(entry)


Draw = Callable[[Sequence[PruningPolicy]], Figure | None]

FIGURES: dict[str, Draw] = {
    "front": front_figure,
    "retention": retention_figure,
    "layers": layer_figure,
    "heads": head_figure,
    "slots": slot_figure,
}
"""Functions that draw the figures of a report, by file name without suffix; statistics draw their own."""

PAGE, HTML = "report.md", "report.html"


def report(
    policies: Sequence[PruningPolicy],
    files: Sequence[Path],
    folder: Path,
    loggers: Sequence[Logger],
    seconds: float,
    plain_seconds: float | None = None,
    step: int = 0,
    modules: Sequence[object] = (),
    examples: Sequence[Example] = (),
) -> list[str]:
    """Write `report.md`, its figures and `report.html` into `folder`, and log it wherever the trainer logs.

    The page of HTML has every candidate, and examples with images of the data, so that it is not logged.

    Args:
        policies: policies of one calibration.
        files: file of each policy.
        folder: folder of the report; figures of an older report that this one lacks are removed.
        loggers: loggers of the trainer.
        seconds: time that the calibration took.
        plain_seconds: time that the prediction alone took, if known.
        step: step of the trainer; custom loggers may need it.
        modules: the user's module and model, in which a tokenizer is looked for that decodes questions.
        examples: questions with images, for the page of HTML.

    Returns:
        Three lines for the terminal: what was chosen, what it keeps, what it cost.
    """
    lines = {"chosen": _chosen(policies), "keeps": _keeps(policies), "cost": _cost(policies, seconds, plain_seconds)}
    draws: dict[str, Draw] = {**FIGURES, **{one.name: partial(_statistic, one) for one in statistics.STATISTICS}}
    drawn = {name: figure for name, draw in draws.items() if (figure := draw(policies)) is not None}
    images = {name: png(figure) for name, figure in drawn.items()}
    text = page(policies, lines, list(images), modules)
    _write(folder, text, images)
    whole = page(policies, lines, list(images), modules, everyone=True)
    title = f"Calibration of {(policies[0].model or {})['type']}"
    write_text(folder / HTML, html_page(title, whole, drawn, images, examples, EXAMPLES))

    def log(logger: Logger) -> None:
        if has_wandb_run(logger):
            _log_to_wandb(logger, policies, files, text, images)
        elif metrics := _metrics(policies):
            logger.log_metrics(metrics, step=step)

    log_safely(loggers, f"What the calibration found is in {folder}; it", log)
    return [f"catp: {name}: {line}" for name, line in lines.items()]


def report_folder(path: Path) -> Path:
    """Return the folder for a policy's report: inside the policy's folder, or beside a policy that is a file.

    >>> str(report_folder(Path("policies"))), str(report_folder(Path("runs/policy.json")))
    ('policies/report', 'runs/policy-report')
    """
    return path.with_name(f"{path.stem}-report") if path.suffix else path / "report"


def candidate_rows(policy: PruningPolicy) -> list[list[Any]]:
    """Return a row of `COLUMNS` for each candidate, best first; its check is None if it was eliminated before."""
    rows = []
    for row in evidence_of(policy)["candidates"]:
        choose, check = row["choose"], row["check"]
        checks = [check["divergence"], check["agreement"], *check["interval"]] if check else [None] * 4
        found = [choose["samples"], choose["divergence"], choose["agreement"]]
        rows.append([one_line(row["name"]), row["control"], *found, *checks])
    return rows


def _chosen(policies: Sequence[PruningPolicy]) -> str:
    if _unpruned(policies):
        return "no pruning: no budget keeps the promise"
    said = []
    for policy in policies:
        evidence = evidence_of(policy)
        control = " (a control: no finding of this calibration beats it)" if evidence["control"] else ""
        said.append(f"{evidence['chosen']} at {budget_name(policy)}{control}")
    smallest = ", the smallest budget that keeps the promise" if "promise" in evidence_of(policies[0]) else ""
    return "; ".join(said) + smallest


def _keeps(policies: Sequence[PruningPolicy]) -> str:
    evidence, total = evidence_of(policies[0]), visual_tokens(policies[0])
    if _unpruned(policies):
        return f"all {total} tokens, so every answer; {promise_broken(evidence['promise'])}"
    points, perturbed = {repr(point["keep"]): point for point in evidence["retention"]}, "perturbed" in evidence
    said = [
        f"{percent(point['agreement'])} ({interval(point['interval'])}) with {point['tokens']} of {total} tokens"
        + (f", {compared}" if (compared := against(point)) else "")
        + (f", at worst {worst_perturbed(policy)} on perturbed images" if perturbed else "")
        for policy in policies
        for point in [points[repr(amount(policy))]]
    ]
    line = f"of {evidence['samples']['check']} answers it was not chosen on, {'; '.join(said)}"
    return line + (f"; {promise_kept(evidence['promise'])}" if "promise" in evidence else "")


def _cost(policies: Sequence[PruningPolicy], seconds: float, plain_seconds: float | None) -> str:
    samples = sum(evidence_of(policies[0])["samples"].values())
    times = f", {seconds / plain_seconds:.1f} times the prediction alone" if plain_seconds else ""
    return f"{seconds:,.1f} s for {samples} samples{times}"


def _unpruned(policies: Sequence[PruningPolicy]) -> bool:
    """Return True if a promise was asked for that no budget keeps."""
    return not evidence_of(policies[0])["candidates"]


def _write(folder: Path, text: str, images: Mapping[str, bytes]) -> None:
    for name, image in images.items():
        write_bytes(folder / f"{name}.png", image)
    write_text(folder / PAGE, text)
    for name in FIGURES.keys() - images.keys():
        (folder / f"{name}.png").unlink(missing_ok=True)


def _metrics(policies: Sequence[PruningPolicy]) -> dict[str, float]:
    """Return agreement and divergence of each policy on the checking part; none for one that keeps all tokens."""
    metrics: dict[str, float] = {}
    for policy in policies:
        for row in evidence_of(policy)["candidates"]:
            if row["name"] == evidence_of(policy)["chosen"] and (check := row["check"]):
                name = f"catp/{unit(policy)}-{amount(policy)}"
                metrics |= {f"{name}/agreement": check["agreement"], f"{name}/divergence": check["divergence"]}
                for how, figures in evidence_of(policy).get("perturbed", {}).items():
                    metrics[f"{name}/perturbed/{one_line(how)}"] = figures[row["name"]]["agreement"]
    return metrics


def _log_to_wandb(
    logger: Any,
    policies: Sequence[PruningPolicy],
    files: Sequence[Path],
    text: str,
    images: Mapping[str, bytes],
) -> None:
    """Log metrics, tables, figures and an artifact of the policies; save the page and the policies beside the run."""
    import wandb

    first = evidence_of(policies[0])
    config = {
        "budgets": [amount(policy) for policy in policies],
        "candidates": len(first["candidates"]),
        "samples": first["samples"],
        "model": dict(policies[0].model or {}),
        "chosen": {str(amount(policy)): evidence_of(policy)["chosen"] for policy in policies},
    }
    run = logger.experiment
    if run.disabled:  # its folder is temporary, and nobody removes it
        return
    place = Path(run.dir)
    _write(place / "report", text, images)
    for policy, file in zip(policies, files, strict=True):
        policy.save(place / file.name)  # beside the run: an offline artifact lies in a staging folder
    run.config.update({"catp": config}, allow_val_change=True)
    shown: dict[str, Any] = dict(_metrics(policies))
    for policy in policies:
        if rows := candidate_rows(policy):
            shown[f"catp/{unit(policy)}-{amount(policy)}/candidates"] = wandb.Table(columns=list(COLUMNS), data=rows)
    for name in images:
        shown[f"catp/{name}"] = wandb.Image(str(place / "report" / f"{name}.png"))
    run.log(shown)  # one dictionary: each call is a step of its own
    artifact = wandb.Artifact("catp-policy", type="catp-policy", metadata=config)
    for file in files:
        artifact.add_file(str(file))
    run.log_artifact(artifact)
