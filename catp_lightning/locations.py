"""Where policies are kept: files, folders, Weights & Biases artifacts, repositories of the Hugging Face hub."""

import json
import tempfile
from pathlib import Path

from catp_lightning.errors import PolicyError

POLICY = "policy.json"
WANDB, HUB = "wandb://", "hf://"


def locate(path: str | Path, keep: int | float | None) -> Path:
    """The file a policy path means; remote ones are fetched.

    Raises:
        PolicyError: nothing is there, or several budgets are and `keep` names none of them.
    """
    text = str(path)
    if text.startswith(WANDB):
        return _in_folder(_from_wandb(text), keep)
    if text.startswith(HUB):
        return _in_folder(_from_hub(text), keep)
    try:
        place = Path(path).expanduser()
        if place.is_dir():
            return _in_folder(place, keep)
        there = place.is_file()
    except (OSError, RuntimeError) as error:  # a name that is too long, a folder closed to us, ~somebody
        raise PolicyError(f"{text!r:.200} cannot be looked up: {error!s:.200}. {_WHERE}") from error
    if not there:
        raise PolicyError(f"There is no policy at {text!r:.200}. {_WHERE}")
    return place if keep is None else _checked(place, keep)


_WHERE = f"Give a file, a folder, {WANDB}… or {HUB}…, or calibrate one first."


def budget_file_name(keep: int | float) -> str:
    """File name of one budget in a folder of several: `keep-0.5.json` for a share, `keep-16.json` for tokens."""
    return f"keep-{float(keep) if isinstance(keep, float) else keep!r}.json"  # not "np.float64(0.5)"


def _in_folder(folder: Path, keep: int | float | None) -> Path:
    if keep is not None and (named := folder / budget_file_name(keep)).is_file():
        return _checked(named, keep)
    budgets = sorted(file for file in folder.glob("keep-*.json"))
    single = folder / POLICY
    if keep is None and single.is_file():
        return single
    if keep is None and len(budgets) == 1:
        return budgets[0]
    there = ", ".join(file.stem.removeprefix("keep-") for file in budgets)
    if not budgets:
        if single.is_file():
            return _checked(single, keep)
        raise PolicyError(f"There is no policy in {folder}: neither {POLICY} nor keep-….json. Calibrate one first.")
    if keep is None:
        raise PolicyError(f"{folder} holds policies for several budgets ({there}): name one with keep=….")
    raise PolicyError(f"{folder} holds no policy for keep={keep!r}; it has {there}.")


def _checked(file: Path, keep: int | float | None) -> Path:
    """A single policy, if it is for the budget asked for: what it promises was measured there."""
    try:
        own = json.loads(file.read_text(encoding="utf-8"))["keep"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return file  # reading it properly will say what is wrong
    if own != ({"tokens": keep} if isinstance(keep, int) else {"share": keep}):
        raise PolicyError(
            f"{file} is for keep={own!r:.200}, not {keep!r}. Calibrate for that budget, leave keep "
            "out, or load it and take policy.with_keep(…), unmeasured."
        )
    return file


def _from_wandb(address: str) -> Path:
    import wandb

    try:
        artifact = wandb.Api().artifact(address.removeprefix(WANDB), type="catp-policy")
        return Path(artifact.download(tempfile.mkdtemp(prefix="catp-policy-")))
    except Exception as error:  # wandb raises many types, none of them documented
        raise PolicyError(
            f"{address} could not be fetched from Weights & Biases: {error}. "
            "Check the name, the network and `wandb login`."
        ) from error


def _from_hub(address: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(address.removeprefix(HUB), allow_patterns=[POLICY, "keep-*.json"]))
    except Exception as error:
        raise PolicyError(
            f"{address} could not be fetched from the Hugging Face hub: {error}. "
            "Check the name, the network and your token."
        ) from error
