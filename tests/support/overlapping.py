"""Batches, and policies that were calibrated on some of their images."""

from dataclasses import replace

import torch

from catp_lightning.policy import PruningPolicy
from catp_lightning.policy.images import encode_images
from tests.support.models import random_inputs
from tests.support.modules import Batch
from tests.support.policies import HALF


def batches(count: int = 4, size: int = 3, seed: int = 1) -> list[Batch]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return [random_inputs(8, size, True, torch.float32) for _ in range(count)]


def calibrated_on(images: torch.Tensor, keep: float = 0.5) -> PruningPolicy:
    return replace(HALF.with_keep(keep), evidence={"images": encode_images(images)})
