"""Warnings if a policy is evaluated on images of its calibration, which a policy keeps as fingerprints."""

import base64
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from catp_lightning.errors import PolicyError
from catp_lightning.fingerprint import mix
from catp_lightning.policy import PruningPolicy
from catp_lightning.saying import rank_zero_warn

MOST = 100_000
"""Most fingerprints that a policy keeps: 800 kB, 1.1 MB as text."""


def encode_images(hashes: Tensor | np.ndarray) -> dict[str, Any]:
    """Encode the fingerprints of a calibration's images for `policy.evidence["images"]`.

    Args:
        hashes: int64 of any shape, the `fingerprint` of every image read; an image may occur several times.

    Returns:
        "count", the number of different images, and "hashes", base64 of their fingerprints as little-endian int64,
        ascending. Of more than 100,000 images a sample is kept that depends neither on order nor on processes.

    Raises:
        ValueError: `hashes` is not int64, or empty.

    >>> encode_images(torch.tensor([7, -1, 7]))
    {'count': 2, 'hashes': '//////////8HAAAAAAAAAA=='}
    """
    found = torch.as_tensor(hashes)
    if found.dtype != torch.int64 or not found.numel():
        raise ValueError(f"hashes are fingerprints, int64, of at least one image, got {found.numel()} {found.dtype}.")
    found = found.cpu().unique()
    count = len(found)
    if count > MOST:
        found = found[mix(found).argsort()[:MOST]].sort().values
    return {"count": count, "hashes": base64.b64encode(found.numpy().astype("<i8").tobytes()).decode()}


def decode_images(entry: Any) -> tuple[Tensor, int]:
    """Decode the output of `encode_images`: N different fingerprints, int64 [N] ascending, and the number of images.

    Raises:
        PolicyError: `entry` is damaged.

    >>> decode_images({"count": 2, "hashes": "//////////8HAAAAAAAAAA=="})
    (tensor([-1,  7]), 2)
    """
    try:
        if not isinstance(entry, Mapping) or not {"count", "hashes"} <= set(entry):
            raise ValueError('it should hold "count" and "hashes"')
        count, text = entry["count"], entry["hashes"]
        if not isinstance(text, str):
            raise ValueError('"hashes" should be text')
        hashes = np.unique(np.frombuffer(base64.b64decode(text, validate=True), "<i8").astype(np.int64))
        if type(count) is not int or not 1 <= len(hashes) <= count:
            raise ValueError(f'"count" is {count!r:.50}, but there are {len(hashes)} different hashes')
    except ValueError as error:
        raise PolicyError(
            f'The images in the evidence of the policy cannot be read: {error}. Take "images" out of its evidence to '
            "use it without being warned of the images it was calibrated on, or calibrate again."
        ) from error
    return torch.from_numpy(hashes), count


def has_images(policy: PruningPolicy) -> bool:
    """True if a policy's evidence holds the fingerprints of the images it was calibrated on."""
    return policy.evidence.get("images") is not None


class _Met(Metric):
    """Metric that counts how many of N known images were met, by any number of processes.

    Its state is uint8 [N], 1 for an image that was met: of fixed size, reduced by maximum, and therefore exact.
    """

    full_state_update = False
    met: Tensor

    def __init__(self, images: int) -> None:
        super().__init__()
        self.add_state("met", torch.zeros(images, dtype=torch.uint8, device="cpu"), dist_reduce_fx="max")

    def update(self, index: Tensor, found: Tensor) -> None:
        """Add B images.

        Args:
            index: int64 [B], index of the known image that each may be.
            found: bool [B], True where the image is that one.
        """
        # A new tensor: a state made under inference_mode may not be changed in place outside it.
        self.met = self.met.scatter_reduce(0, index, found.to(self.met.dtype), "amax")

    def compute(self) -> Tensor:
        return self.met.sum()


class OverlapCheck:
    """Counts the images of one evaluation loop that the policy was calibrated on, and warns of them at its end.

    Images are recognised by their pixel values as the model reads them: with another resizing, augmentation or
    precision they are different images.

    Args:
        policy: a policy with images in its evidence.
        device: device of the fingerprints; nothing is copied from it before `warn`.

    Raises:
        PolicyError: the images in the policy's evidence are damaged.
    """

    def __init__(self, policy: PruningPolicy, device: torch.device) -> None:
        hashes, self.count = decode_images(policy.evidence["images"])
        self.hashes = hashes.to(device)
        self._met = _Met(len(hashes)).to(device)

    def see(self, images: Iterable[Tensor]) -> None:
        """Add the fingerprints of a batch: any number of tensors int64 [I]."""
        seen = torch.cat([self.hashes.new_empty(0), *(one.to(self.hashes.device) for one in images)])
        index = torch.searchsorted(self.hashes, seen).clamp(max=len(self.hashes) - 1)
        self._met.update(index, self.hashes[index] == seen)

    def warn(self) -> None:
        """Warn of the number of calibration images met by all processes, if any.

        Every process must call this at the end of the epoch.
        """
        met = int(self._met.compute())
        if not met:
            return
        sample = self.count > len(self.hashes)
        number = f"about {met * self.count // len(self.hashes):,}" if sample else f"{met:,}"
        rank_zero_warn(
            f"This split contains {number} of the {self.count:,} images that the policy was calibrated on: its figures "
            "here are likely better than on new images. Evaluate on images that calibration did not read."
        )


def overlap_check(policy: PruningPolicy, device: torch.device) -> OverlapCheck | None:
    """Return an `OverlapCheck` for one loop; None if the policy's evidence holds no images."""
    return OverlapCheck(policy, device) if has_images(policy) else None
