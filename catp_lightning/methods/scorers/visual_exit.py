"""Visual exit: all visual tokens leave at one layer of the decoder (VTW 2405.05803, section 3; DyVTE 2411.19628)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from catp_lightning.methods.observation import Needs, Observation, Signal
from catp_lightning.methods.scorers.base import EqualScores
from catp_lightning.utils.on_cpu import of_known


@dataclass(frozen=True)
class VisualExit(EqualScores):
    """Drops all visual tokens at the entry of decoder layer `layer`; the layers before it read all of them.

    All scores are 0, and `keep` is ignored, except that keep 1.0 is the unpruned model as for every scorer: give any
    other. Both papers choose the layer: VTW takes the first whose answers on a calibration set diverge little from the
    full model's, DyVTE asks a small network for each input; here the policy names it, the same for all samples.

    Attributes:
        layer: the decoder layer at whose entry visual tokens are dropped, from 1; None: half of the depth.
    """

    layer: int | None = None

    def __post_init__(self) -> None:
        if self.layer is not None and self.layer < 1:
            raise ValueError(
                f"layer is {self.layer}; the first layer reads visual tokens, so it is at least 1, or None."
            )

    @property
    def needs(self) -> Needs:
        return {Signal.HIDDEN_STATES: None}  # not read: only decoders inside which tokens can be dropped have it

    def stages(self, depth: int) -> tuple[int, ...]:
        return (max(1, depth // 2) if self.layer is None else self.layer,)

    def stage_counts(self, keep: int | float, tokens: Tensor, stage: int, stages: int, seen: Observation) -> Tensor:
        """Return int64 [B] zeros, whatever `keep` is: no visual token stays."""
        return of_known(torch.zeros_like, tokens)
