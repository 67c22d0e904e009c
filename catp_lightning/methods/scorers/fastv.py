"""FastV: attention of the prompt's last row inside the language model (2403.06764, section 4)."""

from dataclasses import dataclass

from torch import Tensor

from catp_lightning.methods.observation import Needs, Observation, Signal
from catp_lightning.methods.scorers.base import PaidAttention


@dataclass(frozen=True)
class LastRow(PaidAttention):
    """Attention from the prompt's last row in decoder layers before tokens are dropped; base of FastV and PyramidDrop.

    Attributes:
        layers: decoder layers, counted from 0, or from -1 for the one before the layer where tokens are dropped.
    """

    layers: tuple[int, ...] | None = (-1,)

    @property
    def needs(self) -> Needs:
        return {Signal.LAST_TOKEN_ATTENTION: self.layers}

    def attention(self, seen: Observation) -> Tensor:
        return seen.by_layer(Signal.LAST_TOKEN_ATTENTION, self.layers)


@dataclass(frozen=True)
class FastV(LastRow):
    """Attention that a token gets from the prompt's last row in the decoder layer before `layer`.

    The budget counts all visual tokens of a sample together. Tokens are chosen for every sample separately, and padding
    is masked; the authors' code applies the first sample's choice to all and drops the padding mask.

    Attributes:
        layer: the decoder layer at whose entry tokens are dropped, from 1; the paper's K.
    """

    layer: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layer < 1:
            raise ValueError(f"layer is {self.layer}; tokens are scored in the layer before it, so it is at least 1.")
        if any(not -self.layer <= read < self.layer for read in self.layers or ()):
            raise ValueError(
                f"layers is {list(self.layers or ())}; where tokens leave at layer {self.layer} those before it have "
                f"run: name layers from 0 to {self.layer - 1}, or -1 for the last of them."
            )

    def stages(self, depth: int) -> tuple[int, ...]:
        return (self.layer,)


@dataclass(frozen=True)
class PyramidDrop(LastRow):
    """PyramidDrop (2410.17247, section 3): FastV's score at several layers, each of which drops the same share.

    The budget holds after the last stage. The paper's setting, one half at each quarter of the depth, is keep = 1/8
    here.

    Attributes:
        stages_at: the decoder layers at whose entry tokens are dropped; None: at each quarter of the depth.
    """

    stages_at: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers != (-1,):
            raise ValueError(f"layers is {self.layers}; pyramiddrop reads the layer before each stage: leave it out.")

    def stages(self, depth: int) -> tuple[int, ...]:
        quarters = tuple(sorted({max(1, depth * quarter // 4) for quarter in (1, 2, 3)}))
        return quarters if self.stages_at is None else self.stages_at
