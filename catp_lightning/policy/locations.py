"""Policies in files, folders, Weights & Biases artifacts and repositories of the Hugging Face hub: find and read."""

import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
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


def find(path: str | Path, keep: int | float | None, price: tuple[str, float] | None = None) -> tuple[str, Any]:
    """Find the policy that a path or address means, and read its JSON, once.

    Args:
        path: a file, a folder, or an address that begins with "wandb://" or "hf://".
        keep: the budget that the policy must be for; None: any.
        price: unit and share that the policy may cost at most; None: any.

    Returns:
        The file or address where it was found, and the JSON values.

    Raises:
        PolicyError: there is no policy, it is not JSON or is for another budget, or there are several budgets and
            `keep` names none of them.
    """
    text = str(path)
    if text.startswith(WANDB):
        with tempfile.TemporaryDirectory(prefix="catp-policy-", ignore_cleanup_errors=True) as folder:
            return text, _in_remote(text, _from_wandb(text, folder), keep, price)
    if text.startswith(HUB):
        return text, _in_remote(text, _from_hub(text), keep, price)
    try:
        place = Path(path).expanduser()
        is_folder, there = place.is_dir(), place.is_file()
    except (OSError, RuntimeError) as error:  # a name that is too long, a folder without permission, an unknown ~user
        raise PolicyError(f"{text!r:.200} cannot be looked up: {error!s:.200}. {_WHERE}") from error
    if is_folder:
        place = _in_folder(place, keep, price)
    elif not there:
        raise PolicyError(f"There is no policy at {text!r:.200}. {_WHERE}")
    values = _checked(place, keep)
    if price is not None:
        _check_paid(place, values, *price)
    if is_folder:
        _warn_where_mixed(place, values)
    return str(place), values


def policy_file(path: Path) -> Path:
    """Return the file of one policy: `path` itself, or `policy.json` in it where it has no suffix and is a folder."""
    return path if path.suffix else path / POLICY


def budget_file_name(keep: int | float, price: Mapping[str, float] | None = None) -> str:
    """File name of a budget in a folder of several.

    >>> budget_file_name(0.5), budget_file_name(16), budget_file_name(0.3, {"prefill_flops": 0.25})
    ('keep-0.5.json', 'keep-16.json', 'budget-prefill_flops-0.25.json')
    """
    if price is not None:
        ((unit, share),) = price.items()
        return f"budget-{unit}-{float(share)!r}.json"
    return f"keep-{float(keep) if isinstance(keep, float) else keep!r}.json"  # not "np.float64(0.5)"


def policies_beside(files: Sequence[Path]) -> list[Path]:
    """Other policies in the folder of `files`, at most 100, which loading from that folder may also give."""
    return [file for file in islice(_policies(files[0].parent), _MOST) if file not in files]


def _policies(folder: Path) -> Iterator[Path]:
    if os.path.lexists(folder / POLICY):
        yield folder / POLICY
    yield from _of_budgets(folder)


def _of_budgets(folder: Path) -> list[Path]:
    return sorted([*folder.glob("keep-*.json"), *folder.glob("budget-*.json")])


def _in_remote(address: str, folder: Path, keep: int | float | None, price: tuple[str, float] | None) -> Any:
    try:
        file = _in_folder(folder, keep, price)
        values = _checked(file, keep)
    except PolicyError as error:
        raise PolicyError(f"{address}: {error}") from error
    _warn_where_mixed(file, values)
    return values


def _in_folder(folder: Path, keep: int | float | None, price: tuple[str, float] | None = None) -> Path:
    """Policy file of a folder for the budget `keep`, or for a price; both None: its only one.

    Raises:
        PolicyError: the folder has no policy, or none for the budget, or several and none is named.
    """
    if price is not None:
        return _for_price(folder, *price)
    if keep is not None and os.path.lexists(named := folder / budget_file_name(keep)):
        return named
    budgets = _of_budgets(folder)
    single = folder / POLICY
    if (keep is None or not budgets) and os.path.lexists(single):
        return single
    if keep is None and len(budgets) == 1:
        return budgets[0]
    there = ", ".join(file.stem.removeprefix("keep-") for file in budgets[:_MOST])
    if not budgets:
        raise PolicyError(f"There is no policy in {folder}: neither {POLICY} nor one of a budget. Calibrate one first.")
    if keep is None:
        raise PolicyError(f"{folder} holds policies for several budgets ({there}): name one with keep=… or budget=….")
    raise PolicyError(f"{folder} holds no policy for keep={keep!r}; it has {there}.")


def _for_price(folder: Path, unit: str, share: float) -> Path:
    """Policy file of a folder that costs at most a share in a unit, and agreed most with the unpruned model.

    Raises:
        PolicyError: no policy of the folder says that it costs so little.
    """
    found = []
    for file in islice(_policies(folder), _MOST):
        try:
            evidence = json.loads(read_bytes(file, LARGEST)).get("evidence", {})
            paid, chosen = evidence.get("prices", {}).get(unit), evidence.get("chosen")
            rows = {row["name"]: row["check"] for row in evidence.get("candidates", ())}
            agreed = rows[chosen]["agreement"] if rows.get(chosen) else 0.0
        except (OSError, ValueError, RecursionError, AttributeError, TypeError, KeyError):  # damaged, or another's file
            continue
        if isinstance(paid, int | float):
            found.append((agreed, -paid, file))
    fitting = [one for one in found if -one[1] <= share * (1 + 1e-9)]
    if not fitting:
        there = ", ".join(f"{-paid:.4g}" for _, paid, _ in sorted(found, key=lambda one: one[1]))
        raise PolicyError(
            f"{folder} holds no policy that costs at most {share:g} of the unpruned model's {unit}; "
            + (f"they cost {there}." if there else "none says what it costs: calibrate with budget={…}.")
        )
    return max(fitting, key=lambda one: one[:2])[2]


def _check_paid(file: Path, values: Any, unit: str, share: float) -> None:
    """Raise PolicyError if a policy's evidence does not say that it costs at most a share in a unit."""
    evidence = values.get("evidence") if isinstance(values, dict) else None
    prices = evidence.get("prices") if isinstance(evidence, dict) else None
    paid = prices.get(unit) if isinstance(prices, dict) else None
    if not isinstance(paid, int | float) or paid > share * (1 + 1e-9):
        raise PolicyError(
            f"{file} costs {f'{paid:.4g}' if isinstance(paid, int | float) else 'an unknown share'} of the unpruned "
            f"model's {unit}, and budget asks for at most {share:g}. Calibrate for that budget, or leave budget out."
        )


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
        patterns = [POLICY, "keep-*.json", "budget-*.json"]
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=patterns))
    except Exception as error:
        raise PolicyError(
            f"{address} could not be fetched from the Hugging Face hub: {error}. "
            "Check the name, the revision, the network and your token."
        ) from error
