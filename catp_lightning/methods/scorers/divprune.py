"""DivPrune: diversity alone (2503.02175)."""

from dataclasses import dataclass
from typing import ClassVar

from catp_lightning.methods.observation import Needs, Signal
from catp_lightning.methods.scorers.base import EqualScores


@dataclass(frozen=True)
class DivPrune(EqualScores):
    """Equal scores for all tokens; its selector, `max-min`, keeps tokens far from each other (section 3, MMDP).

    A published method, and a control too: it reads neither attention nor the question.
    """

    selector: ClassVar[str] = "max-min"
    control: ClassVar[bool] = True

    @property
    def needs(self) -> Needs:
        return {Signal.IMAGE_FEATURES: None}
