"""Scores of a small network that was trained on a calibration's probes: what a token is worth to this question."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from catp_lightning.methods.network import Network
from catp_lightning.methods.observation import Needs, Observation, Signal
from catp_lightning.methods.scorers.base import Scorer


@dataclass(frozen=True)
class Learned(Scorer):
    """Worth of a token to the answer, as a network estimates it from the token, its place and the question.

    `CrossAttentionCalibration` trains it, without labels, while the model is frozen: on how likely the unpruned model's
    answer remains when random sets of tokens are kept. Without a network nothing can be pruned.

    Attributes:
        network: the network, as a calibration writes it.
    """

    published: ClassVar[bool] = False

    network: Network | None = None

    @property
    def needs(self) -> Needs:
        return {Signal.IMAGE_FEATURES: None, Signal.QUESTION: None}

    def score(self, seen: Observation) -> Tensor:
        if self.network is None:
            raise ValueError("learned has no network; a calibration trains one.")
        return self.network.worth(seen)
