"""Calibrations of a sweep, of which those that an earlier run finished are reused."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from catp_lightning.callbacks import CrossAttentionCalibration
from catp_lightning.errors import PolicyError, PruningError
from catp_lightning.evaluation.sweep.jobs import data_fingerprint
from catp_lightning.evaluation.sweep.reading import Reading
from catp_lightning.methods.scorers import SCORERS
from catp_lightning.policy import PruningPolicy
from catp_lightning.policy.locations import budget_file_name
from catp_lightning.safe_text import rich_text
from catp_lightning.utils.files import read_bytes, write_json
from catp_lightning.utils.progress import Lines


def calibrated(
    reading: Reading,
    loader: Any,
    scorer: str,
    asked: Sequence[int | float] | Mapping[str, list[float]],
    settings: Mapping[str, Any],
    folder: Path,
    console: Console,
    lines: Lines,
) -> list[PruningPolicy] | str:
    """Return a policy for each budget, an earlier run's if nothing has changed; or the reason why there is none.

    `loader` gives the calibration data; `scorer` is the one method that is calibrated, or "": all candidates compete.
    `asked` are budgets of tokens, or prices in one unit, {"prefill_flops": [0.5, 0.25]}. `lines` tell its stages.
    """
    priced = dict(asked) if isinstance(asked, Mapping) else None
    budgets = [] if isinstance(asked, Mapping) else list(asked)
    now = {**settings, "data": data_fingerprint(loader)}
    now |= {"keep": [repr(keep) for keep in budgets]} if priced is None else {"budget": priced}
    if (refused := begun(folder, now)) is not None:
        return refused
    try:
        return _saved(folder, budgets, priced)
    except PolicyError:  # not yet
        console.print(rich_text(f"Calibrating{scorer and ' ' + scorer}."))
    # The union over heads keeps more than its budget, whatever the heads weigh.
    selector = "top-k" if scorer and SCORERS[scorer].selector == "union" else None
    wanted: dict[str, Any] = {"keep": budgets} if priced is None else {"budget": priced}
    try:
        calibration = CrossAttentionCalibration(folder, **wanted, scorer=scorer or None, selector=selector)
        lines.more = lambda: calibration.doing
        reading.predict(loader, calibration)
    except (PruningError, PolicyError) as error:
        return refuse(folder, now, str(error))
    finally:
        lines.more = None
    return _saved(folder, budgets, priced)


def begun(folder: Path, now: Mapping[str, Any]) -> str | None:
    """Begin, or go on with, what is made in a folder with some settings; return why an earlier run was refused.

    What was made there with other settings is deleted. None: nothing was refused.
    """
    file, now = folder / "settings.json", json.loads(json.dumps(now))  # as it comes back from a file
    try:
        before = json.loads(read_bytes(file))
        if before["settings"] != now:
            raise ValueError("made with others")
        return None if before["refused"] is None else str(before["refused"])
    except (OSError, ValueError, KeyError, TypeError):
        shutil.rmtree(folder, ignore_errors=True)
        write_json(file, {"settings": now, "refused": None}, indent=1)
        return None


def refuse(folder: Path, now: Mapping[str, Any], why: str) -> str:
    """Note why nothing can be made in a folder with these settings, and return it."""
    write_json(folder / "settings.json", {"settings": json.loads(json.dumps(now)), "refused": why}, indent=1)
    return why


def _saved(
    folder: Path, budgets: Sequence[int | float], priced: Mapping[str, list[float]] | None
) -> list[PruningPolicy]:
    """Return the policies of a calibration's folder, in the order of its budgets or prices.

    Raises:
        PolicyError: one is not there.
    """
    if priced is None:
        return [PruningPolicy.load(folder / budget_file_name(keep)) for keep in budgets]
    files = [budget_file_name(share, {unit: share}) for unit, shares in priced.items() for share in shares]
    return [PruningPolicy.load(folder / file) for file in files]
