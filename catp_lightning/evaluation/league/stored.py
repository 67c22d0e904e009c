"""Submissions in folders: written with the policies of calibrated methods, read and checked."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from catp_lightning.errors import DataError, PolicyError
from catp_lightning.evaluation.league.submission import Row, Submission
from catp_lightning.evaluation.sweep.methods import is_calibrated
from catp_lightning.policy import PruningPolicy
from catp_lightning.policy.locations import budget_file_name
from catp_lightning.policy.typed import build
from catp_lightning.utils.files import read_bytes, write_bytes, write_json

FILE, POLICIES = "submission.json", "policies"
LARGEST = 2**22
"""Most bytes of a submission's file."""


def written(submission: Submission, results: Path, folder: Path) -> Path:
    """Write a submission, with the policies of its calibrated rows, and return its folder, <folder>/<model>/<data>.

    Args:
        submission: the submission, without policies.
        results: folder of the sweep's results on this model, in which `policies` is.
        folder: folder of all submissions.
    """
    place, rows = folder / submission.model / submission.data, []
    for row in submission.rows:
        files = _policies(row, results / POLICIES)
        for name in files:
            write_bytes(place / POLICIES / name, read_bytes(results / POLICIES / name))
        rows.append(replace(row, policies=tuple(files)))
    write_json(place / FILE, replace(submission, rows=tuple(rows)).to_json(), indent=1)
    return place


def _policies(row: Row, folder: Path) -> list[str]:
    """Return the policy files of a row, a file for each draw of its calibration."""
    if row.keep is None or not is_calibrated(row.method):
        return []
    title = row.method.replace(" ", "-")
    places = [folder / title, *sorted(folder.glob(f"{title}-draw-*"))]
    return [f"{place.name}/{name}" for place in places if (place / (name := budget_file_name(row.keep))).is_file()]


def read(folder: Path) -> Submission:
    """Return the submission in a folder, checked, its policies too.

    Raises:
        DataError: a file is missing or damaged, or a value is not allowed; the message names file, key and value.
    """
    file = folder / FILE
    try:
        content = json.loads(read_bytes(file, LARGEST))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file} cannot be read as JSON: {error!s:.200}. `catp league --run` writes it.") from error
    try:
        found = _submission(content)
    except PolicyError as error:
        raise DataError(f"{file}: {error}") from error
    if (found.model, found.data) != (folder.parent.name, folder.name):
        raise DataError(
            f"{file}: model and data are {found.model!r:.80} and {found.data!r:.80}; allowed are the names of its "
            f"folders, {folder.parent.name!r} and {folder.name!r}."
        )
    for row in found.rows:
        for name in row.policies:
            _check(folder / POLICIES / name, row)
    return found


def read_all(folder: Path) -> list[Submission]:
    """Return all submissions in a folder, by model and data; DataError as `read`, or if there is no such folder."""
    if not folder.is_dir():
        raise DataError(f"There is no folder {folder}, in which submissions are. Give it with --folder.")
    return [read(file.parent) for file in sorted(folder.glob(f"*/*/{FILE}"))]


def _submission(content: Any) -> Submission:
    if not isinstance(content, Mapping):
        raise PolicyError(f"a submission is an object, not {content!r:.80}.")
    values = dict(content)
    rows = values.pop("rows", None)
    if not isinstance(rows, list) or not rows or not all(isinstance(row, Mapping) for row in rows):
        raise PolicyError(f"rows is {rows!r:.80}; allowed is a list of objects, the first of the unpruned model.")
    built = tuple(build(Row, row, f"row {number}") for number, row in enumerate(rows, 1))
    unpruned = [number for number, row in enumerate(built) if row.keep is None]
    if unpruned != [0]:
        raise PolicyError(f"rows {[number + 1 for number in unpruned]} have keep null; allowed is the first row alone.")
    if repeated := _repeated(built):
        raise PolicyError(f"rows have {repeated} twice; allowed is one row for a method and budget.")
    return replace(build(Submission, values, "the submission"), rows=built)


def _repeated(rows: Sequence[Row]) -> str:
    seen = set()
    for row in rows:
        key = (row.method, repr(row.keep))
        if key in seen:
            return f"{row.method!r:.80} at keep {row.keep}"
        seen.add(key)
    return ""


def _check(file: Path, row: Row) -> None:
    try:
        policy = PruningPolicy.load(file)
    except PolicyError as error:
        raise DataError(f"{file}, of {row.method!r:.80}: {error}") from error
    if repr(policy.keep) != repr(row.keep):
        raise DataError(
            f"{file}: keep is {policy.keep}; allowed is {row.keep}, the budget of its row, {row.method!r:.80}."
        )
