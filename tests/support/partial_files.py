"""Partial files of calibrations, and sums in them."""

import torch
from safetensors.torch import save
from torch import Tensor
from torchmetrics import Metric

from catp_lightning.calibration import checkpoint as resume
from catp_lightning.calibration.asked import Asked
from catp_lightning.calibration.fit.sums import ImageSet, PartCounts, ProbeSums


def without(metadata: dict[str, str]) -> dict[str, str]:
    return {key: value for key, value in metadata.items() if key != "checksum"}


def signed(tensors: dict[str, Tensor], **metadata: str) -> bytes:
    """A partial file of anything, with the checksum that it should have."""
    return save(tensors, {**metadata, "checksum": resume._checksum(tensors, metadata)})


def metrics() -> dict[str, Metric]:
    return {"probes": ProbeSums(3, folds=2), "images": ImageSet(), "first": Asked(2), "parts": PartCounts()}


def update(found: dict[str, Metric], number: int) -> None:
    draw = torch.Generator().manual_seed(number)
    images = torch.randint(-(2**63), 2**63 - 1, (4,), generator=draw)
    images[0] = 7  # met in every batch
    found["probes"].update(images % 2, torch.rand(5, 4, 3, generator=draw), torch.rand(5, 4, generator=draw))
    found["images"].update(images)
    found["first"].update(images, images % 3, images.flip(0), torch.rand(2, 4, generator=draw) < 0.5)
    found["parts"].update(images % 2)
