"""A submission: what methods reached with one model on one data set, as a folder that anybody can send and check."""

import datetime
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import inf
from typing import Any

from catp_lightning.evaluation.sweep.table import ModelTable
from catp_lightning.policy.budgets import check_keep

FORMAT = 1
"""Version of a submission's file."""


@dataclass(frozen=True)
class Figure:
    """A figure that a data set reports beside accuracy, by its name: `pope_f1`."""

    name: str
    value: float


@dataclass(frozen=True)
class Row:
    """One method at one budget.

    Attributes:
        method: its name.
        keep: the budget, a share (0.5) or a number of tokens (16); None: the unpruned model.
        tokens: mean number of visual tokens that stay of a sample.
        tokens_per_layer: mean number of visual tokens that a layer of the language model reads.
        agreement: share of answers that equal the unpruned model's, in [0, 1].
        agreement_interval: its 95% interval, two ascending numbers.
        accuracy: by the data set's rule, the mean over questions, in [0, 1]; None: there are no right answers.
        accuracy_interval: its 95% interval.
        accuracy_share: accuracy over the unpruned model's; None also where that is 0.
        accuracy_change: accuracy minus the unpruned model's, paired by question, in [-1, 1].
        accuracy_change_interval: its 95% interval.
        figures: what the data set reports beside accuracy.
        prefill_flops: FLOPs of the prefill, as a share of the unpruned model's; None: not counted for this model.
        prefill_seconds: time of the prefill, as a share of the unpruned model's; None: not measured.
        seconds: time of the whole run; None: not measured.
        control: True if it is a control that a real method must beat.
        policies: files of the policies that were used, below `policies`; for calibrated methods.
    """

    method: str
    keep: int | float | None
    tokens: float
    tokens_per_layer: float
    agreement: float
    agreement_interval: tuple[float, ...]
    accuracy: float | None = None
    accuracy_interval: tuple[float, ...] | None = None
    accuracy_share: float | None = None
    accuracy_change: float | None = None
    accuracy_change_interval: tuple[float, ...] | None = None
    figures: tuple[Figure, ...] = ()
    prefill_flops: float | None = None
    prefill_seconds: float | None = None
    seconds: float | None = None
    control: bool = False
    policies: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.keep is not None:
            check_keep(self.keep)
        for names, low, high in (
            (("accuracy", "agreement"), 0, 1),
            (("accuracy_change",), -1, 1),
            (("tokens", "tokens_per_layer", "accuracy_share", "prefill_flops", "prefill_seconds", "seconds"), 0, inf),
        ):
            for name in names:
                value = getattr(self, name)
                if value is not None and not low <= value <= high:
                    allowed = "at least 0" if high == inf else f"from {low} to {high}"
                    raise ValueError(f"{name} is {value!r}; allowed is a number {allowed}.")
        for name in ("accuracy_interval", "agreement_interval", "accuracy_change_interval"):
            interval = getattr(self, name)
            if interval is not None and (len(interval) != 2 or interval[0] > interval[1]):
                raise ValueError(f"{name} is {list(interval)!r:.80}; allowed are two ascending numbers.")
        for policy in self.policies:
            if not re.fullmatch(r"[\w-]+/keep-[\w.-]+\.json", policy, re.ASCII):
                raise ValueError(f"policies has {policy!r:.80}; allowed is <method>/keep-<budget>.json.")


@dataclass(frozen=True)
class Submission:
    """What methods reached with one model on one data set.

    Attributes:
        format_version: of the file, 1.
        model: name of the model.
        data: name of the data set; with `model` the name of the folder, <model>/<data>.
        recipe: the recipe that was run.
        task: the recipe's task.
        about: number of questions and images, in words.
        digest: checksum of the questions as the model was given them, 16 hex digits.
        weights: checksum of the model.
        versions: packages with their versions, a text each.
        machine: what it ran on, in words.
        date: day of the run, as 2026-01-31.
        rows: methods at budgets; the first is the unpruned model.
        notes: why methods are not among them.
    """

    format_version: int
    model: str
    data: str
    recipe: str
    task: str
    about: str
    digest: str
    weights: str
    versions: tuple[str, ...]
    machine: str
    date: str
    rows: tuple[Row, ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.format_version != FORMAT:
            raise ValueError(f"format_version is {self.format_version}; this version of catp-lightning reads {FORMAT}.")
        if not re.fullmatch(r"[0-9a-f]{16}", self.digest):
            raise ValueError(f"digest is {self.digest!r:.80}; allowed are 16 hex digits.")
        try:
            datetime.date.fromisoformat(self.date)
        except ValueError as error:
            raise ValueError(f"date is {self.date!r:.80}; allowed is a day, as 2026-01-31.") from error

    @classmethod
    def of(cls, table: ModelTable, recipe: str, task: str, machine: str, day: datetime.date) -> "Submission":
        """Return the submission of a sweep's table."""
        versions = table.settings["versions"]
        return cls(
            format_version=FORMAT,
            model=table.name,
            data=task,
            recipe=recipe,
            task=task,
            about=table.about,
            digest=str(table.settings["data"]),
            weights=str(table.settings["weights"]),
            versions=tuple(f"{name} {version}" for name, version in versions.items()),
            machine=machine,
            date=day.isoformat(),
            rows=tuple(_row(row) for row in table.rows),
            notes=tuple(f"{title}: {why}" for title, why in table.notes.items()),
        )

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain JSON types; of rows those that are set."""
        rows = [{key: value for key, value in asdict(row).items() if key == "keep" or value not in (None, ())}
                for row in self.rows]  # fmt: skip
        return {**asdict(self), "rows": rows}


def _row(row: Mapping[str, Any]) -> Row:
    names = ("tokens", "agreement", "agreement_interval", "accuracy", "accuracy_interval", "accuracy_share",
             "accuracy_change", "accuracy_change_interval", "seconds", "control")  # fmt: skip
    values = {name: row[name] for name in names if row.get(name) is not None}
    values |= {name: tuple(value) for name, value in values.items() if name.endswith("interval")}
    figures = tuple(Figure(name, value) for name, value in row.get("figures", {}).items())
    per_layer = row.get("tokens_per_layer", row["tokens"])
    flops = row.get("prices", {}).get("prefill_flops")
    return Row(row["method"], row["keep"], tokens_per_layer=per_layer, figures=figures, prefill_flops=flops, **values)
