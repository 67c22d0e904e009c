"""VisPruner: attention of [CLS] for a share of the budget, dissimilar tokens for the rest (2412.01818v2, section 3)."""

from dataclasses import dataclass
from typing import ClassVar

from catp_lightning.methods.scorers.fastervlm import FasterVLM


@dataclass(frozen=True)
class VisPruner(FasterVLM):
    """FasterVLM's score; its selector, `prune-similar`, keeps the highest scores and adds tokens unlike each other.

    Tokens are compared after the projector; the authors compare them before it.
    """

    selector: ClassVar[str] = "prune-similar"
