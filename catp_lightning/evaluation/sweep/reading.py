"""One model of a sweep with its questions, the parts of its calibration split, and its copy that guides."""

import copy
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch.utils.data import DataLoader, Subset

from catp_lightning.errors import PolicyError
from catp_lightning.models import Family


@dataclass(frozen=True)
class Reading:
    """One model of a sweep with its questions, and the function that predicts the answers.

    Attributes:
        module: module that holds the model; its prediction step returns answers.
        test: returns a loader of the compared questions.
        calibration: returns a loader of the calibration split; None: there is no such split.
        predict: `trainer.predict` on a loader, with a callback or None.
        device: device that the model runs on.
        settings: settings that answers depend on beside weights, data and policy; JSON types.
    """

    module: LightningModule
    test: Callable[[], Any]
    calibration: Callable[[], Any] | None
    predict: Callable[[Any, Any], Sequence[Any]]
    device: torch.device
    settings: Mapping[str, Any]


def name_of(family: Family) -> str:
    """Return the name of a model, which its folder gets as well."""
    name = Path(str(family.describe()["name"])).name
    return family.name if name in ("", "..") else name


def calibration_draws(reading: Reading, draws: int) -> list[Any]:
    """Return loaders of `draws` consecutive parts of the calibration split; [] if there is no such split.

    Raises:
        PolicyError: the split cannot be divided, or has fewer questions than `draws`.
    """
    if reading.calibration is None:
        return []
    loader = reading.calibration()
    if draws == 1:
        return [loader]
    data = getattr(loader, "dataset", None)
    if not isinstance(loader, DataLoader) or not isinstance(data, Sized) or len(data) < draws:
        raise PolicyError(
            f"calibration_draws is {draws}, but the calibration split cannot be divided into as many parts: that takes "
            "a DataLoader over a data set with a length, of at least so many questions. Give calibration_draws=1."
        )
    ends = [len(data) * part // draws for part in range(draws + 1)]
    return [
        DataLoader(Subset(data, range(first, end)), batch_size=loader.batch_size, collate_fn=loader.collate_fn)  # type: ignore[arg-type]
        for first, end in pairwise(ends)
    ]


def guide_of(family: Family, device: torch.device) -> Callable[[], Any]:
    """Return a function that gives the guide of guided methods: a copy of the model itself, made once, when needed."""
    copies: list[Any] = []

    def guide() -> Any:
        if not copies:
            own: Any = copy.deepcopy(family.model)
            copies.append(own.to(device))
        return copies[0]

    return guide
