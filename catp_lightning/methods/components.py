"""Components of embeddings: the few numbers by which methods that were fitted tell questions, or tokens, apart."""

import base64
import binascii
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from catp_lightning.methods.observation import Observation, Signal
from catp_lightning.utils.hashing import mix
from catp_lightning.utils.on_cpu import on_device_as

HASHED = 256
"""Dimensions to which longer embeddings are hashed (feature hashing, 0902.2206) before components are computed."""


@dataclass(frozen=True)
class Components:
    """Linear components of embeddings, fitted to those of a calibration.

    Embeddings of more than 256 dimensions are first hashed to 256, so that components are small whatever the model.

    Attributes:
        basis: base64 of C x W numbers, float32 and little-endian: a row for each component, with W columns for the
            dimensions of the embedding, or 256 if it has more.
        offset: C numbers, added to the products.

    Raises:
        ValueError: `basis` is not base64 of C rows of finite numbers, or there are no components.
    """

    basis: str
    offset: tuple[float, ...]

    def __post_init__(self) -> None:
        try:
            rows = np.frombuffer(base64.b64decode(self.basis, validate=True), "<f4")
        except (binascii.Error, ValueError) as error:
            raise ValueError(f"basis is not base64 of float32: {error}.") from error
        if not self.offset or not len(rows) or len(rows) % len(self.offset) or not np.isfinite(rows).all():
            raise ValueError(f"basis has {len(rows)} numbers; {len(self.offset)} components need as many finite rows.")

    @classmethod
    def of(cls, basis: np.ndarray, offset: np.ndarray) -> Self:
        """Encode components: float [C, W] and float [C]."""
        encoded = base64.b64encode(basis.astype("<f4").tobytes()).decode()
        return cls(encoded, tuple(float(f"{value:.6g}") for value in offset))

    @property
    def count(self) -> int:
        """Number of components."""
        return len(self.offset)

    def rows(self) -> np.ndarray:
        """Return the weights of the components: float32 [C, W]."""
        return np.frombuffer(base64.b64decode(self.basis), "<f4").reshape(self.count, -1)

    def of_embeddings(self, embeddings: Tensor) -> Tensor:
        """Return the components of embeddings: float [..., D] -> float32 or float64 [..., C].

        Raises:
            ValueError: the embeddings have other dimensions than those that the components were fitted to.
        """
        read = hashed(embeddings.to(torch.promote_types(embeddings.dtype, torch.float32)))
        rows = self.rows()
        if rows.shape[1] != read.shape[-1]:
            raise ValueError(
                f"the components are of {rows.shape[1]} dimensions; this model's embeddings give {read.shape[-1]}. "
                "Calibrate on this model."
            )
        basis = on_device_as(read, torch.tensor(rows, dtype=torch.float32, device="cpu"))
        return read @ basis.T + on_device_as(read, torch.tensor(self.offset, dtype=torch.float64, device="cpu"))


class Question(Components):
    """Components of the mean embedding of a prompt's text."""

    def components(self, seen: Observation) -> Tensor:
        """Return the components of each image's question: float32 or float64 [I, C]."""
        return self.of_embeddings(seen[Signal.QUESTION])


class Features(Components):
    """Components of a visual token as it leaves the vision part."""

    def components(self, seen: Observation) -> Tensor:
        """Return the components of each token: float32 or float64 [I, T, C]."""
        return self.of_embeddings(seen[Signal.IMAGE_FEATURES])


def hashed(embeddings: Tensor) -> Tensor:
    """Add up the dimensions of long embeddings in 256 buckets, with signs: float [..., D] -> float [..., min(D, 256)].

    Dimension d falls into bucket d modulo 256, with a sign that depends on d alone. The expected inner product of two
    embeddings stays what it was.
    """
    count = embeddings.shape[-1]
    if count <= HASHED:
        return embeddings
    draws = mix(torch.arange(count, dtype=torch.int64, device=embeddings.device))
    signed = embeddings * ((draws & 1) * 2 - 1).to(embeddings.dtype)
    return F.pad(signed, (0, -count % HASHED)).unflatten(-1, (-1, HASHED)).sum(-2)
