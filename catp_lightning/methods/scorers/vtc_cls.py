"""VTC-CLS: attention of [CLS] in several layers of the vision tower (2412.05819, section 3.3)."""

from dataclasses import dataclass

from torch import Tensor

from catp_lightning.methods.observation import Observation, Signal
from catp_lightning.methods.scorers.fastervlm import FasterVLM


@dataclass(frozen=True)
class VTCCLS(FasterVLM):
    """FasterVLM's score, summed over the deep layers of the vision tower that lead to the features.

    A mean over layers would give the same ranking. The default is that of the authors' code: layers from 16 on of the
    23 that lead to the features of LLaVA-1.5, and the same share of the layers of any other tower.

    Attributes:
        layers: layers of the vision tower, counted from 0, or from -1 for the last that leads to the features; None:
            the last seven 23rds of them, at least one.
    """

    layers: tuple[int, ...] | None = None

    def attention(self, seen: Observation) -> Tensor:
        count = seen.layers[Signal.VISION_ATTENTION]
        layers = tuple(range(count * 16 // 23, count)) if self.layers is None else self.layers
        return seen.by_layer(Signal.VISION_ATTENTION, layers)
