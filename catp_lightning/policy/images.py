"""Fingerprints of a calibration's images, as a policy's evidence holds them."""

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from catp_lightning.errors import PolicyError
from catp_lightning.policy.policy import PruningPolicy
from catp_lightning.utils.hashing import mix

MAX_STORED_HASHES = 100_000
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
    if count > MAX_STORED_HASHES:
        found = found[mix(found).argsort()[:MAX_STORED_HASHES]].sort().values
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
