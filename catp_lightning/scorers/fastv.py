"""FastV: attention of the prompt's last row inside the language model (2403.06764, section 4)."""

from dataclasses import dataclass

from torch import Tensor

from catp_lightning.observation import Needs, Observation, Signal
from catp_lightning.scorers.base import AttentionScorer


@dataclass(frozen=True)
class LastRow(AttentionScorer):
    """Attention of the prompt's last row in the layer before a stage: the score of both methods below."""

    @property
    def needs(self) -> Needs:
        return {Signal.LAST_ROW: None}

    def votes(self, seen: Observation) -> Tensor:
        return seen.by_layer(Signal.LAST_ROW)


@dataclass(frozen=True)
class FastV(LastRow):
    """Attention that the last row of the prompt pays a visual token in the layer before `layer`, where tokens leave.

    The budget is of all visual tokens of a sample. Every sample has a choice of its own, and padding is masked; the
    authors' code applies the first sample's choice to all and drops the padding mask.

    Attributes:
        layer: the decoder layer at whose entry tokens leave, from 1; the paper's K.
    """

    layer: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layer < 1:
            raise ValueError(f"layer is {self.layer}; tokens are scored in the layer before it, so it is at least 1.")
        if self.layers is not None:
            raise ValueError(f"layers is {list(self.layers)}; fastv reads the layer before `layer`: set that instead.")

    def stages(self, depth: int) -> tuple[int, ...]:
        return (self.layer,)


@dataclass(frozen=True)
class PyramidDrop(LastRow):
    """PyramidDrop (2410.17247, section 3): FastV's score anew at several layers, each dropping the same share.

    The budget is what is left after the last stage. The paper's share, one half at each quarter of the depth, is
    keep = 1/8 here.

    Attributes:
        stages_at: the decoder layers at whose entry tokens leave; None: at each quarter of the depth.
    """

    stages_at: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers is not None:
            raise ValueError(f"layers is {list(self.layers)}; pyramiddrop reads the layers before `stages_at`.")

    def stages(self, depth: int) -> tuple[int, ...]:
        quarters = tuple(sorted({max(1, depth * quarter // 4) for quarter in (1, 2, 3)}))
        return quarters if self.stages_at is None else self.stages_at
