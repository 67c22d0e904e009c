"""Warnings if a policy is evaluated on images of its calibration, which a policy keeps as fingerprints."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torchmetrics import Metric

from catp_lightning.policy import PruningPolicy
from catp_lightning.policy.images import decode_images, has_images
from catp_lightning.utils.messages import rank_zero_warn


class _MatchedHashes(Metric):
    """Metric that counts how many of N known images were met, by any number of processes.

    Its state is uint8 [N], 1 for an image that was met: of fixed size, reduced by maximum, and therefore exact.
    """

    full_state_update = False
    met: Tensor

    def __init__(self, images: int, alone: bool) -> None:
        super().__init__(sync_on_compute=not alone)
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
        alone: True to count the images of this process alone, and wait for no other.

    Raises:
        PolicyError: the images in the policy's evidence are damaged.
    """

    def __init__(self, policy: PruningPolicy, device: torch.device, alone: bool = False) -> None:
        hashes, self.count = decode_images(policy.evidence["images"])
        self.hashes = hashes.to(device)
        self._met = _MatchedHashes(len(hashes), alone).to(device)

    def see(self, images: Iterable[Tensor]) -> None:
        """Add the fingerprints of a batch: any number of tensors int64 [I]."""
        seen = torch.cat([self.hashes.new_empty(0), *(one.to(self.hashes.device) for one in images)])
        index = torch.searchsorted(self.hashes, seen).clamp(max=len(self.hashes) - 1)
        self._met.update(index, self.hashes[index] == seen)

    def met(self) -> int:
        """Return the number of calibration images met; a policy may know a sample of them, and then it is estimated.

        Every process must call this, unless each counts alone.
        """
        return int(self._met.compute()) * self.count // len(self.hashes)

    def message(self) -> str | None:
        """Return a warning of the calibration images met, None if there are none; called as `met`."""
        if not (met := self.met()):
            return None
        number = f"about {met:,}" if self.count > len(self.hashes) else f"{met:,}"
        return (
            f"This split contains {number} of the {self.count:,} images that the policy was calibrated on: its figures "
            "here are likely better than on new images. Evaluate on images that calibration did not read."
        )

    def warn(self) -> None:
        """Warn of the calibration images met by all processes, if any.

        Every process must call this at the end of the epoch.
        """
        if (told := self.message()) is not None:
            rank_zero_warn(told)


def overlap_check(policy: PruningPolicy, device: torch.device, alone: bool = False) -> OverlapCheck | None:
    """Return an `OverlapCheck` for one loop; None if the policy's evidence holds no images."""
    return OverlapCheck(policy, device, alone) if has_images(policy) else None
