"""What a run of a recipe will read, load and take, told before it begins, without weights and without network."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from catp_lightning.errors import DataError
from catp_lightning.evaluation.recipes.recipe import Recipe, Task
from catp_lightning.evaluation.sweep.methods import RANDOM_SEEDS, SETTINGS, is_calibrated, named

FLOPS, BANDWIDTH = 1e14, 1e12
"""What a device is taken to reach: floating-point operations in a prefill, and bytes read while decoding, a second."""
TEXT = 64
"""Tokens of text that a prompt is taken to have."""
HALF = ("bf16-true", "16-true", "transformer-engine")
ASSUMED = """\
Time: jobs x questions x (2 x parameters x (visual tokens + 64 of text) / 100 TFLOP/s + new tokens x bytes of weights /
1 TB/s / batch size), all as if nothing were pruned: about what one GPU of the A100's kind reaches. Calibrations and
reading images come on top; so do single layers, where a recipe asks for them."""


@dataclass(frozen=True)
class Size:
    """Size of a model.

    Attributes:
        parameters: number of its parameters.
        bytes_each: bytes of a parameter.
        counted: True if the model's own config was counted, else it is what the recipe says.
    """

    parameters: float
    bytes_each: int
    counted: bool

    @property
    def weights(self) -> float:
        """Bytes of the weights."""
        return self.parameters * self.bytes_each


def size_of(recipe: Recipe, model: str) -> Size:
    """Return the size of a model, from its config where that is on this machine; no weights are read.

    Args:
        recipe: the recipe, whose `parameters` are taken where there is no config.
        model: folder or name of the model.
    """
    bytes_each = 2 if recipe.trainer.get("precision") in HALF else 4
    found = _config(model)
    if found is None:
        return Size(recipe.parameters, bytes_each, counted=False)
    import torch
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        built: Any = AutoModelForImageTextToText.from_config(found)
    return Size(sum(parameter.numel() for parameter in built.parameters()), bytes_each, counted=True)


def _config(model: str) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model, local_files_only=True)
    except (OSError, ValueError):  # not here, or of a model that this transformers does not know
        return None


def jobs(scorers: Sequence[str], budgets: int, draws: int = 1) -> int:
    """Return at most how many prediction runs a sweep makes: methods at each budget, and the unpruned model.

    Methods that make no sense on the model fall away. Single layers are not counted.
    """
    count = 0
    for name in named(scorers):
        if is_calibrated(name):
            count += draws
        else:
            count += len(RANDOM_SEEDS) if name == "random" else 1 + len(SETTINGS.get(name, ()))
    return count * budgets + 1


def seconds(recipe: Recipe, task: Task, size: Size, jobs: int) -> float:
    """Return about how long a task takes on one GPU, by the arithmetic of `ASSUMED`."""
    prefill = 2 * size.parameters * (recipe.visual_tokens + TEXT) / FLOPS
    new = recipe.model.get("generation", {}).get("max_new_tokens", 10)
    decoding = new * size.weights / BANDWIDTH / task.data["init_args"].get("batch_size", 32)
    return float(jobs * task.questions * (prefill + decoding))


def missing(tasks: Sequence[Task], folder: Path) -> list[Path]:
    """Return the files and folders of some tasks that are not there."""
    places = dict.fromkeys(place for task in tasks for place in task.places(folder))
    return [place for place in places if not place.exists()]


def require_files(recipe: Recipe, tasks: Sequence[Task], folder: Path) -> None:
    """Raise DataError, before any work, if files that some tasks read are not there."""
    lost = missing(tasks, folder)
    if lost:
        raise DataError(
            f"{recipe.name} reads {len(lost)} files or folders that are not there: {', '.join(map(str, lost)):.1000}. "
            "Get them (docs/evaluation.md says from where), give another folder with --data, or name the tasks that "
            "have theirs with --task."
        )


def duration(seconds: float) -> str:
    """Return a time in the unit that suits it.

    >>> duration(40), duration(600), duration(100_000), duration(1e6)
    ('under a minute', '10 minutes', '28 hours', '12 days')
    """
    if seconds < 60:
        return "under a minute"
    for unit, each, most in (("minutes", 60, 120), ("hours", 3600, 72)):
        if (count := seconds / each) < most:
            return f"{count:.0f} {unit}"
    return f"{seconds / 86400:.0f} days"
