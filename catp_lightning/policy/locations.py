"""Policies in files, folders, Weights & Biases artifacts and repositories of the Hugging Face hub: find and read."""

import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from catp_lightning.errors import PolicyError
from catp_lightning.policy.budgets import keep_to_json
from catp_lightning.policy.frozen import LARGEST
from catp_lightning.policy.stages import keep_in_file
from catp_lightning.utils.files import read_bytes
from catp_lightning.utils.messages import warn

POLICY = "policy.json"
WANDB, HUB = "wandb://", "hf://"

_WHERE = f"Give a file, a folder, {WANDB}… or {HUB}…, or calibrate one first."
_MOST = 100
"""Most policies of a folder that are compared with the one that is read; a calibration writes about ten."""


def find(path: str | Path, keep: int | float | None) -> tuple[str, Any]:
    """Find the policy that a path or address means, and read its JSON, once.

    Args:
        path: a file, a folder, or an address that begins with "wandb://" or "hf://".
        keep: the budget that the policy must be for; None: any.

    Returns:
        The file or address where it was found, and the JSON values.

    Raises:
        PolicyError: there is no policy, it is not JSON or is for another budget, or there are several budgets and
            `keep` names none of them.
    """
    text = str(path)
    if text.startswith(WANDB):
        with tempfile.TemporaryDirectory(prefix="catp-policy-", ignore_cleanup_errors=True) as folder:
            return text, _in_remote(text, _from_wandb(text, folder), keep)
    if text.startswith(HUB):
        return text, _in_remote(text, _from_hub(text), keep)
    try:
        place = Path(path).expanduser()
        is_folder, there = place.is_dir(), place.is_file()
    except (OSError, RuntimeError) as error:  # a name that is too long, a folder without permission, an unknown ~user
        raise PolicyError(f"{text!r:.200} cannot be looked up: {error!s:.200}. {_WHERE}") from error
    if is_folder:
        place = _in_folder(place, keep)
    elif not there:
        raise PolicyError(f"There is no policy at {text!r:.200}. {_WHERE}")
    values = _checked(place, keep)
    if is_folder:
        _warn_where_mixed(place, values)
    return str(place), values


def budget_file_name(keep: int | float) -> str:
    """File name of a budget in a folder of several: `keep-0.5.json` for a share, `keep-16.json` for tokens."""
    return f"keep-{float(keep) if isinstance(keep, float) else keep!r}.json"  # not "np.float64(0.5)"


def policies_beside(files: Sequence[Path]) -> list[Path]:
    """Other policies in the folder of `files`, at most 100, which loading from that folder may also give."""
    return [file for file in islice(_policies(files[0].parent), _MOST) if file not in files]


def _policies(folder: Path) -> Iterator[Path]:
    if os.path.lexists(folder / POLICY):
        yield folder / POLICY
    yield from folder.glob("keep-*.json")


def _in_remote(address: str, folder: Path, keep: int | float | None) -> Any:
    try:
        file = _in_folder(folder, keep)
        values = _checked(file, keep)
    except PolicyError as error:
        raise PolicyError(f"{address}: {error}") from error
    _warn_where_mixed(file, values)
    return values


def _in_folder(folder: Path, keep: int | float | None) -> Path:
    """Policy file of a folder for the budget `keep`; None: its only one.

    Raises:
        PolicyError: the folder has no policy, or none for `keep`, or several and `keep` is None.
    """
    if keep is not None and os.path.lexists(named := folder / budget_file_name(keep)):
        return named
    budgets = sorted(folder.glob("keep-*.json"))
    single = folder / POLICY
    if (keep is None or not budgets) and os.path.lexists(single):
        return single
    if keep is None and len(budgets) == 1:
        return budgets[0]
    there = ", ".join(file.stem.removeprefix("keep-") for file in budgets[:_MOST])
    if not budgets:
        raise PolicyError(f"There is no policy in {folder}: neither {POLICY} nor keep-….json. Calibrate one first.")
    if keep is None:
        raise PolicyError(f"{folder} holds policies for several budgets ({there}): name one with keep=….")
    raise PolicyError(f"{folder} holds no policy for keep={keep!r}; it has {there}.")


def _checked(file: Path, keep: int | float | None) -> Any:
    """JSON values of a policy file; its budget must be `keep`, as its promises were measured at that budget only.

    Raises:
        PolicyError: the file cannot be read, or is for another budget.
    """
    try:
        values = _parsed(file)
    except (OSError, ValueError, RecursionError) as error:
        raise PolicyError(f"{file} cannot be read as a policy: {error}. Save it again, or calibrate again.") from error
    own = keep_in_file(values)
    if keep is not None and own is not None and own != keep_to_json(keep):
        raise PolicyError(
            f"{file} is for keep={own!r:.200}, not {keep!r}. Calibrate for that budget, leave keep "
            "out, or load it and take policy.with_keep(…), unmeasured."
        )
    return values


def _parsed(file: Path) -> Any:
    """JSON values of a regular file of at most 4 MiB; of a key that occurs twice the last value is used, and warned of.

    Raises:
        OSError: the file cannot be read.
        ValueError: its content is not JSON, or holds NaN or infinity.
        RecursionError: its content is nested too deep for `json`.
    """
    twice: set[str] = set()

    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(found)
        if len(values) < len(found):
            twice.update(key for key, count in Counter(key for key, _ in found).items() if count > 1)
        return values

    text = read_bytes(file, LARGEST).decode()
    values = json.loads(text, parse_constant=_no_constants, object_pairs_hook=pairs)
    if twice:
        warn(
            f"{file} says more than once: {', '.join(map(repr, sorted(twice))):.200}. What stands last is used; "
            "leave the others out, or save the policy again.",
            stacklevel=5,
        )
    return values


def _no_constants(name: str) -> None:
    raise ValueError(f"{name} is not a number a policy may hold")


def _warn_where_mixed(file: Path, values: Any) -> None:
    """Warn if the folder of a policy also holds policies of another calibration: they are not budgets of one choice."""
    own, others = _calibration(values), []
    for other in policies_beside([file]):
        try:
            found = _calibration(json.loads(read_bytes(other, LARGEST)))
        except (OSError, ValueError, RecursionError):  # another file than the one asked for
            continue
        if found is not None and own is not None and found != own:
            others.append(other.name)
    if others:
        warn(
            f"{file.parent} holds policies of different calibrations: {file.name}, which is used, was found by another "
            f"than {', '.join(sorted(others)):.200}, on other data, another model or for other budgets. Delete what is "
            "out of date, or give each calibration a folder of its own.",
            stacklevel=4,
        )


def _calibration(values: Any) -> list[Any] | None:
    """Values that all policies of one calibration share; None if the policy does not come from a calibration."""
    evidence = values.get("evidence") if isinstance(values, dict) else None
    if not isinstance(evidence, dict) or not evidence.get("retention"):
        return None
    return [values.get("model"), *(evidence.get(key) for key in ("samples", "images", "retention", "fitted"))]


def _from_wandb(address: str, folder: str) -> Path:
    import wandb

    try:
        artifact = wandb.Api().artifact(address.removeprefix(WANDB), type="catp-policy")
        return Path(artifact.download(folder))
    except Exception as error:  # wandb raises many types, none of them documented
        raise PolicyError(
            f"{address} could not be fetched from Weights & Biases: {error}. "
            "Check the name, the network and `wandb login`."
        ) from error


def _from_hub(address: str) -> Path:
    from huggingface_hub import snapshot_download

    repository, pinned, revision = address.removeprefix(HUB).partition("@")
    if pinned and not revision:
        raise PolicyError(f"{address} names no revision after the @: give a branch, a tag or a commit, or no @.")
    try:
        patterns = [POLICY, "keep-*.json"]
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=patterns))
    except Exception as error:
        raise PolicyError(
            f"{address} could not be fetched from the Hugging Face hub: {error}. "
            "Check the name, the revision, the network and your token."
        ) from error
